"""Frozen experts of grouped products lie in one tensor a layer, which nothing copies."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.upstream.layers import GroupedExperts
from moe_replay.megatron.weights import load_hf_weights
from moe_replay.routing import Routing
from moe_replay.testing.policies import mean_loss, start_policy
from moe_replay.testing.ranks import run_ranks

from .adapter_cases import LORA, logprobs, share

pytestmark = pytest.mark.ranks
MICROBATCHES = 2
IN_EXPERTS = 16 * 3 * 64 * 32
"""Numbers in the experts of the one layer that has some."""


def stacks_bytes(actor: MegatronActor) -> int:
    """Return the bytes of stacked experts that forwards keep beside the model's own memory."""
    held = {p.untyped_storage().data_ptr() for m in actor.modules for p in m.parameters()}
    # The storages themselves: the address of a freed one is used again.
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_stack = tensor.ndim == 3 and tensor.shape[0] == 16 and min(tensor.shape) > 4
        if is_stack and storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        actor.update(share(actor), mean_loss, temperature=1.0, routing=Routing.LIVE)
    return sum(storage.nbytes() for storage in kept.values())


def experts_of(actor: MegatronActor) -> Any:
    (experts,) = (m for m in unwrap(actor.modules[0]).modules() if isinstance(m, GroupedExperts))
    return experts


def held_apart(checkpoint: Path) -> int:
    """Return what is kept where experts are copied in every forward, as those that learn are."""
    actor = start_policy(checkpoint, lora=LORA, grouped_experts=True)
    experts_of(actor)._joined.clear()
    return stacks_bytes(actor)


@cache
def facts(checkpoint: Path) -> dict[str, Any]:
    """Return what a policy with joined experts shows, from a process of its own."""
    (found,) = run_ranks(_facts, 1, checkpoint)
    return found


def _facts(checkpoint: Path) -> dict[str, Any]:
    actor = start_policy(checkpoint, lora=LORA, grouped_experts=True, gives_back="weights")
    experts = experts_of(actor)
    found: dict[str, Any] = {"kept": stacks_bytes(actor)}
    microbatches = share(actor)
    before = logprobs(actor, microbatches)
    weights = dict(actor.weights.tensors())
    state = {**experts.state_dict(), **experts.sharded_state_dict()}
    found["names"] = {name for name in experts.state_dict() if "adapters" not in name}
    found["shapes"] = {
        name.rpartition("local_experts.")[2]: tuple(getattr(value, "data", value).shape)
        for name, value in state.items()
        if name.endswith(".weight")
    }
    actor.memory.give_back()
    found["bytes while away"] = sum(j.untyped_storage().nbytes() for j in experts._joined.values())
    found["after coming back"] = same(before, logprobs(actor, microbatches))
    experts.double().float()
    found["after a move"] = same(before, logprobs(actor, microbatches)), in_one(experts)
    load_hf_weights(
        actor.modules, {n: v * 2 if ".experts." in n else v for n, v in weights.items()}
    )
    found["after a load"] = same(before, logprobs(actor, microbatches)), in_one(experts)
    return found


def same(one: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> bool:
    return all(np.array_equal(one[sample_id], other[sample_id]) for sample_id in one)


def in_one(experts: GroupedExperts) -> bool:
    """Whether every expert's weight is the part of the tensor that products read."""
    return all(
        getattr(expert, name).weight.data_ptr() == part.data_ptr()
        for name, joined in experts._joined.items()
        for expert, part in zip(experts.local_experts, joined, strict=True)
    )


def test_backward_keeps_no_copy_of_frozen_experts(checkpoints: dict[str, Path]) -> None:
    assert facts(checkpoints["qwen3_moe"])["kept"] == 0
    # One copy, in float32, for each of the microbatches of the step.
    (apart,) = run_ranks(held_apart, 1, checkpoints["qwen3_moe"])
    assert apart == MICROBATCHES * 4 * IN_EXPERTS


def test_joined_experts_are_given_back_moved_and_loaded(checkpoints: dict[str, Path]) -> None:
    found = facts(checkpoints["qwen3_moe"])
    assert found["bytes while away"] == 0
    assert found["after coming back"]
    assert found["after a move"] == (True, True)
    # Other values arrive in what products read.
    assert found["after a load"] == (False, True)


def test_joined_experts_have_the_names_and_shapes_of_single_ones(
    checkpoints: dict[str, Path],
) -> None:
    found = facts(checkpoints["qwen3_moe"])
    layers = {"linear_fc1": (64, 64), "linear_fc2": (64, 32)}
    expected = {f"{expert}.{n}.weight": s for expert in range(16) for n, s in layers.items()}
    assert {name.rpartition("local_experts.")[2] for name in found["names"]} >= set(expected)
    assert {n: s for n, s in found["shapes"].items() if n in expected} == expected
