"""The Megatron model computes what transformers computes, in every layout, packed or not."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import AutoModelForCausalLM

from moe_replay.errors import RecipeError, UnsupportedError
from moe_replay.megatron.chunks import moe_layers
from moe_replay.megatron.layout import ParallelLayout, initialize
from moe_replay.megatron.model import build_model, read_model_shape, transformer_config
from moe_replay.megatron.upstream.attention import zigzag_positions
from moe_replay.megatron.weights import export_hf_weights, load_hf_weights
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

# Multiples of 4: a zigzag split over 2 ranks needs no padding.
LENGTHS = (16, 8, 12, 4)
ONE = ParallelLayout()
TP2 = ParallelLayout(tensor_model_parallel_size=2)
EP2 = ParallelLayout(expert_model_parallel_size=2)
TP2_EP2_ETP2 = ParallelLayout(tensor_model_parallel_size=2, expert_model_parallel_size=2)
PP2 = ParallelLayout(pipeline_model_parallel_size=2)
PP2_VPP2 = ParallelLayout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
CP2 = ParallelLayout(context_parallel_size=2)
LAYOUTS = {
    "one": (ONE, 1),
    "tp2": (TP2, 2),
    "ep2": (EP2, 2),
    "tp2_ep2_etp2": (TP2_EP2_ETP2, 4),
    "pp2_vpp2": (PP2_VPP2, 2),
    "cp2": (CP2, 2),
}
# Every layout is compared with a single process in tests/invariants; here one of each kind, packed
# or not.
CASES = [
    *((name, False, False) for name in ("one", "tp2", "pp2_vpp2", "cp2")),
    *((name, True, False) for name in ("one", "tp2_ep2_etp2")),
    *((name, True, True) for name in ("one", "ep2")),
]


def sequences() -> list[torch.Tensor]:
    """Return token ids with one more id than positions: inputs and labels overlap."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 100, (n + 1,), generator=generator) for n in LENGTHS]


@cache
def reference(checkpoint: Path) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return transformers' log-probabilities, and gradients of their negated mean by name."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    logprobs = []
    for tokens in sequences():
        logits = model(tokens[None, :-1]).logits[0]
        logprobs.append(logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0])
    (-torch.cat(logprobs).mean()).backward()
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if not name.endswith(("gate_up_proj", "down_proj")):
            gradients[name] = parameter.grad
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, gradient in enumerate(parameter.grad):
            names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for part, value in zip(names, gradient.chunk(len(names)), strict=True):
                gradients[f"{prefix}.{expert}.{part}.weight"] = value
    return [x.detach() for x in logprobs], gradients


def microbatches(packed: bool) -> list[tuple[list[int], dict[str, Any]]]:
    """Return this rank's microbatches with the numbers of their sequences."""
    rank, size = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    mine = torch.arange(len(LENGTHS)).chunk(size)[rank].tolist()
    groups = [mine] if packed else [[i] for i in mine]
    return [(group, microbatch([sequences()[i] for i in group], packed)) for group in groups]


def held_positions(length: int) -> torch.Tensor:
    """Return the positions of a sequence that this context-parallel rank holds."""
    size = parallel_state.get_context_parallel_world_size()
    rank = parallel_state.get_context_parallel_rank()
    return zigzag_positions(length, rank, size) if size > 1 else torch.arange(length)


def microbatch(tokens: list[torch.Tensor], packed: bool) -> dict[str, Any]:
    held = [held_positions(len(t) - 1) for t in tokens]
    inputs = torch.cat([t[:-1][p] for t, p in zip(tokens, held, strict=True)])[None]
    labels = torch.cat([t[1:][p] for t, p in zip(tokens, held, strict=True)])[None]
    ends = torch.tensor([0] + [len(t) - 1 for t in tokens]).cumsum(0).to(torch.int32)
    longest = max(len(t) - 1 for t in tokens)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return {
        "inputs": inputs,
        "labels": labels,
        "positions": torch.cat(held)[None],
        "packed": params if packed else None,
    }


def train_step(
    checkpoint: Path, layout: ParallelLayout, packed: bool, grouped: bool, **overrides: Any
) -> Any:
    """Do one forward and backward on this rank; return its log-probabilities and all gradients."""
    initialize(layout)
    shape = read_model_shape(checkpoint)
    config = transformer_config(shape, layout, overrides=overrides)
    config.finalize_model_grads_func = finalize_model_grads
    chunks = build_model(shape, config, grouped_experts=grouped)
    load_hf_weights(chunks, checkpoint)
    ddp = [
        DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), c)
        for c in chunks
    ]
    batches = microbatches(packed)

    def forward_step(iterator: Any, model: Any) -> Any:
        group, batch = next(iterator)
        loss = model(
            batch["inputs"],
            batch["positions"],
            None,
            labels=batch["labels"],
            packed_seq_params=batch["packed"],
        )

        def total(loss: torch.Tensor) -> Any:
            count = torch.tensor(loss.numel(), dtype=torch.int)
            return loss.sum(), count, {"group": group, "logprobs": -loss.detach()[0]}

        return loss, total

    for chunk in ddp:
        chunk.zero_grad_buffer()
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in ddp] if len(ddp) > 1 else iter(batches),
        model=ddp if len(ddp) > 1 else ddp[0],
        num_microbatches=len(batches),
        seq_length=max(LENGTHS),
        micro_batch_size=1,
        forward_only=False,
    )
    rows = []
    for result in results:
        held = [held_positions(LENGTHS[i]) for i in result["group"]]
        parts = result["logprobs"].split([len(p) for p in held])
        rows += list(zip(result["group"], held, parts, strict=True))
    gradients = dict(export_hf_weights(chunks, read=lambda p: p.main_grad))
    return rows, gradients if dist.get_rank() == 0 else None


