"""Each loss, at each level, under each correction, is the oracle's: values and gradients."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_replay.grpo.loss import losses
from moe_replay.grpo.loss.policy import policy_loss
from moe_replay.recipe.sections.training import GrpoSection

from . import oracle
from .batches import (
    CORRECTIONS,
    LEVELS,
    computed,
    over_two_ranks,
    random_batch,
    rows_of,
    size_of,
)
from .oracle import LIMITS

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)
KL = (
    {},
    {"beta": 0.3},
    {"beta": 0.3, "kl_estimator": "k2"},
    {"beta": 0.3, "use_bias_correction_kl": True},
)
MASKS = ({}, {"off_policy_sequence_mask_delta": 0.05}, {"top_entropy_quantile": 0.4})
CASES = [(loss, level) for loss in LIMITS for level in LEVELS if loss != "dppo" or level == "token"]


def keys_of(loss: str, level: str, correction: str, **more: Any) -> dict[str, Any]:
    keys = {"loss_type": loss, "importance_sampling_level": level, **LIMITS[loss], **more}
    if correction != "none":
        keys["rollout_importance_sampling_mode"] = correction
        keys["rollout_importance_sampling_threshold"] = 1.4
        keys["rollout_importance_sampling_min"] = 0.7
    return keys


def is_refused(keys: dict[str, Any]) -> bool:
    section = GrpoSection(**keys)
    return section.importance_sampling_level == "sequence" and section.weighs_tokens is not None


def agrees(found: Any, expected: Any, tolerance: float = 1e-9) -> bool:
    """Return whether two losses, and their gradients, are equal up to rounding."""
    pairs = zip(found[1], expected[1], strict=True)
    return bool(
        np.isclose(found[0], expected[0], rtol=tolerance, atol=tolerance)
        and all(np.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)
    )


def test_every_loss_and_level_and_correction_of_the_recipe_is_tried() -> None:
    def named(key: str) -> set[str]:
        return set(get_args(GrpoSection.model_fields[key].annotation))

    assert named("loss_type") == set(LIMITS)
    assert named("importance_sampling_level") == set(LEVELS)
    assert named("rollout_importance_sampling_mode") == set(CORRECTIONS)


@pytest.mark.parametrize(("loss", "level"), CASES)
@settings(max_examples=8)
@given(seed=SEEDS, sizes=SIZES, data=st.data())
def test_loss_and_gradient_are_the_oracles_under_every_correction(
    loss: str, level: str, seed: int, sizes: list[int], data: st.DataObject
) -> None:
    batch = random_batch(seed, sizes)
    for correction in CORRECTIONS:
        more = data.draw(st.sampled_from(KL)) | data.draw(st.sampled_from(MASKS))
        keys = keys_of(loss, level, correction, entropy_coef=0.2, **more)
        if not is_refused(keys):
            assert agrees(computed(batch, keys), oracle.loss_of(batch, keys)), (seed, keys)


@pytest.mark.parametrize(("loss", "level"), CASES)
@settings(max_examples=3)
@given(seed=SEEDS, sizes=SIZES, data=st.data())
def test_loss_and_gradient_do_not_depend_on_split_order_or_ranks(
    loss: str, level: str, seed: int, sizes: list[int], data: st.DataObject
) -> None:
    batch = random_batch(seed, sizes)
    order = data.draw(st.permutations(range(len(batch))))
    split = data.draw(st.integers(0, len(batch)))
    parts = [part for part in (order[:split], order[split:]) if part]
    cuts = [data.draw(st.integers(0, len(sample.new))) for sample in batch]
    for correction in ("none", "token_mask", "sequence_mask", "geometric_truncate"):
        more = data.draw(st.sampled_from(KL)) | data.draw(st.sampled_from(MASKS))
        keys = keys_of(loss, level, correction, entropy_coef=0.2, **more)
        if is_refused(keys):
            continue
        whole = computed(batch, keys)
        assert agrees(computed(batch, keys, parts), whole), (seed, keys)
        assert agrees(over_two_ranks(batch, cuts, keys), whole), (seed, keys)
        # A sample that does not train changes nothing.
        alone = [sample for sample in batch if sample.trains]
        kept = [g for g, sample in zip(whole[1], batch, strict=True) if sample.trains]
        assert agrees(computed(alone, keys), (whole[0], kept)), (seed, keys)


def test_control_each_variant_has_numbers_of_its_own() -> None:
    batch = random_batch(3, [4, 2, 9, 3, 6, 2])
    found: dict[str, Any] = {}
    for loss, correction, level in itertools.product(LIMITS, CORRECTIONS, ("token", "sequence")):
        keys = keys_of(loss, level, correction)
        if not is_refused(keys) and (loss, level) in CASES:
            # The same limits for all, so that nothing but the formula differs.
            if correction != "none":
                keys["rollout_importance_sampling_threshold"] = 2.5
                keys["rollout_importance_sampling_min"] = 0.5
            keys |= {"epsilon": 0.2, "epsilon_high": 1.2 if loss == "cispo" else 0.28}
            found[f"{loss} {level} {correction}"] = oracle.loss_of(batch, keys | {"delta": None})
    for (name, first), (other, second) in itertools.combinations(found.items(), 2):
        alias = {name.split()[0], other.split()[0]} == {"bnpo", "dapo"}
        same = name.split()[1:] == other.split()[1:]
        assert agrees(first, second) == (alias and same), (name, other)


@pytest.mark.parametrize("wrong", ["sign", "denominator", "one token"])
def test_control_a_wrong_loss_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = losses.grpo

    def planted(ratio, rows, batch, keys):
        terms = right(ratio, rows, batch, keys)
        if wrong == "sign":
            object.__setattr__(terms, "per_token", -terms.per_token)
        elif wrong == "denominator":
            object.__setattr__(terms, "weights", torch.ones_like(ratio) / batch.num_tokens)
        else:
            terms.per_token.data[3] *= 1.001
        return terms

    batch = random_batch(5, [4, 2, 5])
    keys = keys_of("grpo", "token", "none")
    assert agrees(computed(batch, keys), oracle.loss_of(batch, keys))
    monkeypatch.setattr(losses, "grpo", planted)
    assert not agrees(computed(batch, keys), oracle.loss_of(batch, keys))


def test_the_entropy_bonus_pulls_every_token_alike_whatever_the_loss_averages() -> None:
    batch = random_batch(7, [4, 2])
    for loss in ("grpo", "dapo"):
        keys = keys_of(loss, "token", "none", entropy_coef=0.6)
        size, threshold = size_of(batch, keys)
        rows = rows_of(batch, [4, 2], threshold)
        policy_loss(rows, size, GrpoSection(**keys))[0].backward()
        assert rows.entropies is not None
        assert rows.entropies.grad is not None
        assert rows.entropies.grad.tolist() == pytest.approx([-0.1] * 6)
