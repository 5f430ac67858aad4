"""The vLLM engine in this process: it samples, captures routes, and receives weights in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from moe_replay.checkpoint.facts import read_facts
from moe_replay.engines.checks import check_requests, check_sampling
from moe_replay.engines.lifecycle import VersionedEngine
from moe_replay.engines.types import (
    Request,
    RolloutGroup,
    RolloutProgress,
    SamplingParams,
    grouped,
)
from moe_replay.engines.vllm.capacity import CacheCapacity, capacity_of
from moe_replay.engines.vllm.ranks import (
    check_ranks,
    failure_of_ranks,
    of_ranks,
    own_rank,
)
from moe_replay.engines.vllm.startup import (
    check_loadable,
    describe_vllm,
    engine_options,
    start_vllm,
    stop_vllm,
)
from moe_replay.engines.vllm.stepping import VllmStepper
from moe_replay.engines.vllm.wire import completion_of
from moe_replay.engines.weight_stream import checked_weights, drain
from moe_replay.errors import DivergedError, EngineError
from moe_replay.routing import LayerOrder
from moe_replay.routing.candidates import Candidates


class VllmEngine(VersionedEngine):
    """Samples with vLLM in this process: prefix caching and chunked prefill on, routes captured.

    Tokens are drawn with the noise of every engine of moe-replay (see `sampler`), so equal seeds
    give equal completions, whatever shares the batch. Threads may call `generate` at the same time;
    their requests run together. On a GPU the engine sleeps between rounds: its weights wait in host
    memory and its cache is freed while the trainer works. On a CPU vLLM cannot sleep, and both
    stay.

    With ``tensor_parallel_size`` above 1 consecutive ranks of the trainer share one engine. Each
    calls `generate` with its own requests and gets its own completions, and all must make the same
    calls in the same order.

    Examples:
        >>> engine = VllmEngine("checkpoints/tiny", dtype="bfloat16")
        >>> groups = engine.generate(requests, SamplingParams(max_completion_length=64))

    Raises:
        RecipeError: when vLLM is not installed, or the checkpoint or an option is wrong.
        UnsupportedError: when another release of vLLM is installed than the one tested here.
        EngineError: when vLLM does not start.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: Literal["float32", "bfloat16"],
        max_batch_size: int = 128,
        max_context_length: int | None = None,
        max_tokens_per_forward: int | None = None,
        kv_cache_gib: float | None = None,
        gpu_memory_utilization: float | None = None,
        tensor_parallel_size: int = 1,
        record_routes: bool = True,
    ) -> None:
        check_ranks(tensor_parallel_size)
        self._facts = read_facts(model_dir)
        check_loadable(self._facts)
        super().__init__(
            describe_vllm(
                self._facts,
                dtype=dtype,
                max_context_length=max_context_length,
                record_routes=record_routes,
            )
        )
        self._is_reload_open = False
        self._layer_order = LayerOrder()
        options = engine_options(
            model_dir,
            self._description,
            max_batch_size=max_batch_size,
            kv_cache_gib=kv_cache_gib,
            gpu_memory_utilization=gpu_memory_utilization,
        )
        self._vllm = start_vllm(
            options,
            tensor_parallel_size=tensor_parallel_size,
            max_num_batched_tokens=max_tokens_per_forward,
        )
        self._capacity = capacity_of(self._vllm.vllm_config)
        self._stepper = VllmStepper(
            self._vllm,
            sleeps=self._vllm.vllm_config.model_config.enable_sleep_mode,
            in_step=tensor_parallel_size > 1,
        )

    @property
    def capacity(self) -> CacheCapacity:
        """How many sequences the key-value cache holds at once."""
        return self._capacity

    @property
    def progress(self) -> RolloutProgress:
        """How far the running calls of `generate` are, of all threads and ranks of this engine."""
        return self._stepper.progress

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Complete every request; the groups come back in the order of ``requests``.

        Raises:
            RecipeError: when a sampling setting is out of range.
            EngineError: when a request is malformed or too long, vLLM fails, or the engine is
                closed.
        """
        from moe_replay.engines.vllm.sampler import asked_of, ticket_of

        # A closed engine has no group of ranks left; in a broken one all ranks go on together.
        self._check_state("ready", "broken")
        check_sampling(sampling)
        ranks, own = of_ranks(requests), own_rank()
        # Every rank checks the requests of all, so that a refused request ends all of them.
        for asked in ranks:
            check_requests(
                asked, sampling, description=self._description, vocab_size=self._facts.vocab_size
            )
        # (rank, request, number) of each completion.
        wanted = [
            (rank, request, number)
            for rank, asked in enumerate(ranks)
            for request in asked
            for number in range(request.num_generations)
        ]
        asked = [asked_of(request, number, sampling, self._facts) for _, request, number in wanted]
        tickets = [ticket_of(params) for _, params in asked]
        try:
            policy_version, outputs = self._stepper.run(asked, at_start=self._ready_version)
        except BaseException:
            # The worker must not keep them; one that was closed meanwhile has none.
            with suppress(AttributeError):
                self._take_candidates(tickets)
            raise
        candidates = self._take_candidates(tickets)
        completions = (
            completion_of(
                output,
                request=request,
                number=number,
                facts=self._facts,
                description=self._description,
                policy_version=policy_version,
                layer_order=self._layer_order,
                candidates=kept,
            )
            for (rank, request, number), output, kept in zip(
                wanted, outputs, candidates, strict=True
            )
            if rank == own
        )
        return grouped(requests, completions)

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int
    ) -> None:
        """Replace all weights by ``weights``, named as in a Hugging Face checkpoint.

        The prefix cache, and with it the routes of its rows, is emptied.

        Raises:
            EngineError: when a name is unknown, missing, or of another shape, or the version goes
                backwards. After a failed push the engine refuses to sample until a push succeeds.
        """
        self._check_state("ready", "broken")
        with self._stepper.paused():
            failure = failure_of_ranks(self._load(iter(weights), policy_version))
            if failure is not None:
                raise failure
            self._state = "ready"
            self._policy_version = policy_version

    def close(self) -> None:
        """Release the model and its cache. Calling it twice is allowed."""
        if self._state != "closed":
            self._state = "closed"
            self._stepper.close()
            stop_vllm(self._vllm)
            del self._vllm

    def _take_candidates(self, tickets: Sequence[str | None]) -> list[Candidates | None]:
        """Return the candidates of calls, which this process's worker has kept."""
        if not any(tickets):
            return [None] * len(tickets)
        (taken,) = self._vllm.collective_rpc(partial(_take, tickets=tickets))
        return taken

    def _ready_version(self) -> int:
        """Return the policy version, or raise when the engine must not sample."""
        self._check_state("ready")
        return self._policy_version

    def _load(
        self, weights: Iterator[tuple[str, torch.Tensor]], policy_version: int
    ) -> Exception | None:
        """Load ``weights`` and empty the cache; return what went wrong instead of raising it."""
        try:
            self._check_push(policy_version)
            self._finish_reload()
            self._state = "broken"
            self._reload(weights)
            if not self._vllm.reset_prefix_cache():
                raise EngineError(
                    "vLLM did not empty its prefix cache after a weight push, so prompts would be "
                    "answered from the last policy; push again"
                )
        except Exception as error:  # noqa: BLE001 - the seam: vLLM's loader, and the exporter
            drain(weights, error)
            return error
        return None

    def _reload(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        stream = checked_weights(weights, self._facts)
        self._is_reload_open = True
        try:
            self._vllm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
        except BaseException as error:
            self._finish_reload()
            if isinstance(error, (EngineError, DivergedError)) or not isinstance(error, Exception):
                raise
            raise EngineError(
                f"vLLM failed to load a push: {type(error).__name__}: {error}"
            ) from error
        self._is_reload_open = False

    def _finish_reload(self) -> None:
        """Tell vLLM that no more weights come, if a push broke off.

        Until then layers are empty, or keep the parts that they got and count them as parts of the
        next push: half of one push and all of another gave 11 % right tokens, without an error.
        """
        if self._is_reload_open:
            self._vllm.apply_model(partial(_finish, model_config=self._vllm.model_config))
            self._is_reload_open = False


def _take(worker: Any, *, tickets: Sequence[str | None]) -> list[Candidates | None]:
    from moe_replay.engines.vllm.sampler import processor_of

    processor = processor_of(worker)
    return [None if ticket is None else processor.take(ticket) for ticket in tickets]


def _finish(model: Any, *, model_config: Any) -> None:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)
