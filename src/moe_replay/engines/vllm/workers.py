"""What vLLM's workers do for the server: check and load pushes, and end with the server.

vLLM gives the methods of `PushWorker` to the worker of every rank, by its name in
``worker_extension_cls``, and ``collective_rpc`` calls them in all ranks. They return an `Answer`
and never raise: vLLM stops reading at the first worker that raises, so the answers of the ranks
behind it stay in their queues, and every later call reads those.

In: folders of pushed safetensors files. Out: `Answer`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypedDict, TypeVar

import psutil
import torch

from moe_replay.errors import EngineError

PUSH_WORKER = "moe_replay.engines.vllm.workers.PushWorker"
"""What vLLM's ``worker_extension_cls`` must be."""

# Time between two looks for the server, in seconds.
_LOOK_S = 0.5
# Attribute of a worker that can load no weights any more.
_TORN = "_moe_replay_torn"
_Arguments = ParamSpec("_Arguments")
_Worker = TypeVar("_Worker")


class Answer(TypedDict):
    """What a worker answers; a dict, because it travels between processes as MessagePack."""

    ok: bool
    """Whether the call did what it was asked for."""
    kind: str
    """Class of the exception; empty when ``ok``."""
    error: str
    """Its message, with the rank; empty when ``ok``."""
    value: Any
    """What the call returns; None unless ``ok``."""


def answered(
    method: Callable[Concatenate[_Worker, _Arguments], Any],
) -> Callable[Concatenate[_Worker, _Arguments], Answer]:
    """Return the method with its result, or its exception, in an `Answer`."""

    @wraps(method)
    def answer(self: Any, *arguments: _Arguments.args, **named: _Arguments.kwargs) -> Answer:
        try:
            value = method(self, *arguments, **named)
        except Exception as error:  # noqa: BLE001 - seam: an exception would put vLLM's calls out of step
            message = f"worker {self.rank}: {type(error).__name__}: {error}"
            return Answer(ok=False, kind=type(error).__name__, error=message, value=None)
        return Answer(ok=True, kind="", error="", value=value)

    return answer


class PushWorker:
    """Methods of vLLM's worker, beside its own."""

    # Of vLLM's worker. Annotations alone: vLLM refuses an extension that has an attribute of its
    # worker.
    rank: int
    vllm_config: Any
    model_config: Any
    model_runner: Any
    reload_weights: Callable[..., None]

    @answered
    def replay_begin(self, server_pid: int) -> int:
        """End this worker and its core when process ``server_pid`` ends; return the own pid.

        However the server ends: a ``kill -9`` gives it no chance to end what it has started, and
        workers hold memory.
        """
        core = os.getppid()

        def wait() -> None:
            _wait_for_end(server_pid)
            # With one rank on a GPU this process is vLLM's core itself, and its parent is the
            # server.
            if core != server_pid and os.getppid() == core:
                os.kill(core, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=wait, name="moe-replay: end with the server", daemon=True).start()
        return os.getpid()

    @answered
    def replay_stage(self, folder: str, first_share: int, num_shares: int) -> int:
        """Check this rank's share of a push; return the number of tensors checked.

        Each tensor is read by one worker only. With two replicas of two ranks there are four
        shares; rank 1 of the second replica (``first_share`` 2) has share 3, and of ten tensors
        reads tensors 3 and 7. Nothing changes.
        """
        from moe_replay.engines.vllm.plugin import check_patched
        from moe_replay.engines.weight_stream import finite_weights, folder_tensors

        check_patched()
        self._replay_check()
        own = islice(folder_tensors(Path(folder)), first_share + self.rank, None, num_shares)
        return sum(1 for _ in finite_weights(own))

    @answered
    def replay_apply(self, folder: str | None) -> None:
        """Replace all weights by a staged push, or (None) by the first checkpoint."""
        from moe_replay.checkpoint.facts import checkpoint_tensors
        from moe_replay.engines.weight_stream import folder_tensors

        self._replay_check()
        self._replay_load(
            checkpoint_tensors(self.model_config.model)
            if folder is None
            else folder_tensors(Path(folder))
        )

    @answered
    def replay_candidates(self, ticket: str) -> list[bytes]:
        """Return the arrays of the candidates kept under ``ticket``, and forget them.

        Every rank draws the same tokens, so those but the first return nothing.
        """
        from moe_replay.engines.vllm.sampler import processor_of

        taken = processor_of(self).take(ticket)
        if self.rank:
            return []
        return [array.tobytes() for array in (taken.counts, taken.ids, taken.kept_mass)]

    def _replay_check(self) -> None:
        if hasattr(self, _TORN):
            raise EngineError(
                "an earlier reload broke off in this worker, and it can load no weights any more; start the server again"
            )

    def _replay_load(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        try:
            self.reload_weights(weights_iterator=tensors)
        except BaseException:
            self._replay_finish()
            raise

    def _replay_finish(self) -> None:
        """Take back what a reload that broke off has left.

        Layers that wait for their weights keep the parts that they got, and would count them as
        parts of the next push: half of one push and all of another gave 11 % right tokens, without
        an error.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        try:
            with set_current_vllm_config(self.vllm_config):
                finalize_layerwise_reload(self.model_runner.get_model(), self.model_config)
        except Exception as error:
            setattr(self, _TORN, True)
            raise EngineError(
                f"a reload broke off, and vLLM could not be told that no more weights come ({type(error).__name__}: "
                f"{error}): this worker can load no weights any more; start the server again"
            ) from error


def _wait_for_end(pid: int) -> None:
    """Wait until a process, which need not be a child, has ended, collected or not."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_LOOK_S)
