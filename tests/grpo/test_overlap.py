"""Rollouts that are sampled while the trainer learns: rollout.max_staleness = 1."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Completion, Engine, Request, RolloutGroup, SamplingParams
from moe_replay.errors import EngineError, MisalignmentError, UnsupportedError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.loop import train
from moe_replay.grpo.stopping import StopRequest
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.misrouting import MisroutingEngine, Plant, of_another, one_row_late
from moe_replay.testing.ranks import run_ranks

from ..support.served import served
from .smallest_recipe import problems_of
from .test_loop import metrics_of, run

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]
OVERLAPPED = {
    "rollout__max_staleness": 1,
    "rollout__dtype": "float32",
    "checkpoint__export": "false",
}


class BesideEngine:
    """The embedded engine, which has weights of its own and says so."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.is_cancelled = threading.Event()
        self.num_rollouts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Sample until cancelled."""
        self.num_rollouts += 1
        return self.inner.generate(  # pyrefly: ignore
            requests, sampling, cancelled=self.is_cancelled.is_set
        )

    def load_weights(self, weights: Any, *, policy_version: int) -> None:
        """Pass the weights on."""
        self.inner.load_weights(weights, policy_version=policy_version)

    def cancel(self) -> None:
        """End the call that runs."""
        self.is_cancelled.set()


def beside(recipe: Recipe, device: torch.device) -> Any:
    return BesideEngine(recipe_engine(recipe, device))


def texts_of(recipe: Recipe) -> list[tuple[int, int, int, str]]:
    """Return (step, prompt, policy version, text) of every completion that was trained on."""
    lines = (recipe.run.output_dir / "completions.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [(e["step"], e["item"], e["policy_version"], e["completion"]) for e in entries]


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
    wait_s = 120.0

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
    assert len(gated(recipe(**OVERLAPPED), 120.0)) == 3


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


def stopped_in(recipe: Recipe, station: tuple[int, str], world_size: int) -> int:
    """Train until a station of a step asks the run to stop; return its last finished step."""

    def call() -> int:
        rank = torch.distributed.get_rank()
        stop = StopRequest()
        directory = RunDirectory(recipe.run.output_dir)
        with build_reporter(recipe, rank=rank, run_directory=directory) as reporter:
            said = reporter.station

            def heard(step: int, name: str) -> None:
                said(step, name)
                if (step, name) == station and rank == world_size - 1:
                    stop.ask("a test")

            reporter.station = heard
            process = ProcessSpec(rank=rank, world_size=world_size)
            return train(
                recipe, process=process, reporter=reporter, make_engine=beside, stop=stop
            ).step

    steps = set(run_ranks(call, world_size, timeout_s=300))
    assert len(steps) == 1
    return steps.pop()


@pytest.mark.parametrize(
    ("station", "world_size", "finished"),
    [
        # Dropped while it is scored: what it was to learn from is saved, and sampled no more.
        ((2, "reward"), 1, 1),
        ((3, "reward"), 2, 2),
        # Finished, with the rollout beside it.
        ((2, "old_logprobs"), 1, 2),
        ((2, "update"), 2, 2),
        ((2, "sync"), 1, 2),
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    station: tuple[int, str], world_size: int, finished: int, recipe: Recipes, tmp_path: Path
) -> None:
    settings = {**OVERLAPPED, "run__max_steps": 4, "checkpoint__save_steps": 10}
    whole = run(
        recipe(**settings, run__output_dir=tmp_path / "whole"),
        world_size=world_size,
        make_engine=beside,
    )
    broken = recipe(**settings, run__output_dir=tmp_path / "broken")
    assert stopped_in(broken, station, world_size) == finished
    checkpoint = broken.run.output_dir / "checkpoints" / f"step-{finished:06d}"
    assert (checkpoint / "rollout").is_dir()
    assert run(broken, world_size=world_size, make_engine=beside) == whole
    one, two = (
        (tmp_path / name / "completions.jsonl").read_bytes() for name in ("whole", "broken")
    )
    assert one == two


def test_control_without_its_rollout_a_checkpoint_gives_another_run(
    recipe: Recipes, tmp_path: Path
) -> None:
    settings = {**OVERLAPPED, "run__max_steps": 3, "optimizer__lr": 3e-3}
    whole = run(recipe(**settings, run__output_dir=tmp_path / "whole"), make_engine=beside)
    broken = recipe(**settings, run__output_dir=tmp_path / "broken")
    assert stopped_in(broken, (2, "update"), 1) == 2
    shutil.rmtree(broken.run.output_dir / "checkpoints" / "step-000002" / "rollout")
    again = run(broken, make_engine=beside)
    assert again[:2] == whole[:2]
    assert again[2]["rollout/staleness_max"] == 0.0
    assert again[2]["reward"] != whole[2]["reward"]


def test_a_checkpoint_of_one_rank_is_continued_by_two(recipe: Recipes, tmp_path: Path) -> None:
    settings = {**OVERLAPPED, "run__max_steps": 3, "run__output_dir": tmp_path / "out"}
    made = recipe(**settings)
    assert stopped_in(made, (2, "update"), 1) == 2
    records = run(made, world_size=2, make_engine=beside)
    assert records[2]["rollout/num_staleness_1"] == 16.0


def test_a_held_rollout_of_other_settings_is_sampled_again_and_said(
    recipe: Recipes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {**OVERLAPPED, "run__max_steps": 3, "run__output_dir": tmp_path / "out"}
    assert stopped_in(recipe(**settings), (2, "update"), 1) == 2
    changed = recipe(**settings, rollout__max_completion_length=8)
    records = run(changed, make_engine=beside, allow_changed=["rollout.max_completion_length"])
    assert records[2]["rollout/num_staleness_0"] == 16.0
    assert "step 3 is sampled again" in " ".join(capfd.readouterr().out.split())


class FailingEngine(BesideEngine):
    """Fails in its third rollout, on the last rank."""

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Sample twice."""
        last = torch.distributed.get_world_size() - 1
        if self.num_rollouts == 2 and torch.distributed.get_rank() == last:
            raise EngineError("the servers are gone")
        return super().generate(requests, sampling)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_fails_beside_the_trainer_ends_the_run_on_all_ranks_before_the_push(
    world_size: int, recipe: Recipes
) -> None:
    made = recipe(**OVERLAPPED)
    with pytest.raises(EngineError, match="the servers are gone"):
        run(
            made,
            world_size=world_size,
            make_engine=lambda r, device: FailingEngine(recipe_engine(r, device)),
        )
    # The rollout of step 3 failed beside step 2.
    assert len(metrics_of(made)) == 1
    assert len(run(made, world_size=world_size, make_engine=beside)) == 3


class OlderEngine(BesideEngine):
    """Says that its completions are of weights ``age`` pushes older than they are."""

    age = 0

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Sample, and change the version."""

        def older(completion: Completion) -> Completion:
            return replace(completion, policy_version=completion.policy_version - self.age)

        groups = super().generate(requests, sampling)
        if self.inner.policy_version < self.age:
            return groups
        return [
            replace(group, completions=tuple(map(older, group.completions))) for group in groups
        ]


def test_completions_older_than_allowed_are_refused(recipe: Recipes) -> None:
    class Engine(OlderEngine):
        age = 1

    made = recipe(**OVERLAPPED, run__max_steps=4)
    with pytest.raises(EngineError, match="sampled by policy version 0, the trainer is at 1"):
        run(made, make_engine=lambda r, device: Engine(recipe_engine(r, device)))
    # Step 3's rollout, of the first weights in truth of the second, is refused beside step 2.
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
    with pytest.raises(MisalignmentError, match="step 2, old_logprobs"):
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
