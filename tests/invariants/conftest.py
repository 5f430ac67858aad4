"""Checkpoints of eight layers, so that every layout has something to deal out."""

from __future__ import annotations

from pathlib import Path

import pytest

import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports
from moe_replay.testing.tiny_models import write_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Qwen3-MoE checkpoint: 8 layers, the first dense, top-4 of 16 experts."""
    return write_tiny_checkpoint(
        tmp_path_factory.mktemp("eight"), num_hidden_layers=8, mlp_only_layers=[0]
    )


@pytest.fixture(scope="session")
def latent_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random DeepSeek-V3 checkpoint: 4 layers, the first dense, biased sigmoid groups."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("latent"), "deepseek_v3")
