"""Stacked experts of a checkpoint come out stacked, and broken numbers do not go in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_replay.errors import CheckpointError
from moe_replay.megatron.layout import ParallelLayout, initialize
from moe_replay.megatron.model import build_model, read_model_shape, transformer_config
from moe_replay.megatron.weights import load_hf_weights, save_hf_checkpoint
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

LAYOUT = ParallelLayout(expert_model_parallel_size=2)


def loaded(checkpoint: Path) -> Any:
    initialize(LAYOUT)
    shape = read_model_shape(checkpoint)
    chunks = build_model(shape, transformer_config(shape, LAYOUT))
    load_hf_weights(chunks, checkpoint)
    return chunks


def load_and_save(checkpoint: Path, output: Path) -> None:
    save_hf_checkpoint(loaded(checkpoint), checkpoint, output)


@pytest.mark.ranks
def test_t20_an_export_stacks_experts_as_the_checkpoint_did(tmp_path):
    """In a layout where each rank holds half of the experts."""
    plain = write_tiny_checkpoint(tmp_path / "plain", num_hidden_layers=2)
    stacked = shutil.copytree(
        plain, tmp_path / "stacked", ignore=shutil.ignore_patterns("*.safetensors")
    )
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model.save_pretrained(stacked, save_original_format=False)
    run_ranks(load_and_save, 2, stacked, tmp_path / "out")
    written, expected = (
        load_file(path / "model.safetensors") for path in (tmp_path / "out", stacked)
    )
    assert "model.layers.0.mlp.experts.gate_up_proj" in written
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def refusal_of(checkpoint: Path) -> str:
    try:
        loaded(checkpoint)
    except CheckpointError as error:
        return str(error)
    return "loaded"


@pytest.mark.ranks
def test_r6_a_weight_that_is_not_finite_stops_every_rank_by_name(tmp_path):
    """Only the second rank holds the expert, and the first says the same."""
    path = write_tiny_checkpoint(tmp_path, num_hidden_layers=1)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.experts.15.down_proj.weight"][0, 0] = torch.inf
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for said in run_ranks(refusal_of, 2, path):
        assert "experts.15.down_proj.weight of the checkpoint holds 1 values" in said
