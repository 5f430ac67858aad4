"""Each repair of Megatron-Core is there where its own cause is, whether or not there is CUDA."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.moe import moe_utils

from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.checkpoint import CheckpointFolder, RunPosition
from moe_replay.megatron.upstream import missing_packages, repairs
from moe_replay.megatron.upstream.version import check_installed
from moe_replay.routing import Routing
from moe_replay.testing.policies import mean_loss, pack, start_policy, with_own_routes
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import make_samples

pytestmark = pytest.mark.skipif(
    missing_packages.has_transformer_engine() or missing_packages.has_fused_adam(),
    reason="Transformer Engine or Apex is installed, so nothing is missing",
)
SEED = 17
METHODS = ("state_dict", "load_state_dict", "_set_main_param_and_optimizer_states")
LAYERNORM = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}


def take_away(*names: str) -> None:
    """Undo repairs of this process: give Megatron back what it was released with."""
    for name in names:
        if name in METHODS:
            setattr(DistributedOptimizer, name, getattr(DistributedOptimizer, name).__wrapped__)
        elif name == "gate":
            delattr(moe_utils, "te_general_gemm")
        elif name == "recompute":
            CheckpointWithoutOutput.__init__.__defaults__ = (False,)
    if set(METHODS) <= set(names):
        delattr(DistributedOptimizer, missing_packages._MARK)


@contextmanager
def cuda_is_there() -> Iterator[None]:
    """Let a block see CUDA.

    The stand-ins for it stay, so what was repaired in the block then runs on the CPU.
    """
    is_available = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_available = is_available


def learn(actor: MegatronActor) -> None:
    samples = with_own_routes(actor, make_samples(4, seed=SEED))
    actor.update(pack(samples), mean_loss, temperature=1.0, routing=Routing.REPLAY)


def adam_steps(actor: MegatronActor) -> set[float]:
    """Return the steps that Adam has counted for this rank's parameters."""
    states = [
        s for part in actor.optimizer.chained_optimizers for s in part.optimizer.state.values()
    ]
    return {float(state["step"]) for state in states}


def resumed_steps(checkpoint: Path, folder: Path, missing: tuple[str, ...]) -> set[float]:
    """Update three times, save, load into a policy without the repairs ``missing``, update."""
    first = start_policy(checkpoint)
    for _ in range(3):
        learn(first)
    position = RunPosition(
        step=3,
        policy_version=3,
        next_prompt=0,
        identity={},
        scheduler=first.scheduler.state_dict(),
    )
    checkpoints = CheckpointFolder(folder, save_total_limit=1)
    checkpoints.save(first, position)
    take_away(*missing)
    second = start_again(checkpoint)
    checkpoints.load(second, 3)
    learn(second)
    return adam_steps(second)


def start_again(checkpoint: Path, **overrides: Any) -> MegatronActor:
    parallel_state.destroy_model_parallel()
    return start_policy(checkpoint, **overrides)


def test_t7_without_its_repair_a_resume_fails(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_ranks(resumed_steps, 1, checkpoint, tmp_path, METHODS)


def test_t7_with_half_of_the_repair_adam_counts_one_step_for_each_parameter(
    checkpoint: Path, tmp_path: Path
) -> None:
    (steps,) = run_ranks(resumed_steps, 1, checkpoint, tmp_path, ("load_state_dict",))
    assert max(steps) > 10


def test_t7_a_resumed_adam_goes_on_at_its_own_step(checkpoint: Path, tmp_path: Path) -> None:
    assert run_ranks(resumed_steps, 1, checkpoint, tmp_path, ()) == [{4.0}]


def on_a_gpu_without_transformer_engine(checkpoint: Path, folder: Path) -> Any:
    """Take away what a machine with CUDA was left without, and repair as the import does there."""
    take_away(*METHODS, "recompute", *(("gate",) if check_installed() < (0, 17) else ()))
    with cuda_is_there():
        causes = repairs.install()
    steps = resumed_steps(checkpoint, folder, ())
    recomputing = start_again(checkpoint, **LAYERNORM)
    learn(recomputing)
    return causes, steps, adam_steps(recomputing)


def test_t7_with_cuda_everything_that_is_missing_but_cuda_is_repaired(
    checkpoint: Path, tmp_path: Path
) -> None:
    causes, steps, recomputed = run_ranks(
        on_a_gpu_without_transformer_engine, 1, checkpoint, tmp_path
    )[0]
    assert {"Transformer Engine", "an Adam of Transformer Engine or Apex"} <= set(causes)
    assert "CUDA" not in causes
    assert steps == {4.0}
    assert recomputed == {1.0}


def recompute(checkpoint: Path, missing: tuple[str, ...]) -> set[float]:
    take_away(*missing)
    actor = start_policy(checkpoint, **LAYERNORM)
    learn(actor)
    return adam_steps(actor)


def test_t7_without_its_repair_selective_recomputation_asks_a_class_that_is_not_there(
    checkpoint: Path,
) -> None:
    with pytest.raises(NameError, match="FP8GlobalStateManager"):
        run_ranks(recompute, 1, checkpoint, ("recompute",))


def table(present: set[str]) -> tuple[list[str], tuple[str, ...]]:
    """Install by a table of invented causes; return what was installed and reported."""
    installed: list[str] = []
    made_up = {
        missing: (
            lambda name=missing: name in present,
            lambda name=missing: installed.append(name),
        )
        for missing in repairs.REPAIRS
    }
    kept = repairs.REPAIRS
    try:
        repairs.REPAIRS = made_up
        return installed, repairs.install()
    finally:
        repairs.REPAIRS = kept


ALL = list(repairs.REPAIRS)


@pytest.mark.parametrize("missing", ALL)
def test_t7_each_repair_is_installed_for_its_own_cause_alone(missing: str) -> None:
    installed, reported = table(set(ALL) - {missing})
    assert installed == [missing]
    assert reported == (missing,)


def test_t7_nothing_is_repaired_where_nothing_is_missing() -> None:
    assert table(set(ALL)) == ([], ())


def test_installing_twice_changes_nothing_more() -> None:
    before = [getattr(DistributedOptimizer, name) for name in METHODS]
    missing_packages.keep_torch_adam_state()
    missing_packages.replace_transformer_engine()
    assert [getattr(DistributedOptimizer, name) for name in METHODS] == before


ROUTER_ALONE = """
import moe_replay.megatron.replay
import torch
from megatron.core.transformer.moe.moe_utils import router_gating_linear
rows, weight = torch.ones(2, 4), torch.ones(3, 4)
print(router_gating_linear(rows, weight, None, torch.float32).tolist())
"""


def test_e21_the_replay_module_alone_brings_the_repair_that_a_router_needs() -> None:
    said = subprocess.run(
        [sys.executable, "-c", ROUTER_ALONE], capture_output=True, text=True, check=False
    )
    assert said.stdout.strip() == str([[4.0] * 3] * 2), said.stderr
