"""A whole training run goes on in another layout.

(Those that stay in one are in test_whole_runs.py.)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_replay.grpo.loop import train
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = pytest.mark.ranks
# The length of a run may then change without changing its steps.
CONSTANT = {"optimizer__lr_scheduler": "constant"}
# What a sum in another order may move.
CLOSE = ("grad_norm", "entropy/mean", "policy_ratio/mean")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Qwen3-MoE checkpoint of four layers, the first dense."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("four"), mlp_only_layers=[0])


def steps(recipe: Recipe, world_size: int) -> list[dict[str, Any]]:
    """Train in processes of their own and return the lines of metrics.jsonl."""

    def call() -> None:
        rank = torch.distributed.get_rank()
        directory = RunDirectory(recipe.run.output_dir)
        with build_reporter(recipe, rank=rank, run_directory=directory) as reporter:
            process = ProcessSpec(rank=rank, world_size=world_size)
            train(recipe, process=process, reporter=reporter)

    run_ranks(call, world_size)
    lines = (recipe.run.output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[dict[str, Any]]]:
    """Return an empty place for the steps of a single process."""
    return {}


def in_layout(
    recipe: Callable[..., Recipe],
    checkpoint: Path,
    mode: str,
    layout: dict[str, Any],
    folder: str,
    **more: Any,
) -> Recipe:
    keys = {f"megatron__{name}": size for name, size in layout.items()}
    out = Path(str(recipe().run.output_dir)).with_name(folder)
    values = {
        "run__output_dir": out,
        "run__max_steps": 2,
        "model__path": checkpoint,
        "rollout__dtype": "float32",
        "replay__router_replay_mode": mode,
        "batch__global_batch_size": 16,
    }
    return recipe(**{**values, **keys, **more})


def test_a_run_stopped_in_one_layout_goes_on_in_another(
    recipe: Callable[..., Recipe], checkpoint: Path
) -> None:
    def one_step_more(count: int, layout: dict[str, Any], folder: str) -> Recipe:
        return in_layout(recipe, checkpoint, "R3", layout, folder, run__max_steps=count, **CONSTANT)

    whole = steps(one_step_more(2, {}, "whole"), 1)
    steps(one_step_more(1, {"expert_model_parallel_size": 2}, "parts"), 2)
    parts = steps(one_step_more(2, {"pipeline_model_parallel_size": 2}, "parts"), 2)
    assert [record["step"] for record in parts] == [1, 2]
    assert parts[1]["reward"] == whole[1]["reward"]
    assert parts[1]["grad_norm"] == pytest.approx(whole[1]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("mode", ["disabled", "R2", "R3"])
def test_t4_ranks_without_a_prompt_train_along(
    mode: str, recipe: Callable[..., Recipe], checkpoint: Path
) -> None:
    one_prompt = {"batch__global_batch_size": 4, "run__max_steps": 1}
    alone = steps(in_layout(recipe, checkpoint, mode, {}, "one", **one_prompt), 1)
    layout = {"tensor_model_parallel_size": 2}
    shared = steps(in_layout(recipe, checkpoint, mode, layout, "two", **one_prompt), 2)
    assert alone[0].keys() == shared[0].keys()
    for key in ("reward", "completions/mean_length", "completions/clipped_ratio"):
        assert shared[0][key] == alone[0][key], key
    for key in CLOSE:
        assert shared[0][key] == pytest.approx(alone[0][key], rel=1e-4), key


def test_t4_fewer_held_out_prompts_than_ranks_are_evaluated(
    recipe: Callable[..., Recipe], checkpoint: Path, workspace: Path
) -> None:
    settings = {
        "data__eval": workspace / "train.jsonl",
        "data__eval_size": 1,
        "batch__global_batch_size": 8,
        "run__max_steps": 1,
    }
    rewards = []
    for folder, ranks in (("one", 1), ("two", 2)):
        evaluated = in_layout(recipe, checkpoint, "R3", {}, folder, **settings)
        steps(evaluated, ranks)
        lines = (evaluated.run.output_dir / "eval.jsonl").read_text().splitlines()
        first = json.loads(lines[0])
        assert first["eval/num_items"] == 1
        rewards.append(first["eval/reward"])
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize("axis", ["context", "tensor", "pipeline"])
def test_t10_completions_of_one_token_train_in_every_cut(
    axis: str,
    recipe: Callable[..., Recipe],
    checkpoint: Path,
    workspace: Path,
    alone: dict[str, list[dict[str, Any]]],
) -> None:
    # The shortest there are: a rank may hold no row that predicts a sampled token.
    layout = {f"{axis}_{'' if axis == 'context' else 'model_'}parallel_size": 2}
    short = {
        "rollout__max_completion_length": 1,
        "batch__global_batch_size": 8,
        "run__max_steps": 1,
        "batch__max_tokens_per_microbatch": 33,
        "rewards": f"[{{function = '{workspace}/reward.py:likes_low_ids'}}]",
    }
    if "short" not in alone:
        alone["short"] = steps(in_layout(recipe, checkpoint, "R3", {}, "one", **short), 1)
    shared = steps(in_layout(recipe, checkpoint, "R3", layout, "two", **short), 2)
    assert shared[0]["completions/max_length"] == 1
    assert shared[0]["grad_norm"] > 0
    for key in CLOSE:
        assert shared[0][key] == pytest.approx(alone["short"][0][key], rel=1e-4), key


@pytest.mark.parametrize("chunks", [1, 2])
def test_t10_completions_that_all_fit_one_microbatch_train_in_a_pipeline(
    chunks: int,
    recipe: Callable[..., Recipe],
    checkpoint: Path,
    alone: dict[str, list[dict[str, Any]]],
) -> None:
    # A single round: over gloo the interleaved schedule waited there for ever.
    roomy = {
        "batch__global_batch_size": 8,
        "batch__max_tokens_per_microbatch": 4000,
        "run__max_steps": 1,
    }
    if "roomy" not in alone:
        alone["roomy"] = steps(in_layout(recipe, checkpoint, "R3", {}, "one", **roomy), 1)
    layout = {"pipeline_model_parallel_size": 2}
    if chunks > 1:
        layout["virtual_pipeline_model_parallel_size"] = chunks
    shared = steps(in_layout(recipe, checkpoint, "R3", layout, "two", **roomy), 2)
    for key in CLOSE:
        assert shared[0][key] == pytest.approx(alone["roomy"][0][key], rel=1e-4), key
