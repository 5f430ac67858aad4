"""Run directories with known numbers, written as a run writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moe_replay.grpo.records import (
    CompletionRecord,
    EvalRecord,
    RunEnd,
    RunFailure,
    StepRecord,
    TokenRecord,
)
from moe_replay.report.run_directory import RunDirectory

RECIPE = """
[run]
output_dir = "out"
max_steps = {max_steps}
[model]
path = "checkpoints/tiny"
[rollout]
engine = "embedded"
dtype = "bfloat16"
[replay]
router_replay_mode = "{mode}"
guard = true
"""
HOSTILE = '</script><img src=x onerror="document.title=1">\u202egnp.exe & "quoted"\n'
"""A completion that would leave a script, run one, and reverse what follows it."""
Make = Callable[..., Path]


def step_of(number: int, *, mode: str = "R3", dropped: bool = False) -> StepRecord:
    """Return a step whose numbers follow from its own: the reward is its tenth."""
    metrics = {
        "reward": number / 10,
        "entropy/mean": 1.5,
        "clip_ratio/region_mean": 0.0,
        "rollout_correction/k3_kl": 0.001 * number,
        "rollout_correction/extreme_frac_tau_1.1": 0.02,
        "rollout_correction/extreme_frac_tau_1.5": 0.002,
        "rollout_correction/extreme_frac_tau_2": 0.0,
    }
    details: dict[str, Any] = {}
    if mode == "R3":
        low = 0.6 if dropped else 0.97
        sample = {"sample": 1, "item": 40 + number, "completion": 1, "server": ""}
        metrics |= {
            "replay/coverage": 1.0,
            "replay/agreement": 0.98,
            "replay/agreement_min_sample": low,
            "replay/flip_frac": 0.02,
            "replay/dropped_samples": float(dropped),
            "replay/rows_live_last_token": 4.0,
            "replay/rows_live_padding": 0.0,
        }
        details = {
            "replay/agreement_min_sample": sample,
            "replay/agreement": {
                "percentiles": {"5": low, "25": 0.98, "50": 0.99},
                "lowest": [sample | {"agreement": low}],
            },
            "replay/flip_frac": {"layers": [1, 2], "flip_frac": [0.01 * number, 0.03]},
        }
        if dropped:
            details["replay/dropped_samples"] = [sample]
    return StepRecord(
        step=number, metrics=metrics, details=details, seconds={"rollout": 2.0, "update": 1.0}
    )


def completion_of(step: int, sample: int, *, mode: str, dropped: bool) -> CompletionRecord:
    """Return a completion of three tokens, the second of which the trainer finds half as likely."""
    return CompletionRecord(
        step=step,
        item=40 + step,
        prompt="2 + 2 =",
        columns={},
        completion=HOSTILE,
        rewards={"accuracy": 1.0},
        reward=1.0,
        advantage=0.5,
        num_tokens=3,
        finish_reason="stop",
        policy_version=step - 1,
        sample=sample,
        dropped="misaligned" if dropped else None,
        agreement=None if mode == "disabled" else 0.6 if dropped else 0.97,
        tokens=TokenRecord(
            texts=["</script>", "<b>", "\u202e"],
            rollout_logprobs=[-0.5, -1.0, -2.0],
            old_logprobs=[-0.5, -1.69315, -2.0],
            flips=None if mode == "disabled" else [0, 2, None],
        ),
    )


@pytest.fixture(scope="session")
def make_run() -> Make:
    """Return a function that writes a run directory and returns it."""

    def make(
        folder: Path,
        *,
        steps: int = 3,
        mode: str = "R3",
        dropped_step: int = 0,
        end: RunEnd | None = None,
        failure: RunFailure | None = None,
    ) -> Path:
        run = RunDirectory(folder)
        run.open(recipe_toml=RECIPE.format(max_steps=max(1, steps), mode=mode), last_step=0)
        if steps:
            run.write_evaluation(EvalRecord(step=0, metrics={"eval/reward": 0.25}, seconds=1.0))
        for number in range(1, steps + 1):
            is_dropped = number == dropped_step
            completions = [
                completion_of(number, sample, mode=mode, dropped=is_dropped and sample == 1)
                for sample in range(2)
            ]
            run.write_step(step_of(number, mode=mode, dropped=is_dropped), completions)
        if steps:
            run.write_evaluation(EvalRecord(step=steps, metrics={"eval/reward": 0.5}, seconds=1.0))
        for name, record in (("ended.json", end), ("failed.json", failure)):
            if record is not None:
                (folder / name).write_text(json.dumps(asdict(record)))
        return folder

    return make
