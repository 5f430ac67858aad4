"""One vLLM engine in processes of its own, a core and a worker a rank, driven by an event loop.

vLLM's `AsyncLLM` batches all requests that run at once. It is made in a thread, because it waits
until the model is loaded; from then on one event loop calls everything here.

In: vLLM's options, prompts, calls of the workers. Out: sampled tokens, what the workers answer.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from typing import Any

import numpy as np
import psutil

from moe_replay.engines.vllm.workers import Answer
from moe_replay.errors import DivergedError, EngineError
from moe_replay.routing.candidates import Candidates

# Longest wait for processes that were told to end, in seconds; what is left then is killed.
_END_S = 20.0
# Time between two looks for processes that a launch has started since it was given up, in seconds.
_LOOK_S = 0.5


class VllmReplica:
    """An `AsyncLLM` that has loaded its model; `launch` makes one."""

    def __init__(self, llm: Any, *, number: int) -> None:
        self._llm = llm
        self.number = number
        """Its index among the replicas of its server."""
        self._next_id = 0
        self._running: set[str] = set()
        self._cores = list(llm.engine_core.resources.engine_manager.processes)
        self._workers: list[psutil.Process] = []

    @property
    def num_running(self) -> int:
        """Completions that are being sampled."""
        return len(self._running)

    @classmethod
    def launch(cls, config: Any, *, number: int) -> VllmReplica:
        """Return replica ``number`` once its workers have loaded the model. It blocks.

        Raises:
            EngineError: when vLLM does not start.
        """
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        except Exception as error:
            raise EngineError(
                f"vLLM did not start replica {number} on {config.model_config.model}: "
                f"{type(error).__name__}: {error}; its processes say why above{_binding_hint()}"
            ) from error
        return cls(llm, number=number)

    async def begin(self) -> None:
        """Have every worker end with this process, and note which processes they are.

        Raises:
            EngineError: when a worker fails.
        """
        cores = {core.pid for core in self._cores}
        pids = await self.workers("replay_begin", os.getpid())
        # One rank on a GPU runs in the core, a child of this process, whose exit status is vLLM's
        # to collect.
        self._workers = [psutil.Process(pid) for pid in pids if pid not in cores]

    @property
    def vllm_config(self) -> Any:
        """What vLLM runs with, as its processes have completed it."""
        return self._llm.vllm_config

    @property
    def is_dead(self) -> bool:
        """Whether its core, or one of its workers, has ended by itself."""
        return self._llm.errored

    async def sample(self, prompt: Any, params: Any, progress: Callable[[int], None]) -> Any:
        """Return vLLM's last output for one completion, which has all its tokens and routes.

        Raises:
            EngineError: when vLLM fails.
        """
        from vllm.sampling_params import RequestOutputKind

        # Pieces (DELTA) that pile up before a slow reader would be joined without their routes.
        params.output_kind = RequestOutputKind.CUMULATIVE
        self._next_id += 1
        name, output = str(self._next_id), None
        self._running.add(name)
        try:
            with self._failures_named("sampling"):
                calls = self._llm.generate(prompt, params, name)
                async with aclosing(calls) as outputs:
                    async for output in outputs:
                        progress(len(output.outputs[0].token_ids))
        finally:
            self._running.discard(name)
        if output is None or not output.finished:
            raise EngineError(
                f"replica {self.number} of vLLM ended a completion without a last output"
            )
        return output

    async def candidates(self, ticket: str) -> Candidates:
        """Return what the tokens of a call were drawn from; its workers forget it.

        Raises:
            EngineError: when a worker failed, or its process is gone.
        """
        counts, ids, mass = (await self.workers("replay_candidates", ticket))[0]
        return Candidates(
            counts=np.frombuffer(counts, dtype=np.int32),
            ids=np.frombuffer(ids, dtype=np.uint32),
            kept_mass=np.frombuffer(mass, dtype=np.float32),
        )

    async def abort(self) -> None:
        """End what is being sampled; each returns the tokens and routes that it has so far.

        Raises:
            EngineError: when vLLM fails.
        """
        with self._failures_named("aborting"):
            await self._llm.abort(list(self._running))

    async def workers(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of `PushWorker` in every worker, and return what each returned.

        Raises:
            DivergedError: when a worker found values that are not finite.
            EngineError: when a worker failed, or its process is gone.
        """
        with self._failures_named(method):
            answers: list[Answer] = await self._llm.collective_rpc(method, args=arguments)
        num_workers = self.vllm_config.parallel_config.world_size
        if len(answers) != num_workers:
            raise EngineError(
                f"{len(answers)} workers of replica {self.number} answered {method}, expected "
                f"{num_workers}: it is unknown what the others did"
            )
        failed = [answer for answer in answers if not answer["ok"]]
        if failed:
            diverged = any(answer["kind"] == DivergedError.__name__ for answer in failed)
            kind = DivergedError if diverged else EngineError
            errors = "; ".join(answer["error"] for answer in failed)
            raise kind(f"replica {self.number} of vLLM, {method}: {errors}")
        return [answer["value"] for answer in answers]

    async def pause(self) -> None:
        """Let running completions end, and start no others.

        Raises:
            EngineError: when vLLM fails.
        """
        with self._failures_named("pausing"):
            await self._llm.pause_generation(mode="wait", clear_cache=True)

    async def load(self, folder: str | None) -> None:
        """Load a staged push, or (None) the first checkpoint, in all workers, and empty the cache.

        Raises:
            EngineError: when a worker failed, or vLLM did not empty its cache.
        """
        await self.workers("replay_apply", folder)
        with self._failures_named("emptying the prefix cache"):
            is_empty = await self._llm.reset_prefix_cache()
        if not is_empty:
            raise EngineError(
                f"replica {self.number} of vLLM did not empty its prefix cache after a push, so "
                "prompts would be answered from the last policy: abandoned requests run in it"
            )

    async def resume(self) -> None:
        """Undo `pause`.

        Raises:
            EngineError: when vLLM fails.
        """
        with self._failures_named("resuming"):
            await self._llm.resume_generation()

    def obituary(self) -> str:
        """Return the message about a replica that `is_dead`."""
        return (
            f"the server has lost its engine: the processes of replica {self.number} of vLLM have "
            "ended, and say why in the server's log (or nothing, when they were killed for memory); "
            "the server ends too: start it again"
        )

    @contextmanager
    def _failures_named(self, what: str) -> Iterator[None]:
        """Raise what vLLM raises inside as an `EngineError` that says what was done, and where."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            raise EngineError(f"{what}: {self.obituary()}") from error
        except Exception as error:
            cause = error.__cause__ or error
            raise EngineError(
                f"{what}: replica {self.number} of vLLM failed: {type(cause).__name__}: {cause}"
            ) from error

    async def close(self) -> None:
        """End the core and the workers, and wait until they are gone; completions that run fail."""
        self._llm.output_processor.propagate_error(EngineError("the vLLM engine was closed"))
        await asyncio.to_thread(self._end)
        # vLLM has cancelled its tasks; a loop that ends first would complain about them.
        client = self._llm.engine_core
        tasks = [self._llm.output_handler, client.resources.output_queue_task]
        if waiting := [task for task in tasks if task is not None]:
            await asyncio.wait(waiting)
        # Its sockets are closed now, and a context that is left to the garbage collector warns.
        client.resources.ctx.term()
        # What its destructor calls is gone when the interpreter ends.
        del self._llm

    def _end(self) -> None:
        # Ends the core, which ends its workers.
        self._llm.shutdown(timeout=_END_S)
        for core in self._cores:
            # vLLM does not wait for one that it had to kill.
            core.join(_END_S)
        _, alive = psutil.wait_procs(self._workers, timeout=_END_S)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_END_S)


async def launch_all(configs: Sequence[Any]) -> list[VllmReplica]:
    """Launch one replica a configuration, all at the same time: each loads the model for minutes.

    When one fails, or the task is cancelled, none stays.

    Raises:
        EngineError: when vLLM does not start.
    """
    others = set(multiprocessing.active_children())
    launches = [
        asyncio.create_task(asyncio.to_thread(VllmReplica.launch, config, number=number))
        for number, config in enumerate(configs)
    ]
    replicas: list[VllmReplica] = []
    try:
        for launch in asyncio.as_completed(launches):
            replicas.append(await launch)
        await asyncio.gather(*(replica.begin() for replica in replicas))
    except BaseException:
        await _give_up(launches, others)
        raise
    return sorted(replicas, key=lambda replica: replica.number)


async def _give_up(launches: list[asyncio.Task[VllmReplica]], others: set[Any]) -> None:
    """End the launches; ``others`` are this process's children from before.

    A thread cannot be cancelled, but it gives up when the process is gone whose start it waits for.
    """
    while not all(launch.done() for launch in launches):
        for core in set(multiprocessing.active_children()) - others:
            if core.name.startswith("EngineCore"):
                core.kill()
        await asyncio.wait(launches, timeout=_LOOK_S)
    started = [launch.result() for launch in launches if launch.exception() is None]
    await asyncio.gather(*(replica.close() for replica in started))


def _binding_hint() -> str:
    """Return the remedy if vLLM would bind the workers of a CPU to cores that do not exist."""
    from vllm import envs
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or envs.VLLM_CPU_OMP_THREADS_BIND != "auto":
        return ""
    return (
        "; on a CPU set VLLM_CPU_OMP_THREADS_BIND=nobind in the environment, as moe-replay serve does, "
        "unless each worker has a NUMA node of its own"
    )
