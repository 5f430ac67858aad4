"""An engine that samples beside the trainer, and what runs with it leave behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import torch

from moe_replay.engines.types import Engine, Request, RolloutGroup, SamplingParams
from moe_replay.grpo.engines import recipe_engine
from moe_replay.recipe.recipe import Recipe

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
