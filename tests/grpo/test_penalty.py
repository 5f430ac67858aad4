"""A divergence from the reference model that is taken off rewards, and routers that stay."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moe_replay.grpo.penalty import penalize
from moe_replay.grpo.rounds import Rounds
from moe_replay.recipe.recipe import Recipe

from .test_documented import undocumented
from .test_loop import run
from .test_rounds import a_round

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


@pytest.mark.parametrize(
    ("dropped", "advantages", "counts"),
    [
        # 1 - 0.3 and 0 + 0.1; 2 - 0 and 2 - 1.
        ({}, [[0.3, -0.3], [0.5, -0.5]], [[True, True], [True, True]]),
        # The last one has log-probabilities of wrong routes; it leaves the other alone.
        ({3: "misaligned"}, [[0.3, -0.3], [0.0, 0.0]], [[True, True], [True, False]]),
    ],
)
def test_what_is_compared_is_the_reward_less_beta_times_the_sum_over_tokens(
    recipe: Callable[..., Recipe],
    dropped: dict[int, str],
    advantages: list[list[float]],
    counts: list[list[bool]],
) -> None:
    loaded = recipe(
        grpo__beta=0.1,
        grpo__kl_in_reward="true",
        grpo__scale_rewards="none",
        rollout__num_generations=2,
        batch__global_batch_size=4,
    )
    rounds = Rounds(loaded)
    rounds.add(a_round(0, [(1, 0), (2, 2)], own=(0, 1)))
    # Sums of old minus reference log-probability, in the order of the step: 3, -1, 0, 10.
    # Sample 0 here is the last of them.
    old = [[-1.0, -1.0], [-0.5], [-2.0], [-1.0, -2.0]]
    reference = [[-6.0, -6.0], [-0.5], [-1.0], [-3.0, -3.0]]
    indices = [3, 2, 1, 0]

    def scored(logprobs: list[list[float]]) -> dict[int, Any]:
        return {
            n: SimpleNamespace(token_logprobs=np.array(v, dtype=np.float32))
            for n, v in enumerate(logprobs)
        }

    given: dict[int, float] = {}
    batch = SimpleNamespace(
        origins=[SimpleNamespace(index=index) for index in indices],
        samples=[SimpleNamespace(sample_id=n, reported_here=True) for n in range(4)],
        with_advantages=given.update,
    )

    @dataclass
    class Old:
        batch: Any
        scored: Any
        metrics: Any
        judged: Any

    @dataclass
    class Before:
        advantages: Any
        counts: Any

    run_ = SimpleNamespace(recipe=loaded, ranks=SimpleNamespace(gather=lambda part: [part]))
    found = Old(batch, scored(old), {}, SimpleNamespace(dropped=dropped))
    penalized = inspect.unwrap(penalize)
    after, compared = penalized(run_, rounds, Before(None, None), found, scored(reference))
    assert compared.advantages == pytest.approx(np.array(advantages))
    assert compared.counts.tolist() == counts
    # Each sample's own, by its index in the step.
    assert given == pytest.approx(
        {n: np.ravel(advantages)[index] for n, index in enumerate(indices)}
    )
    assert after.metrics["kl_in_reward/mean"] == pytest.approx(3.0)
