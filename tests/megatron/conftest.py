"""The tiny checkpoint of this folder's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

# Imported before the tests do: it silences Megatron-Core's own imports.
import moe_replay.megatron  # noqa: F401
from moe_replay.testing.tiny_models import write_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Qwen3-MoE checkpoint: 4 layers, top-4 of 16 experts."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
