"""Losses and corrections of two small samples, worked out by hand.

Sample a has new probabilities .3, .5, .1, old .2, .5, .2 (ratios 1.5, 1, .5) and advantage 1;
sample b has new .4, old .2 (ratio 2) and advantage -1. Engine gaps are 2, 1, .25 and 4.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.grpo.loss.corrections import (
    correction_tally,
    effective_size,
    engine_weights,
    is_on_policy,
)
from moe_replay.grpo.metrics import Tally, engine_gap
from moe_replay.recipe.sections.training import GrpoSection

from . import batches, oracle
from .oracle import Completion

OLD_A, OLD_B = np.log([0.2, 0.5, 0.2]), np.log([0.2])
A = Completion(
    new=np.log([0.3, 0.5, 0.1]),
    old=OLD_A,
    mu=OLD_A - np.log([2, 1, 0.25]),
    ref=np.log([0.3, 0.25, 0.2]),
    entropy=np.array([0.1, 0.9, 0.5]),
    advantage=1.0,
)
B = Completion(
    new=np.log([0.4]),
    old=OLD_B,
    mu=OLD_B - np.log([4]),
    ref=np.log([0.4]),
    entropy=np.array([2.0]),
    advantage=-1.0,
)
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}


def found(**keys: Any) -> tuple[float, list[float]]:
    """Return loss and gradients, of the code and of the oracle, which must agree."""
    loss, gradients, _ = batches.computed([A, B], keys)
    expected, other = oracle.loss_of([A, B], keys)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert np.concatenate(gradients) == pytest.approx(np.concatenate(other), rel=1e-12, abs=1e-15)
    return loss, np.concatenate(gradients).tolist()


@pytest.mark.parametrize(
    ("keys", "loss"),
    [
        ({"loss_type": "grpo", **CLIP}, 0.536667),
        ({"loss_type": "dapo", **CLIP}, -0.195),
        ({"loss_type": "bnpo", **CLIP}, -0.195),
        # Divided by 20 here: -0.04875 * 8 / 20.
        ({"loss_type": "dr_grpo", **CLIP}, -0.0195),
        ({"loss_type": "dapo", **CLIP, "delta": 1.6}, -0.295),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, 0.454454),
        ({"loss_type": "sapo", "sapo_temperature_neg": 1.05}, 0.411),
        ({"loss_type": "grpo", **CLIP, "importance_sampling_level": "sequence"}, 0.545720),
    ],
)
def test_losses_are_those_worked_out(keys: dict[str, Any], loss: float) -> None:
    assert found(**keys)[0] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("keys", "gradient"),
    [
        ({"loss_type": "dapo", **CLIP}, [0, -0.25, -0.125, 0.5]),
        ({"loss_type": "dapo", **CLIP, "delta": 1.6}, [0, -0.25, -0.125, 0]),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, [-0.375, -0.25, -0.125, 0.5]),
        (
            {"loss_type": "sapo", "sapo_temperature_neg": 1.05},
            [-1.410022 / 6, -1 / 6, -0.470007 / 6, 1.536220 / 2],
        ),
        # a gained .1 in its first token, b .2: the one is free up to .15, the other is not good.
        ({"loss_type": "dppo", "epsilon": 0.1, "epsilon_high": 0.15}, [-0.375, -0.25, -0.125, 0.5]),
        ({"loss_type": "dppo", "epsilon": 0.1, "epsilon_high": 0.05}, [0, -0.25, -0.125, 0.5]),
    ],
)
def test_gradients_are_those_worked_out(keys: dict[str, Any], gradient: list[float]) -> None:
    assert found(**keys)[1] == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("keys", "gradient"),
    [
        ({}, [0, 0.5, -1]),
        ({"kl_estimator": "k2"}, [0, 0.693147, -0.693147]),
        ({"use_bias_correction_kl": True}, [0, 0.693147, -0.346574]),
    ],
)
def test_the_kl_term_pulls_as_its_estimator_says(
    keys: dict[str, Any], gradient: list[float]
) -> None:
    plain = found(loss_type="dapo", **CLIP)[1]
    with_kl = found(loss_type="dapo", **CLIP, beta=1.0, **keys)[1]
    assert 4 * (np.array(with_kl) - plain) == pytest.approx([*gradient, 0], abs=1e-6)


def weights(mode: str, highest: float, lowest: float | None = None) -> list[float]:
    keys = GrpoSection(
        rollout_importance_sampling_mode=mode,
        rollout_importance_sampling_threshold=highest,
        rollout_importance_sampling_min=lowest,
    )
    rows = batches.rows_of([A, B], [3, 1], -math.inf)
    return engine_weights(rows, keys).weights.tolist()


@pytest.mark.parametrize(
    ("mode", "limits", "expected"),
    [
        ("token_truncate", (2.0,), [2, 1, 0.25, 2]),
        ("token_truncate", (2.0, 0.5), [2, 1, 0.5, 2]),
        ("token_mask", (2.0 + 1e-9,), [2, 1, 0.25, 0]),
        ("token_mask", (5.0, 0.5), [2, 1, 0, 4]),
        ("sequence_truncate", (2.0,), [0.5, 0.5, 0.5, 2]),
        ("sequence_mask", (2.0,), [0.5, 0.5, 0.5, 0]),
        ("geometric_truncate", (2.0,), [0.793701, 0.793701, 0.793701, 2]),
        ("geometric_mask", (1.5,), [1.5, 1, 0.25, 0]),
        ("geometric_mask", (5.0, 0.8), [0, 0, 0, 4]),
    ],
)
def test_weights_of_the_engine_gap_are_those_worked_out(
    mode: str, limits: tuple[float, ...], expected: list[float]
) -> None:
    assert weights(mode, *limits) == pytest.approx(expected, abs=1e-6)


def test_a_gap_beyond_all_bounds_stays_finite_and_is_rejected_or_limited() -> None:
    far = Completion(**{**vars(B), "mu": OLD_B - 1e4})
    rows = batches.rows_of([far], [1], -math.inf)
    for mode, expected in (("token_truncate", 2.0), ("sequence_mask", 0.0)):
        keys = GrpoSection(rollout_importance_sampling_mode=mode)
        assert engine_weights(rows, keys).weights.tolist() == [expected]


def test_a_bad_sample_that_the_policy_has_left_is_masked_and_a_good_one_is_not() -> None:
    left = Completion(**{**vars(B), "mu": np.log([0.8])})
    good = Completion(**{**vars(left), "advantage": 1.0})
    rows = batches.rows_of([left, good], [1, 1], -math.inf)
    assert is_on_policy(rows, 0.5).tolist() == [False, True]
    # ln 2 is the distance.
    assert is_on_policy(rows, 0.7).tolist() == [True, True]


def test_all_rejected_tokens_leave_a_loss_of_zero_and_are_counted() -> None:
    keys = {
        "rollout_importance_sampling_mode": "sequence_mask",
        "rollout_importance_sampling_threshold": 0.4,
        "beta": 0.5,
    }
    with_kl, gradients, (statistics,) = batches.computed([A, B], keys)
    assert statistics.num_pulled == 0
    # The KL term is not rejected.
    assert with_kl == pytest.approx(0.5 * (0.193147 + 0.306853) / 6, abs=1e-6)
    assert gradients[0] == pytest.approx([0, 0.5 * 0.5 / 6, -0.5 / 6])
    tally = tallied(**{k: v for k, v in keys.items() if k != "beta"})
    assert tally["rejected_frac"] == tally["clipped_frac"] == 1.0
    assert tally["ess"] == tally["is_weight_mean"] == 0.0


def tallied(**keys: Any) -> dict[str, float]:
    tally = correction_tally([A.old, B.old], [A.mu, B.mu], GrpoSection(**keys))
    metrics = effective_size(Tally.merge([tally]).finish())
    return {name.removeprefix("rollout_correction/"): value for name, value in metrics.items()}


def test_metrics_of_a_correction_are_those_worked_out() -> None:
    metrics = tallied(rollout_importance_sampling_mode="token_truncate")
    # W = 2, 1, .25, 2: mean 1.3125, mean of squares 9.0625 / 4; only b lies above.
    assert metrics == pytest.approx(
        {
            "is_weight_mean": 1.3125,
            "clipped_frac": 0.25,
            "rejected_frac": 0.0,
            "ess": 1.3125**2 / 2.265625,
        }
    )
    assert metrics["ess"] == pytest.approx(0.760345, abs=1e-6)
    assert tallied() == {}


def test_metrics_of_the_gap_are_those_worked_out() -> None:
    metrics = engine_gap([A.old, B.old], [A.mu, B.mu]).finish()
    expected = {"kl": -0.173287, "k3_kl": 0.639213, "chi2_token": 4.265625}
    expected |= {"log_ppl_diff": -0.577623, "ppl_ratio": 0.754961}
    expected |= {"chi2_seq": 7.314980, "chi2_seq_product": 7.125}
    for name, value in expected.items():
        assert metrics[f"rollout_correction/{name}"] == pytest.approx(value, abs=1e-6), name


def test_the_highest_half_of_entropies_is_kept_and_ties_with_the_threshold_too() -> None:
    # Entropies .1, .9, .5, 2: the threshold is .7.
    plain = found(loss_type="dapo", **CLIP)[1]
    _, gradient = found(loss_type="dapo", **CLIP, top_entropy_quantile=0.5)
    assert gradient == pytest.approx([0, plain[1], 0, plain[3]])
    tied = Completion(**{**vars(A), "entropy": np.array([0.5, 0.5, 0.5])})
    rows = batches.rows_of([tied], [3], batches.size_of([tied], {"top_entropy_quantile": 0.3})[1])
    assert rows.is_uncertain is not None
    assert bool(torch.all(rows.is_uncertain))
