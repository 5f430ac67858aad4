"""Whole training runs on the real Megatron-Core and the embedded engine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.engines.types import Completion, Engine, RolloutGroup
from moe_replay.errors import CheckpointError, CoverageError, EngineError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.loop import train
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.routing import RoutingTrace
from moe_replay.testing.misrouting import ChangedEngine, each_chosen
from moe_replay.testing.ranks import run_ranks

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]


def _train(recipe: Recipe, world_size: int, **options: Any) -> None:
    rank = torch.distributed.get_rank()
    directory = RunDirectory(recipe.run.output_dir)
    with build_reporter(recipe, rank=rank, run_directory=directory) as reporter:
        process = ProcessSpec(rank=rank, world_size=world_size)
        train(recipe, process=process, reporter=reporter, **options)


def run(recipe: Recipe, *, world_size: int = 1, **options: Any) -> list[dict[str, Any]]:
    """Train in separate processes; return the lines of metrics.jsonl without their seconds."""

    def call() -> None:
        _train(recipe, world_size, **options)

    run_ranks(call, world_size)
    return metrics_of(recipe)


def metrics_of(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the deterministic part of metrics.jsonl."""
    lines = (recipe.run.output_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record.pop("seconds")
    return records


def test_r3_with_equal_numerics_has_no_engine_gap(recipe: Recipes) -> None:
    for record in run(recipe(rollout__dtype="float32")):
        assert record["replay/agreement"] == 1.0
        assert record["replay/coverage"] == 1.0
        assert record["rollout_correction/k3_kl"] < 1e-9
        assert abs(record["rollout_correction/ratio_mean"] - 1) < 1e-5


def test_r3_gap_to_a_bfloat16_engine_is_below_the_live_gap_of_the_same_samples(
    recipe: Recipes,
) -> None:
    first = run(recipe(replay__live_gap_every=1, run__max_steps=1, batch__global_batch_size=64))[0]
    assert 0.9 < first["replay/agreement"] < 1.0
    assert first["rollout_correction/k3_kl"] < 0.5 * first["live_gap/k3_kl"]
    assert abs(first["rollout_correction/ratio_mean"] - 1) < 0.02


def test_r2_changes_nothing_bit_for_bit_when_weights_are_equal(recipe: Recipes) -> None:
    live = run(recipe(replay__router_replay_mode="disabled"), restart=True)
    replayed = run(recipe(replay__router_replay_mode="R2"), restart=True)
    for a, b in zip(live, replayed, strict=True):
        shared = a.keys() & b.keys()
        assert {"loss", "grad_norm", "reward", "rollout_correction/k3_kl"} <= shared
        assert {key: a[key] for key in shared} == {key: b[key] for key in shared}
    assert replayed[0]["replay/agreement"] == 1.0
    assert "replay/agreement" not in live[0]


def test_r3_is_not_the_disabled_run(recipe: Recipes) -> None:
    live = run(recipe(replay__router_replay_mode="disabled", run__max_steps=1), restart=True)
    replayed = run(recipe(run__max_steps=1), restart=True)
    assert live[0]["reward"] == replayed[0]["reward"]
    assert live[0]["grad_norm"] != replayed[0]["grad_norm"]


def test_training_raises_the_reward(recipe: Recipes) -> None:
    records = run(recipe(run__max_steps=8, optimizer__lr=3e-3, batch__global_batch_size=32))
    rewards = [record["reward"] for record in records]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.1


def test_several_updates_a_step_move_the_policy_away_from_the_old_one(recipe: Recipes) -> None:
    record = run(recipe(batch__steps_per_generation=2, run__max_steps=1, optimizer__lr=1e-2))[0]
    assert record["policy_version"] == 1
    assert record["policy_ratio/mean"] != 1.0
    assert record["clip_ratio/high_max"] > 0 or record["clip_ratio/low_mean"] > 0


@pytest.mark.parametrize("routes", ["live", "replay"])
def test_reference_model_starts_equal_to_the_policy_and_stays_behind(
    routes: str, recipe: Recipes
) -> None:
    records = run(
        recipe(
            grpo__beta=0.1,
            replay__reference_routes=routes,
            rollout__dtype="float32",
            run__max_steps=2,
        )
    )
    assert records[0]["kl"] < 1e-9
    assert records[1]["kl"] > 1e-6


def test_two_data_parallel_ranks_take_the_steps_of_one(recipe: Recipes, tmp_path: Path) -> None:
    settings = {"rollout__dtype": "float32", "run__max_steps": 2, "batch__steps_per_generation": 2}
    alone = run(recipe(run__output_dir=tmp_path / "one", **settings))
    shared = run(recipe(run__output_dir=tmp_path / "two", **settings), world_size=2)
    assert alone[0]["reward"] == shared[0]["reward"]
    for key in ("loss", "grad_norm", "rollout_correction/rollout_log_ppl", "entropy/mean"):
        assert math.isclose(alone[0][key], shared[0][key], rel_tol=1e-4, abs_tol=1e-6), key
    assert math.isclose(alone[1]["entropy/mean"], shared[1]["entropy/mean"], rel_tol=1e-2)


def test_resumed_run_repeats_the_uninterrupted_one_exactly(recipe: Recipes, tmp_path: Path) -> None:
    whole = run(recipe(run__output_dir=tmp_path / "whole", run__max_steps=4))
    interrupted = tmp_path / "interrupted"
    run(recipe(run__output_dir=interrupted, run__max_steps=2))
    resumed = run(recipe(run__output_dir=interrupted, run__max_steps=4))
    assert resumed == whole
    weights = [
        (folder / "export" / "model.safetensors").read_bytes()
        for folder in (tmp_path / "whole", interrupted)
    ]
    assert weights[0] == weights[1]


def test_half_written_checkpoint_is_never_loaded(recipe: Recipes) -> None:
    small = recipe(run__max_steps=2)
    first = run(small)
    folder = small.run.output_dir / "checkpoints"
    (folder / "step-000002").rename(folder / "unfinished-step-000002")
    assert run(small) == first


def test_run_of_another_recipe_is_not_resumed(recipe: Recipes) -> None:
    run(recipe(run__max_steps=1))
    with pytest.raises(CheckpointError, match="trains differently"):
        run(recipe(run__max_steps=1, optimizer__lr=5e-4))


def test_exported_model_loads_in_transformers_and_is_the_trained_one(recipe: Recipes) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = recipe(run__max_steps=1)
    run(trained)
    before = AutoModelForCausalLM.from_pretrained(trained.model.path).state_dict()
    folder = trained.run.output_dir / "export"
    after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert before.keys() == after.keys()
    moved = [(before[name] - after[name]).abs().max().item() for name in before]
    assert 0 < max(moved) < 0.01
    assert AutoTokenizer.from_pretrained(folder).decode([20, 21]) == "01"


def _faulty(
    fault: Callable[[RoutingTrace], RoutingTrace],
) -> Callable[[Recipe, torch.device], Any]:
    """Return the embedded engine with one fault in all traces."""

    def spoiled(group: RolloutGroup, number: int) -> Completion:
        completion = group.completions[number]
        assert completion.trace is not None
        return replace(completion, trace=fault(completion.trace))

    def change(groups: list[RolloutGroup]) -> list[RolloutGroup]:
        return each_chosen(groups, lambda group, number: True, spoiled)

    return lambda recipe, device: ChangedEngine(recipe_engine(recipe, device), change)


def _swap(groups: list[RolloutGroup]) -> list[RolloutGroup]:
    first = groups[0]
    a, b, *rest = first.completions
    swapped = (replace(a, trace=b.trace), replace(b, trace=a.trace), *rest)
    return [replace(first, completions=swapped), *groups[1:]]


def test_swapped_traces_are_refused_by_their_digest_before_anything_runs(recipe: Recipes) -> None:
    with pytest.raises((ValueError, EngineError), match="tokens"):
        run(
            recipe(),
            make_engine=lambda r, device: ChangedEngine(recipe_engine(r, device), _swap),
        )


def _half_missing(trace: RoutingTrace) -> RoutingTrace:
    return replace(trace, valid=trace.valid & (np.arange(len(trace)) % 2 == 0))


def test_run_stops_below_min_coverage_and_says_why(recipe: Recipes) -> None:
    with pytest.raises(
        CoverageError, match=r"coverage is 0\.[45].*prompt_omitted.*engine_gave_none"
    ):
        run(recipe(), make_engine=_faulty(_half_missing))


def _first_rank_faulty(recipe: Recipe, device: torch.device) -> Engine:
    make = recipe_engine if torch.distributed.get_rank() else _faulty(_half_missing)
    return make(recipe, device)


def test_coverage_is_that_of_the_step_and_not_of_a_rank(recipe: Recipes) -> None:
    # Nothing is dealt, so the first rank holds what it sampled: about half of it without routes.
    settings = {"run__max_steps": 1, "batch__balance": "false"}
    (record,) = run(
        recipe(replay__min_coverage=0.65, **settings),
        world_size=2,
        make_engine=_first_rank_faulty,
    )
    assert 0.65 < record["replay/coverage"] < 0.85


def test_every_rank_says_that_the_step_has_too_little_coverage(recipe: Recipes) -> None:
    settings = {"run__max_steps": 1, "batch__balance": "false"}
    with pytest.raises(CoverageError, match=r"coverage is 0\.[78]"):
        run(
            recipe(replay__min_coverage=0.9, **settings),
            world_size=2,
            make_engine=_first_rank_faulty,
        )


def test_missing_routes_are_counted_when_they_are_allowed(recipe: Recipes) -> None:
    record = run(
        recipe(replay__min_coverage=0.3, run__max_steps=1), make_engine=_faulty(_half_missing)
    )[0]
    assert 0.4 < record["replay/coverage"] < 0.6
    assert record["replay/rows_live_engine_gave_none"] > 0
    assert record["replay/rows_live_last_token"] == 16
