"""TRL on two ranks: each replays its own samples; one wrong sample on one of them stops both."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.errors import MisalignmentError
from moe_replay.testing.ranks import run_ranks

pytest.importorskip("trl")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.ranks]
# Two updates a generation, whose halves TRL shuffles on each rank.
SMALL = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "max_steps": 2,
}
OWN = ("loss", "grad_norm", "replay/agreement", "replay/agreement_min_sample", "replay/coverage")


def join_world() -> None:
    """Let accelerate find the process group of this rank, and forget the parent's world."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size)):
        os.environ[name] = str(value)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"}
    PartialState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def log_of_rank(trainer_of: Callable[..., Any], mode: str) -> list[dict[str, float]]:
    from moe_replay.trl import ReplayGRPOTrainer

    join_world()
    trainer = trainer_of(ReplayGRPOTrainer, SMALL, router_replay_mode=mode)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    steps = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [{name: line[name] for name in OWN if name in line} for line in steps]


def test_each_rank_replays_its_own_samples_after_the_weights_moved(trainer_of):
    logs = {mode: run_ranks(log_of_rank, 2, trainer_of, mode) for mode in ("R2", "R3")}
    for first_rank, second_rank in logs.values():
        assert first_rank == second_rank  # all that is logged is of both
    first, second = logs["R3"][0]
    assert first["replay/coverage"] == second["replay/coverage"] == 1.0
    assert first["replay/agreement_min_sample"] == 1.0
    assert 0.3 < second["replay/agreement"] < 0.999, "else replay would change nothing"
    # R2 records with the batch itself, so R3 has these figures only if its routes followed it.
    for recorded, replayed in zip(logs["R2"][0], logs["R3"][0], strict=True):
        assert recorded == pytest.approx(replayed, rel=1e-5)


def stopped_rank(trainer_of: Callable[..., Any]) -> tuple[str, bool]:
    """Return why a rank stops when the longest sample of rank 1 is late, and if weights moved."""
    from moe_replay.trl import ReplayGRPOTrainer

    class Planted(ReplayGRPOTrainer):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            output = super()._generate_single_turn(*args, **kwargs)
            samples = self._rollouts
            if self.accelerator.process_index == 1:
                at = int(np.argmax([len(sample.token_ids) for sample in samples]))
                trace = samples[at].trace
                late = np.roll(trace.expert_ids, 1, axis=0)
                late[0] = trace.expert_ids[0]
                samples[at] = replace(samples[at], trace=replace(trace, expert_ids=late))
            return output

    join_world()
    trainer = trainer_of(Planted, SMALL | {"max_completion_length": 32})
    gate = trainer.model.model.layers[0].mlp.gate.weight
    before = gate.detach().clone()
    try:
        trainer.train()
    except MisalignmentError as error:
        return str(error), bool((gate != before).any())
    return "", bool((gate != before).any())


def test_one_late_sample_on_one_rank_stops_both_before_the_optimizer(trainer_of):
    for message, has_moved in run_ranks(stopped_rank, 2, trainer_of):
        assert "1 of 16 samples" in message
        assert "token shift +1" in message
        assert not has_moved
