"""What the trainer gives back leaves the device, and comes back to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_replay.errors import UnsupportedError, UpdateError
from moe_replay.megatron import offload
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.checkpoint import CheckpointFolder, RunPosition
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.offload import (
    DeviceMemory,
    Holding,
    check_movable,
    gradients_of,
    optimizer_state_of,
    spans,
    weights_of,
)
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.megatron.upstream.warnings import quiet_megatron
from moe_replay.megatron.weights import export_hf_weights
from moe_replay.routing import Routing
from moe_replay.testing.layouts import CASES, SEED, coded_samples, replica_share
from moe_replay.testing.policies import mean_loss, pack, start_policy
from moe_replay.testing.ranks import run_ranks

pytestmark = pytest.mark.ranks
LEVELS = ("none", "gradients", "optimizer", "weights")
CPU = torch.device("cpu")


def batches_of(actor: MegatronActor) -> Any:
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    layers = unwrap(actor.chunks[0]).model_shape.moe_layers
    samples = replica_share(coded_samples(layers), replica)
    return pack(samples, scorer=actor, count=4)


def update(actor: MegatronActor) -> float:
    """Take one replayed step."""
    batches = batches_of(actor)
    return actor.update(batches, mean_loss, temperature=1.0, routing=Routing.REPLAY).norm


def weights_after(
    checkpoint: Path,
    gives_back: str,
    case: str = "dp2",
    dtype: torch.dtype = torch.float32,
    meanwhile: Callable[[MegatronActor], None] = lambda _: None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the norms and the weights of three steps, before each of which memory is given back.

    ``meanwhile`` is done while it is away.
    """
    where = CASES[case]
    actor = start_policy(checkpoint, where.layout, dtype=dtype, gives_back=gives_back)
    norms = []
    for _ in range(3):
        actor.memory.give_back()
        meanwhile(actor)
        norms.append(update(actor))
    return norms, dict(actor.weights.tensors())


def same(a: tuple[Any, dict[str, torch.Tensor]], b: tuple[Any, dict[str, torch.Tensor]]) -> bool:
    return a[0] == b[0] and all(torch.equal(value, b[1][name]) for name, value in a[1].items())


def test_items_are_laid_end_to_end_into_blocks() -> None:
    assert list(spans([5, 6], [4, 4, 4])) == [
        (0, 0, 0, 0, 4),
        (0, 4, 1, 0, 1),
        (1, 0, 1, 1, 3),
        (1, 3, 2, 0, 3),
    ]
    assert list(spans([0, 4, 0, 2], [4, 2])) == [(1, 0, 0, 0, 4), (3, 0, 1, 0, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_level_frees_what_it_names(checkpoint: Path, dtype: torch.dtype) -> None:
    """Counted by hand: float32 weights are their own main weights, bfloat16 ones have a copy."""
    size = torch.empty(0, dtype=dtype).element_size()

    def held(gives_back: str) -> tuple[int, int, int, int]:
        actor = start_policy(checkpoint, dtype=dtype, gives_back=gives_back)
        update(actor)
        count = sum(p.numel() for p in actor.modules[0].parameters())
        before = actor.memory.held_bytes()
        actor.memory.give_back()
        freed = [
            sum(t.untyped_storage().nbytes() for t in tensors)
            for tensors in (gradients_of(actor.chunks), weights_of(actor.chunks))
        ]
        after = actor.memory.held_bytes()
        assert (freed[0] == 0) == (gives_back != "none")
        assert (freed[1] == 0) == (gives_back == "weights")
        # A step leaves float32 copies of bfloat16 gradients behind.
        lingers = [t for t in optimizer_state_of(actor.optimizer) if t.grad is not None]
        assert bool(lingers) == (gives_back == "none")
        return count, before, after, actor.memory.is_away

    for gives_back in LEVELS:
        (found,) = run_ranks(held, 1, gives_back)
        count, before, after, _ = found
        main = 0 if dtype is torch.float32 else 4
        left = {"none": size + 4 + main + 8, "gradients": size + main + 8, "optimizer": size}
        # Buffers are padded to a multiple of some 64 numbers, and each tensor has a step count.
        slack = 40_000
        assert before == pytest.approx(count * (size + 4 + main + 8), abs=slack)
        assert after == pytest.approx(count * left.get(gives_back, 0), abs=slack)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("dp2", torch.float32),
        ("dp2", torch.bfloat16),
        ("ep2", torch.bfloat16),
        ("pp2 vpp2", torch.float32),
        ("tp2 ep2 etp1", torch.bfloat16),
    ],
    ids=str,
)
def test_steps_are_equal_to_the_bit(checkpoint: Path, case: str, dtype: torch.dtype) -> None:
    print("seed", SEED)
    ranks = CASES[case].ranks
    kept = run_ranks(weights_after, ranks, checkpoint, "none", case, dtype)
    for gives_back in LEVELS[1:] if case == "dp2" else LEVELS[3:]:
        moved = run_ranks(weights_after, ranks, checkpoint, gives_back, case, dtype)
        assert all(same(a, b) for a, b in zip(kept, moved, strict=True)), gives_back


@pytest.mark.parametrize("lost", ["a moment", "all"])
def test_a_move_that_loses_a_moment_is_seen(checkpoint: Path, lost: str) -> None:
    """The control: one byte in a thousand, or everything, does not come back from the host."""

    def lose(actor: MegatronActor) -> None:
        for block in actor.memory._hosts["optimizer"]._blocks:
            block[:: 1000 if lost == "a moment" else 1] = 0

    (kept,) = run_ranks(weights_after, 1, checkpoint, "none", "full recompute")
    (moved,) = run_ranks(
        weights_after, 1, checkpoint, "optimizer", "full recompute", torch.float32, lose
    )
    assert not same(kept, moved)


