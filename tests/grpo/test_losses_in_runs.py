"""Keys of the loss, many at once, in a whole run that context parallelism does not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_replay.recipe.recipe import Recipe

from .test_documented import undocumented
from .test_loop import run

KEYS = {
    "grpo__loss_type": "dapo",
    "grpo__importance_sampling_level": "sequence_token",
    "grpo__epsilon": 3e-4,
    "grpo__epsilon_high": 4e-4,
    "grpo__delta": 3.0,
    "grpo__beta": 0.1,
    "grpo__use_bias_correction_kl": "true",
    "grpo__entropy_coef": 0.05,
    "grpo__top_entropy_quantile": 0.5,
    "grpo__rollout_importance_sampling_mode": "geometric_mask",
    "grpo__rollout_importance_sampling_threshold": 1.003,
    "grpo__rollout_importance_sampling_min": 0.997,
    "grpo__off_policy_sequence_mask_delta": 0.003,
    "batch__steps_per_generation": 2,
    "run__max_steps": 1,
}


@pytest.mark.ranks
def test_a_run_with_many_keys_of_the_loss_is_the_same_on_two_ranks_of_a_sequence(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    (alone,) = run(recipe(run__output_dir=tmp_path / "one", **KEYS))
    layout = {"megatron__context_parallel_size": 2}
    (shared,) = run(recipe(run__output_dir=tmp_path / "two", **KEYS, **layout), world_size=2)
    names = {name for name in alone if not name.startswith("replay/")} - {"details"}
    for name in sorted(names):
        assert shared[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-5), name
    # Each key had something to do.
    assert 0 < alone["rollout_correction/rejected_frac"] < 1
    assert 0 < alone["rollout_correction/off_policy_frac"] < 1
    assert 0 < alone["rollout_correction/ess"] < 1
    assert alone["entropy/kept_frac"] == pytest.approx(0.5, abs=0.01)
    assert 0 < alone["entropy/threshold"] < 2 * alone["entropy/mean"]
    assert alone["clip_ratio/region_mean"] > 0
    assert alone["kl"] > 0
    assert undocumented(alone) == set()


@pytest.mark.ranks
def test_a_step_whose_router_loss_alone_trains_has_no_threshold_of_entropies(
    recipe: Callable[..., Recipe],
) -> None:
    (metrics,) = run(
        recipe(
            grpo__top_entropy_quantile=0.5,
            grpo__overlong_filter="true",
            rollout__max_completion_length=1,
            megatron__moe_aux_loss_coeff=0.01,
            run__max_steps=1,
        )
    )
    assert metrics["completions/filtered_ratio"] == 1
    assert metrics["load_balancing_loss"] > 0
    assert "entropy/threshold" not in metrics
