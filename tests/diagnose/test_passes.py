"""The exact KL by hand, chunk by chunk, and both trainers against a plain pass of the model."""

import math

import numpy as np
import pytest
import torch

from moe_replay.diagnose import passes
from moe_replay.diagnose.belonging import EARLY, LATE, RAW, BelongingTests
from moe_replay.diagnose.hf_trainer import HfTrainer
from moe_replay.diagnose.measured import Measured
from moe_replay.diagnose.passes import exact_kl, logprobs_of
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint


def of(rows: list[list[float]]) -> passes.Distributions:
    table = torch.tensor(rows, dtype=torch.float64).log()
    return lambda tokens, temperature: table[tokens]


def test_exact_kl_of_two_coins_is_what_the_definition_says(monkeypatch):
    ours, theirs = (
        of([[0.5, 0.5], [1.0, 0.0], [0.2, 0.8]]),
        of([[0.25, 0.75], [0.5, 0.5], [0.2, 0.8]]),
    )
    expected = [math.log(2) / 2 + math.log(2 / 3) / 2, math.log(2), 0.0]
    kl = exact_kl(ours, theirs, num_tokens=3, num_words=2, temperature=1.0)
    assert kl == pytest.approx(expected)
    # One token at a time gives the same.
    monkeypatch.setattr(passes, "_MAX_WORDS", 2)
    assert exact_kl(ours, theirs, num_tokens=3, num_words=2, temperature=1.0) == pytest.approx(
        expected
    )


def test_a_pass_of_transformers_is_the_models_own_and_its_margins_are_of_the_routers(rollout):
    group = rollout.groups[0]
    tokens, start = group.request.sequence(group.completions[0].token_ids), 8
    trainer = HfTrainer.load(rollout.model, dtype="float32", device="cpu")
    scores: list[torch.Tensor] = []
    routers = [
        module for name, module in trainer._model.named_modules() if name.endswith("mlp.gate")
    ]
    hooks = [
        router.register_forward_hook(lambda module, args, out: scores.append(out[0].softmax(-1)))
        for router in routers
    ]
    with torch.no_grad():
        logits = trainer._model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    for hook in hooks:
        hook.remove()
    found = trainer.run(tokens, start, temperature=0.7, replayed=None)
    expected = (logits[start - 1 : -1] / 0.7).log_softmax(-1)
    sampled = tokens[start:].astype(np.int64)
    picked = expected[np.arange(len(sampled)), sampled].numpy()
    assert found.token_logprobs == pytest.approx(picked, abs=1e-5)
    plain = logits[start - 1 : -1].log_softmax(-1)[np.arange(len(sampled)), sampled]
    assert logprobs_of(found.distributions, tokens[start:], 1.0) == pytest.approx(
        plain.numpy(), abs=1e-5
    )
    # scores are those of softmax over experts: the 4th of 4 chosen minus the 5th.
    best = torch.stack(scores, dim=1).topk(5).values
    assert found.margins == pytest.approx((best[..., 3] - best[..., 4]).numpy(), abs=1e-6)
    # Under its own routes nothing changes.
    again = trainer.run(tokens, start, temperature=0.7, replayed=found.live)
    assert again.token_logprobs == pytest.approx(found.token_logprobs, abs=1e-6)
    assert again.live is None


