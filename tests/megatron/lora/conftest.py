"""Checkpoints of two layers, of which the first is dense."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_replay.testing.tiny_models import write_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return family -> checkpoint: grouped queries, a shared expert, latent attention."""
    folder, dense = tmp_path_factory.mktemp("adapted"), {"mlp_only_layers": [0]}
    return {
        family: write_tiny_checkpoint(folder / family, family, num_hidden_layers=2, **own)
        for family, own in (("qwen3_moe", dense), ("qwen2_moe", dense), ("deepseek_v3", {}))
    }
