"""One policy on the GPU for these tests: Megatron's groups and CUDA live in the test process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_replay.megatron.actor import MegatronActor
from moe_replay.testing.policies import start_policy
from moe_replay.testing.tiny_models import write_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Qwen3-MoE checkpoint in bfloat16, wide enough for every GPU kernel."""
    return write_tiny_checkpoint(
        tmp_path_factory.mktemp("gpu"),
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        moe_intermediate_size=128,
        num_experts=32,
        initializer_range=0.05,
        dtype=torch.bfloat16,
    )


@pytest.fixture(scope="session")
def actor(checkpoint: Path) -> MegatronActor:
    """Return the policy in bfloat16 with float32 main weights."""
    return start_policy(checkpoint, dtype=torch.bfloat16)
