"""Tiny models of every family that replay knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_replay.testing.tiny_models import FAMILIES, write_tiny_checkpoint


@pytest.fixture(scope="session")
def family_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a checkpoint of 2 MoE layers for each family."""
    root = tmp_path_factory.mktemp("families")
    sizes: dict[str, Any] = {"num_hidden_layers": 2}
    return {
        family: write_tiny_checkpoint(root / family, family, **sizes, **all_sparse(family))
        for family in FAMILIES
    }


def all_sparse(family: str) -> dict[str, Any]:
    """Return the override that leaves a family without dense layers."""
    if family == "glm4_moe_lite":
        return {"mlp_layer_types": ["sparse", "sparse"]}
    if family == "ernie4_5_moe":
        return {"moe_layer_start_index": 0}
    dense_first = family in ("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1")
    return {"first_k_dense_replace": 0} if dense_first else {}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, family_dirs: dict[str, Path]) -> Any:
    """Return a model of each family in turn, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(family_dirs[request.param], dtype=torch.float32)


@pytest.fixture
def qwen(family_dirs: dict[str, Path]) -> Any:
    """Return the Qwen3-MoE model, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(family_dirs["qwen3_moe"], dtype=torch.float32)


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Return two sequences of seven tokens."""
    return torch.randint(4, 99, (2, 7), generator=torch.Generator().manual_seed(0))
