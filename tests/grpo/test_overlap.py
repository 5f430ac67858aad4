"""Rollouts that are sampled while the trainer learns: rollout.max_staleness = 1."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Request, RolloutGroup, SamplingParams
from moe_replay.errors import EngineError, MisalignmentError, UnsupportedError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.loop import train
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.misrouting import MisroutingEngine, Plant, of_another, one_row_late
from moe_replay.testing.ranks import run_ranks

from ..support.served import served
from .overlap_case import OVERLAPPED, BesideEngine, beside, texts_of
from .smallest_recipe import problems_of
from .test_loop import metrics_of, run

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]


def test_every_step_but_the_first_learns_from_the_weights_of_the_push_before(
    recipe: Recipes,
) -> None:
    made = recipe(**OVERLAPPED, run__max_steps=4, optimizer__lr=3e-3)
    records = run(made, make_engine=beside)
    assert [r["rollout/staleness_mean"] for r in records] == [0.0, 1.0, 1.0, 1.0]
    assert [r["rollout/staleness_max"] for r in records] == [0.0, 1.0, 1.0, 1.0]
    assert records[0]["rollout/num_staleness_0"] == records[1]["rollout/num_staleness_1"] == 16
    assert [r["policy_version"] for r in records] == [1.0, 2.0, 3.0, 4.0]
    assert {(step, version) for step, _, version, _ in texts_of(made)} == {
        (1, 0),
        (2, 0),
        (3, 1),
        (4, 2),
    }
    for record in records:
        assert record["replay/coverage"] == 1.0
    # Equal numerics: without drift all routes agree, with one step's drift some do not.
    assert records[0]["replay/agreement"] == 1.0
    assert all(0.5 < r["replay/agreement"] < 1.0 for r in records[1:])
    assert records[0]["rollout_correction/k3_kl"] < 1e-9 < records[1]["rollout_correction/k3_kl"]


def test_a_step_learns_from_what_the_older_weights_sample(recipe: Recipes) -> None:
    made = recipe(**OVERLAPPED, run__max_steps=2, optimizer__lr=3e-2)
    run(made, make_engine=beside)
    # No optimizer step moves anything, so every completion is one of the first weights.
    still = recipe(
        run__output_dir=made.run.output_dir.with_name("still"),
        rollout__dtype="float32",
        run__max_steps=2,
        optimizer__lr=1e-30,
    )
    run(still)
    moved = recipe(
        run__output_dir=made.run.output_dir.with_name("moved"),
        rollout__dtype="float32",
        run__max_steps=2,
        optimizer__lr=3e-2,
    )
    run(moved)
    second = {
        name: [t[3] for t in texts_of(r) if t[0] == 2]
        for name, r in {"made": made, "still": still, "moved": moved}.items()
    }
    assert second["made"] == second["still"]
    # The control: the weights after the first step sample something else.
    assert second["made"] != second["moved"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_same_recipe_gives_the_same_run_twice(
    world_size: int, recipe: Recipes, tmp_path: Path
) -> None:
    runs = [
        run(
            recipe(**OVERLAPPED, run__output_dir=tmp_path / name),
            world_size=world_size,
            make_engine=beside,
        )
        for name in ("first", "second")
    ]
    assert runs[0] == runs[1]
    assert runs[0][-1]["rollout/staleness_mean"] == 1.0


class GatedEngine(BesideEngine):
    """Lets a rollout end only once the trainer is in the update of the step before."""

    updating = threading.Event()
    wait_s = 300.0

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Wait, then sample."""
        if self.num_rollouts and not self.updating.wait(self.wait_s):
            raise EngineError("the trainer does not learn while this is sampled")
        self.updating.clear()
        return super().generate(requests, sampling)


def gated(
    recipe: Recipe, wait_s: float, kind: type[GatedEngine] = GatedEngine
) -> list[dict[str, Any]]:
    """Train with a `GatedEngine`."""

    def call() -> None:
        directory = RunDirectory(recipe.run.output_dir)
        with build_reporter(recipe, rank=0, run_directory=directory) as reporter:
            GatedEngine.wait_s = wait_s
            said = reporter.station

            def station(step: int, name: str) -> None:
                said(step, name)
                if name == "update":
                    GatedEngine.updating.set()

            reporter.station = station
            train(
                recipe,
                process=ProcessSpec(rank=0, world_size=1),
                reporter=reporter,
                make_engine=lambda r, device: kind(recipe_engine(r, device)),
            )

    run_ranks(call, 1)
    return metrics_of(recipe)