@pytest.mark.ranks
def test_a_pass_of_megatron_is_that_of_transformers_live_replayed_and_over_all_words(rollout):
    group = rollout.groups[1]
    completion = group.completions[0]
    tokens = group.request.sequence(completion.token_ids)
    theirs = HfTrainer.load(rollout.model, dtype="float32", device="cpu")
    routes = rollout.groups[1].completions[0].trace

    def check() -> None:
        from moe_replay.diagnose.megatron_trainer import megatron_trainer

        with megatron_trainer(rollout.model, dtype="float32") as trainer:
            assert trainer.form == theirs.form
            for replayed in (None, routes):
                ours, other = (
                    each.run(tokens, 8, temperature=0.7, replayed=replayed)
                    for each in (trainer, theirs)
                )
                assert ours.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-4)
                kl = exact_kl(
                    other.distributions,
                    ours.distributions,
                    num_tokens=len(completion.token_ids),
                    num_words=theirs.num_words,
                    temperature=0.7,
                )
                assert np.abs(kl).max() < 1e-8
                if replayed is None:
                    live = np.sort(ours.live.expert_ids), np.sort(other.live.expert_ids)
                    assert (live[0] == live[1]).all()
                    # Megatron chooses by logits, transformers by their softmax: the order agrees.
                    ranks = [m.ravel().argsort().argsort() for m in (ours.margins, other.margins)]
                    assert np.corrcoef(*ranks)[0, 1] > 0.8

    run_ranks(check, 1)


@pytest.mark.ranks
@pytest.mark.parametrize("family", ["ernie4_5_moe", "deepseek_v2", "deepseek_v3"])
def test_margins_of_megatron_are_those_of_its_own_choice_with_a_bias_and_in_groups(
    tmp_path, family
):
    """ERNIE 4.5 moves probabilities by a bias, DeepSeek-V2 and V3 choose groups, each otherwise."""
    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    model = write_tiny_checkpoint(
        tmp_path, family, **(groups if family == "deepseek_v2" else {}), num_experts_per_tok=3
    )
    tokens = np.random.default_rng(3).integers(4, 96, 40).astype(np.int32)

    def check() -> None:
        from moe_replay.diagnose.megatron_trainer import megatron_trainer

        with megatron_trainer(model, dtype="float32") as trainer:
            ours = trainer.run(tokens, 8, temperature=1.0, replayed=None)
        theirs = HfTrainer.load(model, dtype="float32", device="cpu")
        other = theirs.run(tokens, 8, temperature=1.0, replayed=None)
        assert (ours.margins >= 0).all()
        assert ours.margins == pytest.approx(other.margins, abs=1e-5)

    run_ranks(check, 1)


def sequence(
    name: str, theirs: np.ndarray, ours: np.ndarray, raw: np.ndarray | None = None
) -> Measured:
    return Measured(
        name=name,
        prompt=0,
        token_ids=np.zeros(len(ours) + 1, np.int32),
        recorded=None,
        live=None,
        rollout_logprobs=theirs.astype(np.float32),
        live_logprobs=ours.astype(np.float32),
        raw_logprobs=None if raw is None else raw.astype(np.float32),
    )


@pytest.mark.parametrize(
    ("cause", "plant"),
    [
        (LATE, lambda ours, raw: np.roll(ours, 1)),
        (EARLY, lambda ours, raw: np.roll(ours, -1)),
        (RAW, lambda ours, raw: raw),
    ],
)
def test_f8_each_misplacement_is_named_in_one_of_many_and_clean_ones_are_not(cause, plant):
    rng = np.random.default_rng(5)
    tests, clean = BelongingTests(), BelongingTests()
    for number in range(64):
        ours = -rng.exponential(1.0, 30)
        raw, noisy = 2 * ours, ours + rng.normal(0, 0.05, 30)
        theirs = plant(ours, raw) + noisy - ours if number == 40 else noisy
        tests.add(sequence(str(number), theirs, ours, raw))
        clean.add(sequence(str(number), noisy, ours, raw))
    assert [(each.sequence, each.cause) for each in tests.misplaced()] == [("40", cause)]
    assert clean.misplaced() == ()


def test_f8_a_large_gap_that_fits_no_other_place_is_not_called_misplaced():
    rng = np.random.default_rng(6)
    tests = BelongingTests()
    for number in range(32):
        tests.add(sequence(str(number), -rng.exponential(1.0, 30), -rng.exponential(1.0, 30)))
    assert tests.misplaced() == ()
