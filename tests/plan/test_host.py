"""Host memory of a save: against real saves on two ranks, and by hand on eight GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_replay.megatron.checkpoint import CheckpointFolder, RunPosition
from moe_replay.megatron.chunks import unwrap
from moe_replay.plan.advice import remedies
from moe_replay.plan.host import save_bytes
from moe_replay.plan.machine import read_machine
from moe_replay.plan.memory import plan_memory
from moe_replay.plan.trainer.kernels import CPU
from moe_replay.plan.trainer.settings import AdamStorage, Settings
from moe_replay.plan.trainer.training import Buffer, trainer_bytes
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.training import MegatronSection
from moe_replay.routing import Routing
from moe_replay.testing.layouts import layout
from moe_replay.testing.planned import lowest_peak
from moe_replay.testing.policies import mean_loss, pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import make_samples
from moe_replay.testing.tiny_models import write_tiny_checkpoint

MAX_ERROR_FRAC = 0.1
EIGHT = read_machine(["gpus=8x80GB"])
DENSE, EXPERTS = 1.541e9, 28.991e9
"""Parameters of Qwen3-30B-A3B: 48 layers of 128 experts of 3 x 2048 x 768, and the rest."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_checkpoint(
        folder,
        hidden_size=256,
        num_experts=8,
        moe_intermediate_size=256,
        num_hidden_layers=2,
    )


def measured_and_planned(
    checkpoint: Path, folder: Path, sizes: dict[str, int], beside: bool
) -> tuple[float, float]:
    """Return the bytes that a second save takes on this rank, and what is planned."""
    actor = start_policy(checkpoint, layout(**sizes))
    microbatches = pack(make_samples(4, seed=1, vocab_size=90), scorer=actor)
    actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.LIVE)
    saves = CheckpointFolder(folder, save_total_limit=1)

    def save() -> None:
        position = RunPosition(
            step=1,
            policy_version=1,
            next_prompt=0,
            identity={},
            scheduler=actor.scheduler.state_dict(),
        )
        if not beside:
            saves.save(actor, position)
            return
        pending = saves.begin(actor, position)
        pending.start()
        saves.finish(pending)

    save()
    measured = lowest_peak(save)
    settings = Settings(
        num_ranks=2,
        megatron=MegatronSection(**layout(**sizes).model_dump()),
        dtype_bytes=4,
        adam=AdamStorage(dtype_bytes=4),
        max_tokens=48,
        max_sequence_length=48,
    )
    shape = unwrap(actor.chunks[0]).model_shape
    (found,) = trainer_bytes(shape, settings, [range(shape.num_layers)], CPU)
    is_first = dist.get_rank() == 0
    leads = (is_first, is_first or sizes.get("ep") == 2)
    # On a CPU a weight is written from where it is, unless it is copied.
    weight_bytes = 4 if beside else 0
    return measured, save_bytes(found.buffers, leads, weight_bytes=weight_bytes, beside=beside)


@pytest.mark.parametrize(
    ("sizes", "beside"),
    [({}, False), ({"ep": 2}, False), ({"ep": 2}, True)],
    ids=["dp2", "ep2", "ep2, beside the run"],
)
def test_a_save_takes_what_is_planned_on_each_rank(
    checkpoint: Path, tmp_path: Path, sizes: dict[str, int], beside: bool
) -> None:
    ranks = run_ranks(measured_and_planned, 2, checkpoint, tmp_path, sizes, beside)
    for rank, (measured, planned) in enumerate(ranks):
        print(f"rank {rank}: measured {measured}, planned {planned:.0f}")
        assert planned == pytest.approx(measured, rel=MAX_ERROR_FRAC)
    # What the first rank gathers, or that alone, is far from what it takes.
    measured, planned = ranks[0]
    assert planned * 12 / 36 < (1 - MAX_ERROR_FRAC) * measured


@pytest.mark.parametrize(
    ("leads", "beside", "expected"),
    [
        # 12 x 100 + 12 x 50 + 12 x 100; 1,200 stay, to which 12 x 40 three times come.
        ((True, True), False, 3000),
        ((False, True), False, 1440),
        # The larger of two shares.
        ((False, False), False, 600),
        # 12 x 140 twice, and 2 bytes of 50 and of 40 numbers.
        ((True, True), True, 3540),
    ],
)
def test_bytes_of_a_rank_by_hand(leads: tuple[bool, bool], beside: bool, expected: float) -> None:
    buffers = (Buffer(size=100, replicas=2), Buffer(size=40, replicas=1))
    assert save_bytes(buffers, leads, weight_bytes=2, beside=beside) == expected


@pytest.mark.parametrize(
    ("experts", "asynchronous", "expected"),
    [
        # Each rank leads its experts, none of which another has: 36 bytes; the first one has
        # gathered 12 for each dense parameter before.
        (8, False, 36 * EXPERTS + 12 * DENSE),
        # One rank gathers all; seven bring their eighth of the experts.
        (1, False, 12 * DENSE + (24 + 12 / 8) * EXPERTS + 7 * 12 / 8 * EXPERTS),
        # Twice what was gathered and the bfloat16 weights are less: 24 and 2 / 8.
        (1, True, 12 * DENSE + (24 + 12 / 8) * EXPERTS + 7 * 12 / 8 * EXPERTS),
    ],
)
def test_a_node_of_qwen3_30b_by_hand(
    recipe: Callable[..., Recipe],
    shape: Callable,
    experts: int,
    asynchronous: bool,
    expected: float,
) -> None:
    made = recipe(
        megatron={"expert_model_parallel_size": experts}, checkpoint={"asynchronous": asynchronous}
    )
    found = plan_memory(made, shape("qwen3-30b-a3b"), EIGHT).host
    assert found.save == pytest.approx(expected, rel=0.01)
    assert found.state == 0


def test_stages_on_nodes_of_their_own_share_a_save(
    recipe: Callable[..., Recipe], shape: Callable
) -> None:
    """Two stages of a node each take half of what one node with all of a model's experts takes."""
    two = read_machine(["nodes=2x8x80GB"])
    sizes = {"expert_model_parallel_size": 8}
    halves = recipe(megatron=sizes | {"pipeline_model_parallel_size": 2})
    model = shape("qwen3-30b-a3b")
    saved = plan_memory(halves, model, two).host.save
    whole = plan_memory(recipe(megatron=sizes), model, EIGHT).host.save
    assert saved == pytest.approx(whole / 2, rel=0.05)


def test_a_host_without_room_for_a_save_is_told_which_key_helps(
    recipe: Callable[..., Recipe], shape: Callable
) -> None:
    """Experts that lie on both nodes, or stages of their own, share it."""
    lean = {"use_precision_aware_optimizer": True, "main_grads_dtype": "bfloat16"}
    lean |= {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}
    machine = read_machine(["nodes=2x8x80GB", "host_gb=800"])
    sizes = {"expert_model_parallel_size": 8, "optimizer": lean}
    model = shape("qwen3-30b-a3b")
    plan = plan_memory(recipe(megatron=sizes), model, machine)
    # Of all 16 ranks the first eight gather all experts.
    assert plan.host.save == pytest.approx(30 * EXPERTS + 12 * DENSE, rel=0.01)
    assert [text for text in plan.short if "while a checkpoint is saved" in text] == plan.short
    found = [dict(remedy.keys) for remedy in remedies(recipe(megatron=sizes), model, machine)]
    assert {"megatron.expert_model_parallel_size": 16} in found
    assert {"megatron.pipeline_model_parallel_size": 2} in found
