"""The embedded engine: a transformers model in this process, which samples in batches and records its own routes.

In: a checkpoint directory, requests, weights. Out: completions with routes. Called by: grpo.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped

from moe_replay.errors import EngineError, RecipeError, UnsupportedError
from moe_replay.rollout.sampling import check_sampling, completion_noise, sample_tokens
from moe_replay.rollout.types import (
    Completion,
    EngineDescription,
    FinishReason,
    Request,
    RolloutGroup,
    SamplingParams,
)
from moe_replay.routing import Origin, RoutingTrace, expert_dtype
from moe_replay.transformers.record import RouteRecorder, find_routers, record_routes
from moe_replay.transformers.weights import CheckpointViews

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Finished sequences leave the batch once they are this share of it; copying the cache each time one ends costs more
# than the few rows that wait.
_COMPACT_FRAC = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One completion to sample."""

    request: int
    """Position of its request in the call."""
    completion: int
    """Number among the request's completions."""


class EmbeddedEngine:
    """Samples from a Hugging Face model with a KV cache; routes are recorded at the router modules.

    Every distinct prompt of a batch is run once, whatever the number of its completions. The noise of a completion
    depends on the sampling seed, its request and its number alone, so the batch it runs in does not matter beyond
    the rounding of the model's number format.

    Example:
        >>> engine = EmbeddedEngine("checkpoints/tiny", dtype="float32")
        >>> groups = engine.generate(requests, SamplingParams(max_completion_length=64))
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: Literal["float32", "bfloat16"],
        device: str = "cpu",
        max_batch_size: int = 128,
        record_routes: bool = True,
        num_threads: int | None = None,
    ) -> None:
        import transformers

        if dtype not in _DTYPES:
            raise RecipeError(
                f"the embedded engine has dtype {dtype}, expected one of {list(_DTYPES)}"
            )
        if max_batch_size < 1:
            raise RecipeError(f"max_batch_size is {max_batch_size}, expected at least 1")
        self._model = _load_model(Path(model_dir), _DTYPES[dtype], device)
        self._device = torch.device(device)
        self._max_batch_size = max_batch_size
        self._num_threads = num_threads
        self._views = CheckpointViews(self._model)
        self._eos_ids = _eos_ids(self._model)
        self._policy_version = 0
        self._state: Literal["ready", "broken", "closed"] = "ready"
        config = self._model.config.get_text_config()
        self._vocab_size: int = config.vocab_size
        sites = find_routers(self._model) if record_routes or _is_moe(config) else ()
        self._description = EngineDescription(
            name="embedded",
            version=transformers.__version__,
            dtype=dtype,
            records_routes=bool(sites) and record_routes,
            moe_layers=tuple(site.layer for site in sites),
            num_experts=sites[0].num_experts if sites else 0,
            topk=sites[0].topk if sites else 0,
            max_context_length=config.max_position_embeddings,
        )

    @property
    def description(self) -> EngineDescription:
        """What this engine is and can return."""
        return self._description

    @property
    def policy_version(self) -> int:
        """Weight pushes received so far."""
        return self._policy_version

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Complete every request; the groups come back in the order of ``requests``.

        Raises:
            RecipeError: when a sampling setting is out of range.
            EngineError: when a request is malformed or leaves no room in the context, or the engine is closed.
        """
        self._check_ready()
        check_sampling(sampling)
        for request in requests:
            self._check_request(request, sampling)
        if len({request.request_id for request in requests}) < len(requests):
            raise EngineError(
                "two requests have one request_id; they would sample with the same noise"
            )
        # Prompts of like length share a batch, which keeps padding short.
        order = sorted(range(len(requests)), key=lambda r: (len(requests[r].prompt_ids), r))
        jobs = [
            _Job(request=r, completion=c) for r in order for c in range(requests[r].num_generations)
        ]
        done: dict[_Job, Completion] = {}
        with _threads(self._num_threads), torch.inference_mode():
            for start in range(0, len(jobs), self._max_batch_size):
                batch = jobs[start : start + self._max_batch_size]
                done.update(zip(batch, self._complete(batch, requests, sampling), strict=True))
        return [
            RolloutGroup(
                request=request,
                completions=tuple(
                    done[_Job(request=r, completion=c)] for c in range(request.num_generations)
                ),
            )
            for r, request in enumerate(requests)
        ]

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int
    ) -> None:
        """Replace all weights by ``weights`` (Hugging Face checkpoint names) and adopt ``policy_version``.

        Raises:
            EngineError: when a name is unknown, missing, or of another shape, or the version goes backwards. After
                a failed push the engine refuses to sample until a push succeeds.
        """
        if self._state == "closed":
            raise EngineError("the embedded engine is closed; make a new one")
        if policy_version < self._policy_version:
            raise EngineError(
                f"policy_version {policy_version} was pushed after {self._policy_version}; versions count pushes, so "
                "a stale trainer is pushing"
            )
        self._state = "broken"
        self._views.copy(weights)
        self._state = "ready"
        self._policy_version = policy_version

    def close(self) -> None:
        """Release the model. Calling it twice is allowed."""
        if self._state != "closed":
            self._state = "closed"
            del self._model, self._views

    def _check_ready(self) -> None:
        if self._state == "closed":
            raise EngineError("the embedded engine is closed; make a new one")
        if self._state == "broken":
            raise EngineError(
                "the last weight push failed half-way, so the engine holds weights of two policies; push again"
            )

    def _check_request(self, request: Request, sampling: SamplingParams) -> None:
        where = f"embedded: request {request.request_id}"
        prompt, room = request.prompt_ids, self._description.max_context_length
        if len(prompt) == 0 or request.num_generations < 1:
            raise EngineError(
                f"{where} has {len(prompt)} prompt tokens and asks for {request.num_generations} completions, "
                "expected at least one of each"
            )
        if prompt.min() < 0 or prompt.max() >= self._vocab_size:
            raise EngineError(
                f"{where} has token ids {prompt.min()} to {prompt.max()}, expected 0 to {self._vocab_size - 1}; the "
                "tokenizer belongs to another model"
            )
        if len(prompt) + sampling.max_completion_length > room:
            raise EngineError(
                f"{where}: a prompt of {len(prompt)} tokens and max_completion_length "
                f"{sampling.max_completion_length} exceed the model's context of {room}; shorten one of them"
            )

    def _complete(
        self, jobs: Sequence[_Job], requests: Sequence[Request], sampling: SamplingParams
    ) -> list[Completion]:
        with ExitStack() as scope:
            recorder = (
                scope.enter_context(record_routes(self._model))
                if self._description.records_routes
                else None
            )
            batch = _Batch(jobs, requests, sampling, self._model, recorder, self._device)
            stops = torch.tensor(
                sorted({*self._eos_ids, *sampling.stop_token_ids}),
                dtype=torch.int64,
                device=self._device,
            )
            for position in range(sampling.max_completion_length):
                batch.sample(position, sampling, stops)
                if not batch.num_running or position + 1 == sampling.max_completion_length:
                    break
                batch.compact()
                batch.feed(position)
        return [self._completion(batch, row, requests[job.request]) for row, job in enumerate(jobs)]

    def _completion(self, batch: _Batch, row: int, request: Request) -> Completion:
        length, stopped = int(batch.lengths[row]), bool(batch.stopped[row])
        token_ids = batch.token_ids[row, :length].cpu().numpy().astype(np.int32)
        routes = batch.routes_of(row, length)
        trace = None
        if routes is not None:
            valid = np.ones(len(routes), dtype=bool)
            valid[-1] = False
            trace = RoutingTrace.record(
                routes,
                token_ids=np.concatenate([request.prompt_ids, token_ids]),
                valid=valid,
                layers=self._description.moe_layers,
                num_experts=self._description.num_experts,
                origin=Origin.single(
                    engine=self._description.name,
                    engine_version=self._description.version,
                    policy_version=self._policy_version,
                    num_rows=len(routes),
                ),
            )
        return Completion(
            token_ids=token_ids,
            rollout_logprobs=batch.rollout_logprobs[row, :length].cpu().numpy(),
            trace=trace,
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
            policy_version=self._policy_version,
        )


