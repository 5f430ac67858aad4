"""Runs whose rollouts overlap, stopped, failed and resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_replay.engines.types import Completion, Request, RolloutGroup, SamplingParams
from moe_replay.errors import EngineError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.loop import train
from moe_replay.grpo.stopping import StopRequest
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.ranks import run_ranks

from .overlap_case import OVERLAPPED, BesideEngine, beside
from .test_loop import metrics_of, run

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]


def stopped_in(
    recipe: Recipe, station: tuple[int, str], world_size: int, make_engine: Any = beside
) -> int:
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
                recipe, process=process, reporter=reporter, make_engine=make_engine, stop=stop
            ).step

    steps = set(run_ranks(call, world_size))
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
