"""Whole runs that train adapters: resumed exactly, exported, with the frozen model as reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_replay.grpo.loop import train
from moe_replay.grpo.start.preflight import Preflight, ask_layout
from moe_replay.megatron.model import read_model_shape
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.ranks import run_ranks

pytestmark = pytest.mark.ranks
ADAPTERS = {
    "lora__rank": 4,
    "lora__alpha": 16.0,
    "grpo__beta": 0.05,
    "optimizer__lr": 1e-2,
    "optimizer__lr_scheduler": "constant",
    "rollout__dtype": "float32",
    "run__max_steps": 2,
}


def steps(recipe: Recipe, world_size: int = 1) -> list[dict[str, Any]]:
    """Train in processes of their own and return the lines of metrics.jsonl."""

    def call() -> None:
        rank = torch.distributed.get_rank()
        directory = RunDirectory(recipe.run.output_dir)
        with build_reporter(recipe, rank=rank, run_directory=directory) as reporter:
            train(recipe, process=ProcessSpec(rank=rank, world_size=world_size), reporter=reporter)

    run_ranks(call, world_size)
    lines = (recipe.run.output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


NAMES = ("reward", "grad_norm", "kl", "sync/lora_changed_frac", "entropy/mean")


def test_a_resumed_run_of_adapters_ends_as_an_uninterrupted_one(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    whole = steps(recipe(**ADAPTERS))
    parts = ADAPTERS | {"run__output_dir": str(tmp_path / "parts")}
    steps(recipe(**parts | {"run__max_steps": 1}))
    resumed = steps(recipe(**parts))
    for expected, found in zip(whole, resumed, strict=True):
        assert [found[name] for name in NAMES] == [expected[name] for name in NAMES]
    # Until something is learned the policy is its own reference, to the last bit.
    assert whole[0]["kl"] == 0 < whole[1]["kl"]
    # The engine has what the adapters add: it agrees with the trainer after a push.
    assert whole[1]["rollout_correction/k3_kl"] < 1e-9
    assert 0.1 < whole[1]["sync/lora_changed_frac"] <= 1
    one, other = (
        load_file(tmp_path / folder / "export" / "adapter_model.safetensors")
        for folder in ("out", "parts")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    learned = "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight"
    assert tuple(one[learned].shape) == (32, 4)
    assert one[learned].abs().max() > 0


def test_recorded_routes_train_adapters_over_two_ranks_and_export_a_merged_model(
    recipe: Callable[..., Recipe], workspace: Path, tmp_path: Path
) -> None:
    started = recipe(
        **ADAPTERS,
        replay__router_replay_mode="R2",
        lora__target_modules='["q_proj", "down_proj"]',
        lora__export="merged",
        megatron__expert_model_parallel_size=2,
    )
    found = steps(started, 2)
    assert found[1]["replay/coverage"] == 1
    assert found[1]["rollout_correction/k3_kl"] < 1e-9
    base = load_file(workspace / "model" / "model.safetensors")
    merged = load_file(tmp_path / "out" / "export" / "model.safetensors")
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    # An expert that no token went through has learned nothing.
    assert {name for name in base if "q_proj" in name} < changed
    assert all("q_proj" in name or ("experts" in name and "down_proj" in name) for name in changed)


def test_an_export_that_peft_cannot_use_is_refused_before_a_run_begins(
    recipe: Callable[..., Recipe],
) -> None:
    halves = {"lora__rank": 4, "lora__target_modules": '["gate_proj", "up_proj"]'}

    def refused(**keys: Any) -> str:
        started = recipe(**halves, **keys)
        found = Preflight(started, ProcessSpec(), elsewhere=False)
        ask_layout(found, read_model_shape(started.model.path))
        return "\n".join(map(str, found.problems))

    said = "lora.export = 'adapter' with lora.target_modules that have gate_proj and up_proj"
    assert refused().startswith(said)
    only_later = {"checkpoint__export": "false", "checkpoint__export_every_save": "true"}
    assert refused(**only_later).startswith(said)
    assert refused(lora__export="merged") == refused(checkpoint__export="false") == ""
