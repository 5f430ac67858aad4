"""Attention with sinks keeps its weights on local layers; a plan on GPUs says what it assumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_replay.megatron.model import read_model_shape
from moe_replay.plan.machine import read_machine
from moe_replay.plan.plan import make_plan
from moe_replay.plan.trainer.activations import layer_bytes
from moe_replay.plan.trainer.kernels import CPU, GPU
from moe_replay.plan.trainer.settings import AdamStorage, Settings
from moe_replay.recipe.sections.training import MegatronSection

MIB = 2**20
GPT_OSS = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 512,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 4096,
    "vocab_size": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "swiglu_limit": 7.0,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))
    return tmp_path


def core(model: Path, kernels, *, dtype_bytes: int) -> float:
    settings = Settings(
        num_ranks=1,
        megatron=MegatronSection(),
        dtype_bytes=dtype_bytes,
        adam=AdamStorage(dtype_bytes=dtype_bytes),
        max_tokens=1024,
        max_sequence_length=1024,
        num_microbatches=1,
        chunk_rows=256,
    )
    return layer_bytes(read_model_shape(model), settings, kernels, is_moe=True).core


def test_local_attention_with_sinks_keeps_heads_times_rows_squared(model):
    """8 heads, 1,024 rows: 32 MiB of float32, 1 MiB of mask, 2 MiB each of keys and values.

    Measured with saved tensors: 39.0 MiB, of which 2.0 are the queries.
    """
    assert core(model, CPU, dtype_bytes=4) == pytest.approx(37 * MIB, rel=0.01)
    # bfloat16: the softmax in float32 and its copy, 16 MiB.
    assert core(model, CPU, dtype_bytes=2) == pytest.approx(51 * MIB, rel=0.01)
    # The control: a fused kernel keeps 4 bytes a row and head.
    assert core(model, GPU, dtype_bytes=2) == 8 * 1024 * 4


def test_a_plan_on_gpus_says_that_the_attention_of_gpt_oss_is_an_assumption(model, recipe):
    changed = recipe(model={"path": str(model)})
    said = make_plan(changed, read_machine(["gpus=8x80GB"])).assumptions()
    assert "keeps no weights" in said["sinks"]
    plain = make_plan(recipe(), read_machine(["gpus=8x80GB"])).assumptions()
    assert "sinks" not in plain