class _Batch:
    """Sequences that are sampled together: their cache, and what came of each job so far.

    ``jobs`` are rows of the results; ``_job_of_row`` says which of them each row of the cache is, as finished ones
    leave. Prompts are padded on the left, so that all rows share the position at which they grow.
    """

    def __init__(
        self,
        jobs: Sequence[_Job],
        requests: Sequence[Request],
        sampling: SamplingParams,
        model: Any,
        recorder: RouteRecorder | None,
        device: torch.device,
    ) -> None:
        num_jobs, limit = len(jobs), sampling.max_completion_length
        self._model, self._recorder, self._device = model, recorder, device
        self.token_ids = torch.zeros(num_jobs, limit, dtype=torch.int64, device=device)
        self.rollout_logprobs = torch.zeros(num_jobs, limit, dtype=torch.float32, device=device)
        self.lengths = np.zeros(num_jobs, dtype=np.int64)
        self.stopped = np.zeros(num_jobs, dtype=bool)
        noise = np.stack(
            [
                completion_noise(
                    seed=sampling.seed,
                    request_id=requests[job.request].request_id,
                    completion=job.completion,
                    length=limit,
                )
                for job in jobs
            ]
        )
        self._noise = torch.from_numpy(noise).to(device)
        self._job_of_row = np.arange(num_jobs)
        self._running: Bool[np.ndarray, " rows"] = np.ones(num_jobs, dtype=bool)
        self._completion_routes: Shaped[np.ndarray, "jobs tokens layers topk"] | None = None
        if recorder is not None:
            shape = (num_jobs, limit, len(recorder.layers), recorder.topk)
            self._completion_routes = np.zeros(shape, dtype=expert_dtype(recorder.num_experts))
        self._prefill(jobs, requests, limit)

    @property
    def num_running(self) -> int:
        """Sequences that have not ended."""
        return int(self._running.sum())

    def sample(
        self, position: int, sampling: SamplingParams, stops: Int64[torch.Tensor, " stops"]
    ) -> None:
        """Draw the token of ``position`` for every running row, and see which rows it ends."""
        rows = torch.from_numpy(self._job_of_row).to(self._device)
        ids, logprobs = sample_tokens(
            self._logits,
            self._noise[rows, position],
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        self.token_ids[rows, position] = ids
        self.rollout_logprobs[rows, position] = logprobs
        self._last_ids = ids
        ends = torch.isin(ids, stops).cpu().numpy() & self._running
        self.lengths[self._job_of_row[self._running]] = position + 1
        self.stopped[self._job_of_row[ends]] = True
        self._running = self._running & ~ends

    def compact(self) -> None:
        """Drop ended rows from the cache when there are enough of them."""
        if self.num_running > (1 - _COMPACT_FRAC) * len(self._running):
            return
        kept = torch.from_numpy(np.flatnonzero(self._running)).to(self._device)
        self._cache.batch_select_indices(kept)
        self._mask = None if self._mask is None else self._mask[kept]
        self._last_ids = self._last_ids[kept]
        self._prompt_lengths = self._prompt_lengths[kept]
        self._job_of_row = self._job_of_row[self._running]
        self._running = np.ones(len(self._job_of_row), dtype=bool)

    def feed(self, position: int) -> None:
        """Run the tokens drawn at ``position``, and record the experts that they used."""
        width = self._width + position + 1
        output = self._model(
            input_ids=self._last_ids[:, None],
            attention_mask=None if self._mask is None else self._mask[:, :width],
            position_ids=(self._prompt_lengths + position)[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._logits: Float[torch.Tensor, "rows vocabulary"] = output.logits[:, -1]
        if self._recorder is not None and self._completion_routes is not None:
            routes = self._recorder.take().cpu().numpy()
            self._completion_routes[self._job_of_row, position] = routes

    def routes_of(self, row: int, length: int) -> Shaped[np.ndarray, "rows layers topk"] | None:
        """Return the routes of a job's prompt and ``length`` tokens; the last row was never run and holds zeros."""
        if self._completion_routes is None:
            return None
        prompt = self._prompt_routes[self._prompt_of_job[row]]
        routes = np.concatenate([prompt, self._completion_routes[row, :length]])
        routes[-1] = 0
        return routes

    def _prefill(self, jobs: Sequence[_Job], requests: Sequence[Request], limit: int) -> None:
        """Run each distinct prompt once, and give every job a copy of its prompt's cache and logits."""
        from moe_replay.transformers.cache import growing_cache

        chosen = list(dict.fromkeys(job.request for job in jobs))
        place = {request: number for number, request in enumerate(chosen)}
        self._prompt_of_job = np.array([place[job.request] for job in jobs])
        prompts = [requests[request].prompt_ids for request in chosen]
        lengths = np.array([len(prompt) for prompt in prompts])
        self._width = int(lengths.max())
        tokens = np.zeros((len(prompts), self._width), dtype=np.int64)
        mask = np.ones((len(prompts), self._width + limit), dtype=np.int64)
        for number, prompt in enumerate(prompts):
            tokens[number, self._width - len(prompt) :] = prompt
            mask[number, : self._width - len(prompt)] = 0
        positions = np.maximum(np.arange(self._width) - (self._width - lengths)[:, None], 0)
        padded = bool((lengths < self._width).any())

        def upload(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(self._device)

        self._cache = growing_cache(self._model.config, num_tokens=self._width + limit)
        output = self._model(
            input_ids=upload(tokens),
            attention_mask=upload(mask[:, : self._width]) if padded else None,
            position_ids=upload(positions),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if self._recorder is not None:
            routes = self._recorder.take().cpu().numpy()
            routes = routes.reshape(len(prompts), self._width, *routes.shape[1:])
            dtype = expert_dtype(self._recorder.num_experts)
            self._prompt_routes = [
                rows[self._width - length :].astype(dtype)
                for rows, length in zip(routes, lengths, strict=True)
            ]
        expand = upload(self._prompt_of_job)
        self._cache.batch_select_indices(expand)
        self._logits = output.logits[:, -1][expand]
        self._mask = upload(mask)[expand] if padded else None
        self._prompt_lengths = upload(lengths)[expand]


def _load_model(model_dir: Path, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    if not (model_dir / "config.json").is_file():
        raise RecipeError(
            f"{model_dir} holds no config.json; the embedded engine needs a Hugging Face checkpoint directory"
        )
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
    # Copies, because tensors may still be mapped from files that a trainer can overwrite.
    model = model.to(device).eval().requires_grad_(False)
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
    recurrent = sorted({kind for kind in layers if "attention" not in kind or "linear" in kind})
    if recurrent:
        raise UnsupportedError(
            f"{type(model).__name__} has {recurrent} layers; their state cannot skip the padding of a batch, so "
            "the embedded engine would return routes of other sequences than the ones asked for"
        )
    if model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")
    return model


def _is_moe(config: Any) -> bool:
    return bool(getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0))


def _eos_ids(model: Any) -> tuple[int, ...]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Run torch with ``count`` threads inside the scope; None leaves the process's setting alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