def test_the_next_rollout_runs_while_the_trainer_learns(recipe: Recipes) -> None:
    assert len(gated(recipe(**OVERLAPPED), 300.0)) == 3


class ClosingEngine(GatedEngine):
    """Closes the gate again when an update is over."""

    def load_weights(self, weights: Any, *, policy_version: int) -> None:
        """Pass the weights on."""
        super().load_weights(weights, policy_version=policy_version)
        self.updating.clear()


def test_control_without_overlap_the_gate_never_opens(recipe: Recipes) -> None:
    made = recipe(**{**OVERLAPPED, "rollout__max_staleness": 0})
    with pytest.raises(EngineError, match="does not learn while this is sampled"):
        gated(made, 1.0, ClosingEngine)
    assert len(metrics_of(made)) == 1


@pytest.mark.parametrize(
    ("engine", "reason"),
    [("embedded", "in the trainer's process"), ("vllm", "in the trainer's process")],
)
def test_engines_without_resources_of_their_own_are_refused(
    engine: str, reason: str, recipe: Recipes
) -> None:
    made = recipe(rollout__max_staleness=1, rollout__engine=engine)
    with pytest.raises(UnsupportedError, match=reason):
        run(made)
    assert not (made.run.output_dir / "metrics.jsonl").exists()


def test_files_are_refused(recipe: Recipes, tmp_path: Path) -> None:
    made = recipe(
        rollout__max_staleness=1, rollout__engine="files", rollout__path=tmp_path / "nothing"
    )
    with pytest.raises(UnsupportedError, match="everything it answers was sampled before"):
        run(made)


def test_an_engine_of_a_user_must_say_that_it_samples_beside(recipe: Recipes) -> None:
    made = recipe(rollout__max_staleness=1)
    with pytest.raises(UnsupportedError, match="has no method `cancel`"):
        run(made, make_engine=lambda r, device: recipe_engine(r, device))


def test_more_than_one_version_is_refused() -> None:
    assert "rollout.max_staleness" in problems_of(rollout={"max_staleness": 2})


def test_two_servers_give_the_run_that_one_engine_gives(
    recipe: Recipes, workspace: Path, tmp_path: Path
) -> None:
    with ExitStack() as opened:
        urls = [
            opened.enter_context(served(EmbeddedEngine(workspace / "model", dtype="float32")))
            for _ in range(2)
        ]
        keys = {
            "rollout__engine": "vllm-server",
            "rollout__urls": json.dumps(urls),
        }
        records = run(
            recipe(**OVERLAPPED, **keys, run__output_dir=tmp_path / "servers"), world_size=2
        )
    alone = run(
        recipe(**OVERLAPPED, run__output_dir=tmp_path / "alone"), world_size=2, make_engine=beside
    )
    for ours, theirs in zip(records, alone, strict=True):
        assert ours["reward"] == theirs["reward"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["rollout/staleness_mean"] == theirs["rollout/staleness_mean"]


LONG = {
    "rollout__max_completion_length": 40,
    "batch__global_batch_size": 32,
    "batch__max_tokens_per_microbatch": 400,
    "run__max_steps": 3,
    # A step of drift at which agreement falls to 0.95 or so.
    "optimizer__lr": 3e-4,
}


@pytest.mark.parametrize("plant", [one_row_late, of_another])
def test_the_guard_finds_wrong_routes_among_stale_ones(plant: Plant, recipe: Recipes) -> None:
    def make(r: Recipe, device: torch.device) -> Any:
        # One sample of the second step, whose completions are one version old.
        return MisroutingEngine(
            beside(r, device),
            plant,
            lambda group, number: (group.request.request_id, number) == (11, 2),
        )

    made = recipe(**OVERLAPPED, **LONG)
    with pytest.raises(MisalignmentError, match=r"step 2, (old_logprobs|update 1 of 1): "):
        run(made, make_engine=make)
    assert len(metrics_of(made)) == 1


def test_control_the_guard_lets_one_step_of_drift_pass(recipe: Recipes) -> None:
    records = run(recipe(**OVERLAPPED, **LONG), make_engine=beside)
    assert [r["replay/dropped_samples"] + r["replay/lost_samples"] for r in records] == [0.0] * 3
    assert records[1]["replay/agreement"] < 1.0


def test_drift_of_a_high_learning_rate_never_stops_a_run(recipe: Recipes) -> None:
    # Few samples a step, so that the guard fills up its baseline from fresher steps.
    records = run(recipe(**OVERLAPPED, run__max_steps=6, optimizer__lr=1e-2), make_engine=beside)
    assert len(records) == 6
    assert min(r["replay/agreement"] for r in records) < 0.8
