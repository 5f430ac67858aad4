"""The vLLM engine of the rollout server: workers, replicas, and requests that can be cancelled.

A push has two steps. `VllmServing.stage` checks all of it, in the workers too, and changes nothing.
`VllmServing.apply` loads it in all workers of all replicas; when one fails, all go back to the
weights before.

In: a checkpoint directory, requests, folders of pushed weights. Out: completions with routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from moe_replay.checkpoint.config import load_config
from moe_replay.checkpoint.facts import ModelFacts, read_facts
from moe_replay.engines.crossing import continued, joined
from moe_replay.engines.lifecycle import Lifecycle, State
from moe_replay.engines.serve.engine import HeldPush
from moe_replay.engines.types import (
    Completion,
    FinishReason,
    Request,
    SamplingParams,
)
from moe_replay.engines.vllm.capacity import CacheCapacity, capacity_of
from moe_replay.engines.vllm.replica import VllmReplica, launch_all
from moe_replay.engines.vllm.startup import check_loadable, describe_vllm, engine_options
from moe_replay.engines.vllm.wire import completion_of
from moe_replay.engines.vllm.workers import PUSH_WORKER
from moe_replay.engines.weight_stream import fitting_weights, folder_tensors
from moe_replay.errors import EngineError, RecipeError
from moe_replay.routing import LayerOrder
from moe_replay.routing.candidates import Candidates

# Steps between two outputs of a running completion: what each costs is paid in the server's one
# event loop.
_STREAM_INTERVAL = 16
# Time between two attempts to abort what runs, in seconds.
_ABORT_S = 0.01
# Time between two looks at whether all processes live, in seconds.
_LOOK_S = 1.0


class VllmServing(Lifecycle):
    """A `ServedEngine` over ``replicas`` vLLM engines of ``tensor_parallel_size`` workers each.

    Tokens are drawn with the noise of every engine of moe-replay (see `sampler`), so a completion
    depends on its seed, its request and its number, and neither on what shares the batch nor on the
    replica. A request goes to the replica that samples the fewest completions. On a GPU replica 1
    of two workers takes the third and the fourth of the visible devices.

    Examples:
        >>> engine = VllmServing("checkpoints/tiny", dtype="bfloat16", tensor_parallel_size=2)
        >>> await engine.start()
        >>> await engine.complete(request, 0, sampling, policy_version=0, progress=print)

    Raises:
        RecipeError: when vLLM is not installed, or the checkpoint or an option is wrong.
        UnsupportedError: when the model cannot be loaded or cut, or vLLM is of another release than
            was tested.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: Literal["float32", "bfloat16"],
        tensor_parallel_size: int = 1,
        replicas: int = 1,
        max_batch_size: int = 128,
        max_context_length: int | None = None,
        kv_cache_gib: float | None = None,
        gpu_memory_utilization: float | None = None,
        record_routes: bool = True,
    ) -> None:
        self._facts = read_facts(model_dir)
        self._layer_order = LayerOrder()
        heads = load_config(Path(model_dir)).get_text_config().num_attention_heads
        check_loadable(self._facts, tensor_parallel_size, num_attention_heads=heads)
        super().__init__(
            describe_vllm(
                self._facts,
                dtype=dtype,
                max_context_length=max_context_length,
                record_routes=record_routes,
            ),
            state="new",
        )
        self._tensor_parallel_size, self._num_replicas = tensor_parallel_size, replicas
        self._num_devices = _num_devices()
        devices_of(0, tensor_parallel_size, replicas, self._num_devices)
        self._options = engine_options(
            model_dir,
            self._description,
            max_batch_size=max_batch_size,
            kv_cache_gib=kv_cache_gib,
            gpu_memory_utilization=gpu_memory_utilization,
        )
        self._replicas: list[VllmReplica] = []
        self._held = HeldPush(self._load)
        self._staged: Path | None = None
        self._num_interrupts = 0
        self._abandoned: set[asyncio.Task[Candidates]] = set()

    @property
    def crosses_pushes(self) -> bool:
        """Whether completions go on after a push; they do."""
        return True

    async def start(self) -> None:
        """Start all processes, and return when they have loaded the model.

        Raises:
            EngineError: when vLLM does not start; then nothing of it stays.
        """
        self._check_state("new")
        self._replicas = await launch_all(
            [self._config(replica) for replica in range(self._num_replicas)]
        )
        self._state = "ready"

    def capacity(self) -> str:
        """Return how many sequences fit, such as "43 sequences of 1,536 tokens fit in ..."."""
        of_each = [capacity_of(replica.vllm_config) for replica in self._replicas]
        capacity = CacheCapacity(
            num_sequences=sum(one.num_sequences for one in of_each),
            sequence_length=self._description.max_context_length,
            max_batch_size=sum(one.max_batch_size for one in of_each),
        )
        return capacity.shortage() or capacity.describe()

    async def complete(
        self,
        request: Request,
        number: int,
        sampling: SamplingParams,
        *,
        policy_version: int,
        progress: Callable[[int], None],
        across: Callable[[], Awaitable[int]] | None = None,
    ) -> Completion:
        """Sample completion ``number`` of ``request``, under the name of ``policy_version``.

        ``progress`` is called with the tokens so far, every 16 of them. When the task that awaits
        this is cancelled, the request is aborted in every worker. One that `interrupt` ended goes
        on after ``across``: prompt and tokens so far are fed again, and its noise goes on.

        Raises:
            EngineError: when vLLM fails, or the engine is not ready.
            DivergedError: when the model's logits are not numbers.
        """
        from moe_replay.engines.vllm.sampler import asked_of, ticket_of

        parts: list[Completion] = []
        while True:
            self._check_state("ready")
            before, asked = self._num_interrupts, continued(request, parts)
            done = len(asked.prompt_ids) - len(request.prompt_ids)
            prompt, params = asked_of(asked, number, sampling, self._facts, num_before=done)
            replica = min(self._replicas, key=lambda replica: replica.num_running)
            ticket = ticket_of(params)
            try:
                output = await replica.sample(prompt, params, lambda grown: progress(done + grown))  # noqa: B023 - called before it changes
            except asyncio.CancelledError:
                if ticket is not None:
                    self._abandon(replica, ticket)
                raise
            candidates = None if ticket is None else await replica.candidates(ticket)
            part = completion_of(
                output,
                request=asked,
                number=number,
                facts=self._facts,
                description=self._description,
                policy_version=policy_version,
                layer_order=self._layer_order,
                candidates=candidates,
            )
            parts.append(part)
            was_interrupted = (
                part.finish_reason is FinishReason.ABORTED and before < self._num_interrupts
            )
            if across is None or not was_interrupted:
                where = f"vllm: request {request.request_id}, completion {number}"
                return joined(request, parts, where=where)
            policy_version = await across()

    def _abandon(self, replica: VllmReplica, ticket: str) -> None:
        """Let the workers forget the candidates of a call that nobody waits for."""
        task = asyncio.create_task(replica.candidates(ticket))
        self._abandoned.add(task)
        # Looked at, so that the loop logs no error of a replica that is being closed.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        task.add_done_callback(self._abandoned.discard)

    async def interrupt(self) -> None:
        """End all that is sampled, and return when none is; what may cross a push goes on after it.

        Raises:
            EngineError: when vLLM fails.
        """
        self._num_interrupts += 1
        # Again and again: a completion may be on its way to vLLM, where it cannot be aborted yet.
        while any(replica.num_running for replica in self._replicas):
            self._check_state("ready")
            await _all(replica.abort() for replica in self._replicas)
            await asyncio.sleep(_ABORT_S)

    async def stage(self, folder: Path) -> None:
        """Check a push: names and shapes here, and the values of each tensor in one worker.

        Raises:
            EngineError: when a name is unknown, missing, or of another shape, or a worker cannot
                load pushes.
            DivergedError: when a weight is not finite.
        """
        self._check_state("ready", "broken")
        self._staged = None
        num_tensors = await asyncio.to_thread(_num_fitting, folder, self._facts)
        ranks = self._tensor_parallel_size
        num_shares = ranks * self._num_replicas
        checked = await _all(
            replica.workers("replay_stage", str(folder), replica.number * ranks, num_shares)
            for replica in self._replicas
        )
        if (total := sum(map(sum, checked))) != num_tensors:
            raise EngineError(
                f"the workers checked {total} of {num_tensors} weights of a push, expected each once: they do not see the "
                f"files of {folder} as the server does; a folder that all of them share must hold a push"
            )
        self._staged = folder

    async def apply(self, folder: Path) -> None:
        """Load a staged push in all workers; no completion may run.

        Raises:
            PushRefused: when it failed and the weights before it are loaded again.
            EngineError: when they could not be loaded either, so that completions are refused until
                a push succeeds.
        """
        self._check_state("ready", "broken")
        if folder != self._staged:
            raise EngineError(
                f"{folder} was not staged last, {self._staged} was: stage a push, then apply it"
            )
        if running := sum(replica.num_running for replica in self._replicas):
            raise EngineError(
                f"weights were pushed while {running} completions are sampled; wait for them, so that none mixes two policies"
            )
        # Until it is known that all workers hold one policy, also when this task is cancelled.
        self._state, self._staged = "broken", None
        await self._held.replace(folder)

    async def lost(self) -> str:
        """Wait until the processes of a replica have ended, and return what happened.

        One is enough: a server that went on with the others would look healthy to what restarts
        servers.
        """
        while (dead := self._dead()) is None:
            await asyncio.sleep(_LOOK_S)
        return dead.obituary()

    async def close(self) -> None:
        """End all processes, and remove the push that they hold. Calling it twice is allowed."""
        self._state = "closed"
        replicas, self._replicas = self._replicas, []
        await asyncio.gather(*self._abandoned, return_exceptions=True)
        await asyncio.gather(*(replica.close() for replica in replicas))
        self._held.remove()

    async def _load(self, folder: Path | None) -> None:
        """Load one push, or (None) the checkpoint, everywhere and let requests run again."""
        await _all(replica.pause() for replica in self._replicas)
        await _all(
            replica.load(None if folder is None else str(folder)) for replica in self._replicas
        )
        await _all(replica.resume() for replica in self._replicas)
        self._state = "ready"

    def _config(self, replica: int) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs

        size = self._tensor_parallel_size
        config = AsyncEngineArgs(
            **self._options,
            tensor_parallel_size=size,
            distributed_executor_backend="mp" if size > 1 else None,
            device_ids=devices_of(replica, size, self._num_replicas, self._num_devices),
            worker_extension_cls=PUSH_WORKER,
            stream_interval=_STREAM_INTERVAL,
        ).create_engine_config()
        if size == 1:
            # The CPU build moves its one worker to another process, on which the engine's then
            # waits by spinning: half of two cores.
            config.parallel_config.distributed_executor_backend = "uni"
        return config

    def _dead(self) -> VllmReplica | None:
        return next((replica for replica in self._replicas if replica.is_dead), None)

    def _check_state(self, *allowed: State) -> None:
        # A dead replica samples nothing, so it would always be the one with the fewest completions.
        if dead := self._dead():
            raise EngineError(dead.obituary())
        super()._check_state(*allowed)


def devices_of(
    replica: int, size: int, num_replicas: int, num_devices: int | None
) -> list[int] | None:
    """Return the devices of one replica of ``size`` workers; None for one replica, or on a CPU.

    Of two replicas of two workers: 0 and 1, then 2 and 3. ``num_devices`` are visible, None on a
    CPU.

    Raises:
        RecipeError: when all replicas together need more devices than there are.
    """
    if num_devices is None:
        return None
    if num_replicas * size > num_devices:
        raise RecipeError(
            f"{num_replicas} replicas of {size} workers need {num_replicas * size} devices, {num_devices} are visible; lower "
            "the number of replicas, or tensor_parallel_size"
        )
    return list(range(replica * size, (replica + 1) * size)) if num_replicas > 1 else None


def _num_devices() -> int | None:
    from vllm.platforms import current_platform

    return None if current_platform.is_cpu() else current_platform.device_count()


async def _all(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """Await all calls to their end, then raise the first error if there is one."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _num_fitting(folder: Path, facts: ModelFacts) -> int:
    """Return the number of tensors in a push after checking names and shapes in mapped files."""
    tensors = list(folder_tensors(folder))
    for _ in fitting_weights(tensors, facts):
        continue
    return len(tensors)