def test_all_that_reads_takes_back_what_it_reads(checkpoint: Path) -> None:
    def readers() -> list[str]:
        actor = start_policy(checkpoint, gives_back="weights")
        batches = batches_of(actor)
        update(actor)
        seen = []
        for name, read in {
            "score": lambda: actor.score(batches, temperature=1.0, routing=Routing.LIVE),
            "weights": lambda: dict(actor.weights.tensors()),
            "modules": lambda: dict(export_hf_weights(actor.modules)),
            "optimizer": lambda: actor.optimizer,
            "backward": lambda: actor.backward(
                batches, mean_loss, temperature=1.0, routing=Routing.LIVE
            ),
        }.items():
            actor.memory.give_back()
            read()
            seen.append(f"{name}: {', '.join(sorted(actor.memory._away))} away")
        return seen

    (seen,) = run_ranks(readers, 1)
    assert seen == [
        "score: gradients, optimizer away",
        "weights: gradients, optimizer away",
        "modules: gradients, optimizer away",
        # The optimizer holds views of float32 weights.
        "optimizer: gradients away",
        # Its state comes back for the step alone, when activations are gone.
        "backward: optimizer away",
    ]


def test_a_checkpoint_saved_and_loaded_while_memory_is_away_is_whole(
    checkpoint: Path, tmp_path: Path
) -> None:
    def save_and_go_on(gives_back: str) -> dict[str, torch.Tensor]:
        actor = start_policy(checkpoint, gives_back=gives_back)
        update(actor)
        folder = CheckpointFolder(tmp_path / gives_back, save_total_limit=1)
        at = RunPosition(
            step=1,
            policy_version=1,
            next_prompt=0,
            identity={},
            scheduler=actor.scheduler.state_dict(),
        )
        actor.memory.give_back()
        folder.save(actor, at)
        update(actor)
        actor.memory.give_back()
        folder.load(actor, 1)
        actor.memory.give_back()
        update(actor)
        return dict(actor.weights.tensors())

    (kept,) = run_ranks(save_and_go_on, 1, "none")
    (moved,) = run_ranks(save_and_go_on, 1, "weights")
    assert same((0, kept), (0, moved))


def counted(sizes: list[int]) -> tuple[DeviceMemory, list[torch.Tensor]]:
    """Return a memory of tensors that hold 1, 2, 3 ... in blocks of 16 bytes."""
    tensors = [torch.arange(size, dtype=torch.int16) + 1 for size in sizes]
    memory = DeviceMemory(
        CPU, {"weights": Holding(tensors=lambda: tensors)}, gives_back="weights", block_bytes=16
    )
    return memory, tensors


def test_host_memory_is_made_once_and_grows_with_what_is_held() -> None:
    memory, tensors = counted([5, 9])
    view = tensors[1][3:]
    memory.give_back()
    blocks = memory._hosts["weights"]._blocks
    assert [len(block) for block in blocks] == [16, 16]
    first = [block.data_ptr() for block in blocks]
    memory.give_back()
    memory.take_back("weights")
    assert [t.tolist() for t in tensors] == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert view.tolist() == [4, 5, 6, 7, 8, 9]
    tensors.append(torch.full((2,), 7, dtype=torch.int16))
    memory.give_back()
    assert [block.data_ptr() for block in blocks[:2]] == first
    # 28 bytes were there, 32 are needed, and 32 there are.
    assert len(blocks) == 2
    tensors[0][:0].tolist()
    memory.take_back("weights")
    assert [t.tolist() for t in tensors][2] == [7, 7]


def test_what_nobody_gives_back_stays() -> None:
    tensor = torch.ones(3)
    memory = DeviceMemory(
        CPU, {"weights": Holding(tensors=lambda: [tensor])}, gives_back="optimizer"
    )
    memory.give_back()
    assert not memory.is_away
    assert memory.held_bytes() == 12


def test_a_host_without_memory_is_an_error_and_nothing_is_lost(monkeypatch) -> None:
    memory, tensors = counted([4])
    # One exbibyte, of which no host has one.
    monkeypatch.setattr(offload._HostCopy, "keep", lambda self, _: self._make_room(1 << 60))
    memory._hosts["weights"]._block_bytes = 1 << 60
    with pytest.raises(UpdateError, match="offload_during_rollout = 'gradients'"):
        memory.give_back()
    assert not memory.is_away
    assert tensors[0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("fields", "wrapping", "option"),
    [
        ({"cuda_graph_impl": "local"}, {}, "cuda_graph_impl = 'local'"),
        ({}, {"nccl_ub": True}, "nccl_ub = true"),
    ],
)
def test_addresses_that_something_has_kept_are_not_moved(
    fields: dict[str, Any], wrapping: dict[str, Any], option: str
) -> None:
    with quiet_megatron():
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    ddp = DistributedDataParallelConfig()
    check_movable("weights", config, ddp)
    for target, values in ((config, fields), (ddp, wrapping)):
        for name, value in values.items():
            setattr(target, name, value)
    check_movable("none", config, ddp)
    with pytest.raises(UnsupportedError, match=option):
        check_movable("gradients", config, ddp)
