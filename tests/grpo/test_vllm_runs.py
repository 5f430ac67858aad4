"""Whole training runs with vLLM in the trainer's process, and with servers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.grpo.loop import train
from moe_replay.grpo.records import RunSummary, StepRecord
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.ranks import run_ranks

from ..support.served import served
from .test_loop import run

pytestmark = [pytest.mark.ranks, pytest.mark.vllm, pytest.mark.usefixtures("vllm_imported")]
Recipes = Callable[..., Recipe]


@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor:FutureWarning")  # vLLM's own call
@pytest.mark.parametrize(("world_size", "shards"), [(2, 1), (2, 2)])
def test_r3_with_vllm_and_equal_numerics_has_no_engine_gap(
    world_size: int, shards: int, recipe: Recipes
) -> None:
    records = run(
        recipe(
            rollout__engine="vllm",
            rollout__dtype="float32",
            rollout__kv_cache_gib=0.05,
            rollout__tensor_parallel_size=shards,
        ),
        world_size=world_size,
    )
    for record in records:
        assert record["replay/agreement"] == 1.0
        assert record["replay/coverage"] == 1.0
        assert record["rollout_correction/k3_kl"] < 1e-9
        assert abs(record["rollout_correction/ratio_mean"] - 1) < 1e-5


@pytest.mark.parametrize(("gib", "is_short"), [(0.01, False), (0.002, True)])
def test_e15_a_run_says_how_many_sequences_fit_and_warns_when_too_few_do(
    gib: float, is_short: bool, recipe: Recipes
) -> None:
    made = recipe(rollout__engine="vllm", rollout__kv_cache_gib=gib, run__max_steps=1)
    said: list[str] = []

    def call() -> tuple[list[str], tuple[str, ...]]:
        with build_reporter(
            made, rank=0, run_directory=RunDirectory(made.run.output_dir)
        ) as reporter:
            warned: list[str] = []
            start, step = reporter.start, reporter.step

            def started(summary: RunSummary) -> None:
                said.extend(summary.sections["Engine"])
                start(summary)

            def stepped(record: StepRecord, completions: Any) -> None:
                warned.extend(record.warnings)
                step(record, completions)

            reporter.start, reporter.step = started, stepped
            train(made, process=ProcessSpec(rank=0, world_size=1), reporter=reporter, restart=True)
        return said, tuple(warned)

    ((lines, warnings),) = run_ranks(call, 1)
    length, batch = made.max_sequence_length, made.rollout.max_batch_size
    (line,) = (line for line in lines if "fit in vLLM's key-value cache" in line)
    assert f"sequences of {length} tokens" in line and f"{batch} are sampled at once" in line
    assert (int(line.split()[0]) < batch) == is_short
    assert any("fewer than the" in warning for warning in warnings) == is_short


def test_r3_over_servers_with_equal_numerics_has_no_engine_gap(
    recipe: Recipes, workspace: Path
) -> None:
    with ExitStack() as opened:
        urls = [
            opened.enter_context(served(EmbeddedEngine(workspace / "model", dtype="float32")))
            for _ in range(2)
        ]
        keys = {
            "rollout__engine": "vllm-server",
            "rollout__urls": str(urls).replace("'", '"'),
            "rollout__dtype": "float32",
        }
        records = run(recipe(**keys), world_size=2)
        again = run(recipe(**keys), world_size=2, restart=True)
    for record in records:
        assert record["replay/agreement"] == 1.0
        assert record["replay/coverage"] == 1.0
        assert record["rollout_correction/k3_kl"] < 1e-9
    assert {v for k, v in records[-1].items() if k.startswith("rollout/faults_")} == {0.0}
    # The second run found the weights of the first in the servers, and put the checkpoint's back.
    assert [r["reward"] for r in again] == [r["reward"] for r in records]


def test_vllm_gives_the_run_that_the_embedded_engine_gives(recipe: Recipes) -> None:
    keys = {"rollout__dtype": "float32", "run__max_steps": 2}
    ours = run(recipe(rollout__engine="vllm", rollout__kv_cache_gib=0.05, **keys), restart=True)
    theirs = run(recipe(**keys), restart=True)
    assert [r["reward"] for r in ours] == [r["reward"] for r in theirs]
    assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], abs=1e-5)
