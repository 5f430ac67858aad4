"""The group in which vLLM's own workers take tensors from a trainer, over NCCL.

In: an address, tensors. Out: the same tensors in every worker that was told their order.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from typing import Any

import torch

from moe_replay.engines.transfer_group import STEP_LIMIT
from moe_replay.errors import EngineError, RecipeError

_LOOK_S = 0.001


class VllmGroup:
    """The trainer's end of vLLM's weight transfer, which is rank 0; the workers join by its API.

    Source: vLLM 0.30, ``distributed/weight_transfer/nccl_common.py``, ``trainer_init``.

    Raises:
        RecipeError: when vLLM is not installed beside the trainer.
        EngineError: when the workers do not come.
    """

    def __init__(self, *, address: str, port: int, size: int) -> None:
        try:
            from vllm.distributed.weight_transfer.nccl_common import (
                stateless_init_process_group,
            )
        except ImportError as error:
            raise RecipeError(
                "weights go to plain vLLM servers over NCCL with the help of vLLM, which cannot be "
                f"imported beside the trainer ({error}); install it, or set rollout.weight_transfer to "
                "'auto'"
            ) from error
        self._device = torch.device("cuda", torch.cuda.current_device())
        # Of its own: a worker that is gone must not hold up what the trainer computes.
        self._stream = torch.cuda.Stream(self._device)
        try:
            self._group: Any = stateless_init_process_group(address, port, 0, size, self._device)
        except RuntimeError as error:
            raise EngineError(f"the workers of the vLLM servers did not come: {error}") from error

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        """Send tensors in their order, and return when all workers have them.

        Raises:
            EngineError: when a worker does not take them.
        """
        if self._group is None:
            raise EngineError("the group of trainer and vLLM workers was closed")
        until = time.monotonic() + STEP_LIMIT.total_seconds()
        for tensor in tensors:
            with torch.cuda.stream(self._stream):
                self._group.broadcast(tensor.to(self._device), src=0, stream=self._stream)
            sent = self._stream.record_event()
            while not sent.query():
                if time.monotonic() > until:
                    raise EngineError(
                        f"a worker of the vLLM servers did not take its weights in {STEP_LIMIT}"
                    )
                time.sleep(_LOOK_S)

    def close(self) -> None:
        """Leave. Calling it twice is allowed."""
        self._group = None


def free_port() -> int:
    """Return a port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
