"""A run whose slowest rollout takes longer than a device waits for another goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from moe_replay.engines.types import Engine, Request, RolloutGroup, SamplingParams
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.loop import train
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.ranks import run_ranks

from .test_loop import metrics_of

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]
# So long that only the wait for the slow rank could reach the limit.
LIMIT_S, SLOW_S = 40.0, 45.0


class SlowOnRank1:
    """An engine that takes long over the second rollout, on one rank."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._calls = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        self._calls += 1
        if self._calls == 2 and dist.get_rank() == 1:
            threading.Event().wait(SLOW_S)
        return self._engine.generate(requests, sampling)


def slow_engine(recipe: Recipe, device: torch.device) -> Any:
    # On a CPU the groups that Megatron makes stand for those of devices.
    for group in list(_world.pg_map):
        if group is not dist.group.WORLD:
            _set_pg_timeout(timedelta(seconds=LIMIT_S), group)
    return SlowOnRank1(recipe_engine(recipe, device))


def test_a_device_does_not_wait_for_the_slowest_rollout(recipe: Recipes) -> None:
    """`tests/megatron/ranks/test_waiting.py` shows that it gives up where it has to wait."""
    mine = recipe(
        megatron__expert_model_parallel_size=2, run__max_steps=2, checkpoint__export="false"
    )

    def call() -> None:
        rank = dist.get_rank()
        directory = RunDirectory(mine.run.output_dir)
        with build_reporter(mine, rank=rank, run_directory=directory) as reporter:
            process = ProcessSpec(rank=rank, world_size=2)
            train(mine, process=process, reporter=reporter, make_engine=slow_engine)

    run_ranks(call, 2)
    assert [record["step"] for record in metrics_of(mine)] == [1, 2]