@cache
def outcome(checkpoint: Path, name: str, packed: bool, grouped: bool) -> Any:
    """Return [sequences of log-probabilities], gradients of one training step in a layout."""
    layout, world_size = LAYOUTS[name]
    ranks = run_ranks(train_step, world_size, checkpoint, layout, packed, grouped)
    logprobs = [torch.full((n,), torch.nan) for n in LENGTHS]
    for rows, _ in ranks:
        for sequence, positions, values in rows:
            logprobs[sequence][positions] = values
    return logprobs, ranks[0][1]


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "packed", "grouped"), CASES)
def test_logprobs_equal_transformers(checkpoint, name, packed, grouped):
    logprobs, _ = outcome(checkpoint, name, packed, grouped)
    expected, _ = reference(checkpoint)
    assert (torch.cat(logprobs) - torch.cat(expected)).abs().max() < 2e-5


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "packed", "grouped"), CASES)
def test_gradients_equal_transformers(checkpoint, name, packed, grouped):
    _, gradients = outcome(checkpoint, name, packed, grouped)
    assert_gradients_equal(gradients, reference(checkpoint)[1])


def assert_gradients_equal(
    gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    assert gradients.keys() == expected.keys()
    errors = {
        key: float((gradients[key] - value).norm() / (value.norm() + 1e-6))
        for key, value in expected.items()
    }
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] < 2e-5, worst


@pytest.mark.parametrize("module", ["layernorm", "moe"])
def test_gradients_survive_selective_recompute(checkpoint, module):
    overrides = {"recompute_granularity": "selective", "recompute_modules": [module]}
    ((_, gradients),) = run_ranks(lambda: train_step(checkpoint, ONE, True, False, **overrides), 1)
    assert_gradients_equal(gradients, reference(checkpoint)[1])


def router_layers(checkpoint: Path, layout: ParallelLayout) -> list[int]:
    initialize(layout)
    shape = read_model_shape(checkpoint)
    routers = moe_layers(build_model(shape, transformer_config(shape, layout)))
    assert all(router.layer_number == layer + 1 for layer, router in routers.items())
    return list(routers)


@pytest.mark.ranks
def test_moe_layers_are_global_under_interleaved_pipelining(checkpoint):
    assert run_ranks(router_layers, 2, checkpoint, PP2_VPP2) == [[0, 2], [1, 3]]


@pytest.mark.ranks
def test_moe_layers_leave_out_dense_layers(tmp_path):
    path = write_tiny_checkpoint(tmp_path, mlp_only_layers=[0, 1])
    assert run_ranks(router_layers, 2, path, PP2) == [[], [2, 3]]


def test_num_moe_layers_counts_sparse_layers_only(tmp_path):
    path = write_tiny_checkpoint(tmp_path, mlp_only_layers=[1], decoder_sparse_step=2)
    assert read_model_shape(path).moe_layers == (3,)
    assert read_model_shape(path).num_moe_layers == 1


def unloaded_parameters(checkpoint: Path) -> bool:
    initialize(ONE)
    shape = read_model_shape(checkpoint)
    (chunk,) = build_model(shape, transformer_config(shape, ONE))
    return all(bool(p.isnan().all()) for p in chunk.parameters())


def test_build_model_leaves_nan_until_loaded(checkpoint):
    assert run_ranks(unloaded_parameters, 1, checkpoint) == [True]


def test_transformer_config_refuses_megatrons_own_replay(checkpoint):
    with pytest.raises(UnsupportedError, match="moe_enable_routing_replay"):
        transformer_config(
            read_model_shape(checkpoint), ONE, overrides={"moe_enable_routing_replay": True}
        )


@pytest.mark.parametrize(
    ("layout", "what"),
    [
        (ParallelLayout(tensor_model_parallel_size=8), "num_attention_heads = 4"),
        (ParallelLayout(expert_model_parallel_size=3), "num_experts = 16"),
    ],
)
def test_transformer_config_refuses_a_layout_that_cuts_unevenly(checkpoint, layout, what):
    with pytest.raises(UnsupportedError, match=what):
        transformer_config(read_model_shape(checkpoint), layout)


@pytest.mark.ranks
def test_initialize_refuses_a_world_that_does_not_hold_the_layout():
    with pytest.raises(UnsupportedError, match="2 ranks do not divide into copies of 4"):
        run_ranks(initialize, 2, ParallelLayout(expert_model_parallel_size=4))


def test_read_model_shape_refuses_scaled_rotary_embeddings(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    path = write_tiny_checkpoint(tmp_path, rope_parameters=rope)
    with pytest.raises(UnsupportedError, match="rope_parameters"):
        read_model_shape(path)


def test_read_model_shape_names_an_empty_directory(tmp_path):
    with pytest.raises(RecipeError, match=r"no config\.json"):
        read_model_shape(tmp_path)


def test_all_heads_norm_refuses_ranks_that_would_share_a_key_head(tmp_path):
    shape = read_model_shape(write_tiny_checkpoint(tmp_path, "olmoe", num_key_value_heads=1))
    with pytest.raises(UnsupportedError, match="of 1 key heads ranks of tensor parallelism 2"):
        transformer_config(shape, TP2)
