"""A divergence from the reference model that is taken off rewards, and routers that stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moe_replay.recipe.recipe import Recipe

from .test_documented import undocumented
from .test_loop import run

KEYS = {
    "grpo__beta": 0.05,
    "grpo__kl_in_reward": "true",
    "grpo__scale_rewards": "none",
    "grpo__loss_type": "cispo",
    "grpo__epsilon_high": 5.0,
    "optimizer__weight_decay": 0.1,
    "megatron__freeze_moe_router": "true",
    "run__max_steps": 2,
}


@pytest.mark.ranks
def test_rewards_are_less_their_divergence_and_frozen_routers_are_exported_unchanged(
    recipe: Callable[..., Recipe], workspace: Path
) -> None:
    loaded = recipe(**KEYS)
    first, second = run(loaded, world_size=2)
    # The reference is the policy before its first step; both have the routes of the engine.
    assert abs(first["kl_in_reward/mean"]) < 1e-4
    assert second["kl_in_reward/mean"] > 1e-3
    assert "kl" not in second
    assert undocumented(second) == set()
    before = load_file(workspace / "model" / "model.safetensors")
    after = load_file(loaded.run.output_dir / "export" / "model.safetensors")
    routers = {name for name in before if name.endswith("mlp.gate.weight")}
    assert len(routers) == 3
    same = {name for name in before if torch.equal(before[name], after[name])}
    # Everything else has moved.
    assert same == routers
    for step, is_shifted in ((1, False), (2, True)):
        lines = (loaded.run.output_dir / "completions.jsonl").read_text().splitlines()
        told = [r for r in map(json.loads, lines) if r["step"] == step]
        by_prompt: dict[str, list[dict]] = {}
        for record in told:
            by_prompt.setdefault(str(record["prompt"]), []).append(record)
        for group in by_prompt.values():
            assert len(group) == 4
            rewards = np.array([record["reward"] for record in group])
            advantages = np.array([record["advantage"] for record in group])
            assert advantages.sum() == pytest.approx(0, abs=1e-6)
            shift = advantages - (rewards - rewards.mean())
            assert (np.abs(shift).max() > 1e-4) == is_shifted, (step, shift)
