"""Keys of the loss, many at once, in a whole run that no split over ranks changes."""

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
def test_a_run_with_many_keys_of_the_loss_is_the_same_on_two_ranks_however_split(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    (alone,) = run(recipe(run__output_dir=tmp_path / "one", **KEYS))
    names = {name for name in alone if not name.startswith("replay/")} - {"details"}
    # Parts of each sequence, then samples.
    for size in (2, 1):
        layout = {"megatron__context_parallel_size": size}
        folder = tmp_path / f"two-{size}"
        (shared,) = run(recipe(run__output_dir=folder, **KEYS, **layout), world_size=2)
        for name in sorted(names):
            assert shared[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-5), (size, name)
    # Each key had something to do.
    assert 0 < alone["rollout_correction/rejected_frac"] < 1
    assert 0 < alone["rollout_correction/off_policy_frac"] < 1
    assert 0 < alone["rollout_correction/ess"] < 1
    assert alone["entropy/kept_frac"] == pytest.approx(0.5, abs=0.01)
    assert 0 < alone["entropy/threshold"] < 2 * alone["entropy/mean"]
    assert alone["clip_ratio/region_mean"] > 0
    assert alone["kl"] > 0
    assert undocumented(alone) == set()


OTHERS = {
    "grpo": {},
    "sapo": {"grpo__loss_type": "sapo"},
    "dppo": {"grpo__loss_type": "dppo", "grpo__epsilon": 1e-3, "grpo__epsilon_high": 1e-3},
    "k2": {"grpo__beta": 0.5, "grpo__kl_estimator": "k2"},
}


@pytest.mark.ranks
def test_losses_of_whole_runs_begin_alike_and_part_with_the_first_update(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Where the ratio is 1 and the policy is the reference, each has the gradient of the ratio.

    A batch of completions of one length, so that a mean over tokens is one over samples.
    """
    found = {
        name: run(
            recipe(
                run__output_dir=tmp_path / name,
                batch__steps_per_generation=2,
                rollout__max_completion_length=4,
                rollout__dtype="float32",
                checkpoint__export="false",
                **keys,
            )
        )
        for name, keys in OTHERS.items()
    }
    base = found.pop("grpo")
    for name, records in found.items():
        assert [record["step"] for record in records] == [1, 2, 3]
        first, plain = records[0], base[0]
        assert first["completions/mean_length"] == 4
        assert first["reward"] == plain["reward"]
        begins = [record["grad_norm/update_1"] for record in (first, plain)]
        assert begins[0] == pytest.approx(begins[1], rel=1e-4), name
        assert records[2]["reward"] != base[2]["reward"] or name == "sapo", name
        for record in records:
            assert undocumented(record) == set()
    # What each does to the second update: a sigmoid is flatter, few tokens may move, a pull back.
    second = {name: records[0]["grad_norm/update_2"] for name, records in found.items()}
    assert all(value != base[0]["grad_norm/update_2"] for value in second.values()), second
    assert found["dppo"][0]["clip_ratio/region_mean"] > 0
    assert found["k2"][2]["kl"] > 0 and "kl" not in base[2]
    assert (
        "clip_ratio/region_mean" not in found["sapo"][0]
        or not found["sapo"][0]["clip_ratio/region_mean"]
    )


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
