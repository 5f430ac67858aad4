"""`moe-replay`, whose embedded engine rounds its weights to float8: an engine with a large gap.

As fp8 rollouts do: matrices of attention and experts are rounded to E4M3 with a scale a row;
router, embedding, norms and output layer stay. It computes in `rollout.dtype` with what it rounded.

    python experiments/float8_engine.py train recipes/demo/recipe.toml
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from moe_replay.cli.main import main
from moe_replay.engines.embedded import entry
from moe_replay.engines.embedded.engine import EmbeddedEngine

LARGEST_E4M3 = 448.0
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.")


def rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a weight as an engine in float8 would hold it."""
    if tensor.ndim < 2 or any(part in name for part in KEPT):
        return tensor
    scale = tensor.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST_E4M3
    return ((tensor / scale).to(torch.float8_e4m3fn).float() * scale).to(tensor.dtype)


class Float8Engine(EmbeddedEngine):
    """The embedded engine, with weights that went through float8."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for name, view in self._views.items():
            view.copy_(rounded(name, view))

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int
    ) -> None:
        """Round each weight of a push while it streams by."""
        seen: Iterator[tuple[str, torch.Tensor]] = (
            (name, rounded(name, tensor)) for name, tensor in weights
        )
        super().load_weights(seen, policy_version=policy_version)


if __name__ == "__main__":
    entry.EmbeddedEngine = Float8Engine
    sys.exit(main())
