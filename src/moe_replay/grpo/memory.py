"""Memory of the device that trainer and engine share: what is given back, and what was taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moe_replay.errors import UpdateError
from moe_replay.grpo.run import Run
from moe_replay.megatron.offload import PARTS


@contextmanager
def sampling(run: Run) -> Iterator[None]:
    """Give the engine the trainer's memory for the time of the block; collective at its start.

    What was given back stays away after it, until a pass, a checkpoint or an export needs it.
    """
    if run.overlaps:
        # Training goes on meanwhile, or is about to: there are no phases to tell apart.
        yield
        return
    make_room(run)
    held = sum(model.memory.held_bytes() for model in run.models)
    run.peaks.enter("rollout", held_bytes=held)
    try:
        yield
    finally:
        run.peaks.enter("update")


def make_room(run: Run, *, for_push: bool = False) -> None:
    """Give back what ``megatron.offload_during_rollout`` names; collective.

    ``for_push`` keeps the weights of the policy, which are about to be read.

    Raises:
        UpdateError: on every rank, when the host of one has no memory for a copy.
    """
    if run.overlaps or not PARTS[run.recipe.megatron.offload_during_rollout]:
        return
    failure = None
    try:
        for model in run.models:
            model.memory.give_back(but=("weights",) if for_push and model is run.actor else ())
    except UpdateError as error:
        failure = error
    run.ranks.raise_together(failure)


def memory_metrics(run: Run) -> dict[str, float]:
    """Return the peaks of the phases since the last call, of the rank with the highest; collective.

    Empty on a CPU.
    """
    if not run.peaks.measures:
        return {}
    parts = run.ranks.gather(dict(run.peaks.take()))
    names = {name for part in parts for name in part}
    return {f"memory/{name}": float(max(p.get(name, 0) for p in parts)) for name in sorted(names)}
