"""The station that gives the trained weights to the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from moe_replay.engines.types import CountsPushedBytes
from moe_replay.engines.weight_stream import drain
from moe_replay.grpo.run import Run
from moe_replay.megatron.finite import check_weights
from moe_replay.megatron.ranks.pace import in_step


def push_weights(run: Run) -> None:
    """Give the updated weights to the engine, as a new policy version.

    Raises:
        DivergedError: when one of them is not a finite number; the engine keeps the old ones.
    """
    run.actor.gather_parameters()
    check_weights(run.actor.modules, run.ranks)
    run.policy_version += 1
    give_weights(run)


def give_weights(run: Run) -> None:
    """Give the engine the policy's weights under the present policy version; collective.

    Raises:
        MoeReplayError: on every rank, when the engine of one of them does not take them.
    """
    run.device.make_room(for_push=True)
    weights = _Counted(in_step(run.actor.weights.tensors(), run.ranks))
    failure = None
    adapters = run.actor.adapters
    dtype = getattr(torch, getattr(run.recipe.rollout, "dtype", run.recipe.model.dtype))
    with adapters.counting(dtype) if adapters is not None else nullcontext() as changes:
        try:
            run.engine.load_weights(weights, policy_version=run.policy_version)
        except Exception as error:  # noqa: BLE001 - the seam: the engine may be the user's
            drain(weights, error)
            failure = error
    run.ranks.raise_together(failure)
    engine = run.engine
    counts = isinstance(engine, CountsPushedBytes)
    num_bytes = engine.pushed_bytes if counts else weights.num_bytes
    run.journal.push_metrics = {"sync/bytes": float(num_bytes)}
    if changes is not None:
        run.journal.push_metrics["sync/lora_changed_frac"] = changes.frac(run.ranks)


class _Counted:
    """Named tensors, and their bytes so far."""

    def __init__(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._tensors, self.num_bytes = tensors, 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        name, tensor = next(self._tensors)
        self.num_bytes += tensor.nbytes
        return name, tensor
