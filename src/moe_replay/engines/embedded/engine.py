"""The embedded engine: a transformers model in this process that samples and records its routes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from moe_replay.checkpoint.facts import read_facts
from moe_replay.checkpoint.files import refuse_non_finite
from moe_replay.checkpoint.stacked import has_usual_names, usual_parts
from moe_replay.engines.checks import check_requests, check_sampling
from moe_replay.engines.embedded.decoding import Batch, Job
from moe_replay.engines.lifecycle import VersionedEngine, describe
from moe_replay.engines.types import (
    Completion,
    FinishReason,
    Request,
    RolloutGroup,
    RolloutProgress,
    SamplingParams,
    grouped,
)
from moe_replay.engines.weight_stream import checked_weights
from moe_replay.errors import CheckpointError, EngineError, RecipeError, UnsupportedError, shortened
from moe_replay.transformers.host_paths import use_host_paths
from moe_replay.transformers.record import record_routes
from moe_replay.transformers.weights import checkpoint_views

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EmbeddedEngine(VersionedEngine):
    """Samples from a Hugging Face model with a KV cache; routes are recorded at the router modules.

    Every distinct prompt of a batch is run once for all its completions. The noise of a completion
    depends only on the sampling seed, its request and its index, so its batch matters only through
    the rounding of the model's number format.

    Examples:
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
    ) -> None:
        import transformers

        if dtype not in _DTYPES:
            raise RecipeError(
                f"the embedded engine has dtype {dtype}, expected one of {list(_DTYPES)}"
            )
        if max_batch_size < 1:
            raise RecipeError(f"max_batch_size is {max_batch_size}, expected at least 1")
        # Refuses what the trainer and every other engine refuse, before memory is taken.
        facts = read_facts(model_dir)
        self._model = load_model(Path(model_dir), _DTYPES[dtype], device)
        self._device = torch.device(device)
        self._max_batch_size = max_batch_size
        self._views = _views_of(self._model)
        # A push holds what the model has, and names that share memory are tied, whatever they are.
        num_names = Counter(view.data_ptr() for view in self._views.values())
        self._facts = replace(
            facts,
            weight_shapes={name: tuple(view.shape) for name, view in self._views.items()},
            tied_names=frozenset(
                name for name, view in self._views.items() if num_names[view.data_ptr()] > 1
            ),
        )
        self._progress = RolloutProgress()
        super().__init__(
            describe(
                facts,
                name="embedded",
                version=transformers.__version__,
                dtype=dtype,
                record_routes=record_routes,
                max_context_length=facts.max_context_length,
            )
        )

    @property
    def progress(self) -> RolloutProgress:
        """How far the running call of `generate` is."""
        return self._progress

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        *,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[RolloutGroup]:
        """Complete every request; the groups come back in the order of ``requests``.

        ``cancelled`` is asked before each token whether the caller still wants them; another thread
        may change its answer.

        Raises:
            RecipeError: when a sampling setting is out of range.
            EngineError: when a request is malformed or leaves no room in the context, the engine is
                closed, or the call was cancelled.
            DivergedError: when the model's logits are not finite.
        """
        self._check_state("ready")
        check_sampling(sampling)
        check_requests(
            requests, sampling, description=self._description, vocab_size=self._facts.vocab_size
        )
        # Prompts of like length share a batch, which keeps padding short.
        by_length = sorted(requests, key=lambda request: len(request.prompt_ids))
        jobs = [
            Job(request, number)
            for request in by_length
            for number in range(request.num_generations)
        ]
        done: list[Completion] = []
        self._progress = RolloutProgress(num_total=len(jobs))
        try:
            with torch.inference_mode():
                for start in range(0, len(jobs), self._max_batch_size):
                    batch = jobs[start : start + self._max_batch_size]
                    done += self._complete(batch, sampling, cancelled)
        finally:
            self._progress = RolloutProgress()
        groups = {group.request.request_id: group for group in grouped(by_length, done)}
        return [groups[request.request_id] for request in requests]

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int
    ) -> None:
        """Replace all weights; after a failed push the engine refuses to sample until one succeeds.

        Raises:
            EngineError: when a push does not fit (see `checked_weights`), or its version goes back.
            DivergedError: when a weight is not finite.
        """
        self._check_push(policy_version)
        self._state = "broken"
        with torch.no_grad():
            for name, tensor in checked_weights(weights, self._facts):
                self._views[name].copy_(tensor)
        self._state = "ready"
        self._policy_version = policy_version

    def close(self) -> None:
        """Release the model. Calling it twice is allowed."""
        if self._state != "closed":
            self._state = "closed"
            del self._model, self._views

    def _complete(
        self,
        jobs: Sequence[Job],
        sampling: SamplingParams,
        cancelled: Callable[[], bool],
    ) -> list[Completion]:
        records = self._description.records_routes
        with record_routes(self._model) if records else nullcontext() as recorder:
            before = self._progress
            batch = Batch(
                jobs,
                sampling,
                self._model,
                recorder,
                self._device,
                self._policy_version,
                self._facts,
            )
            for position in range(sampling.max_completion_length):
                if cancelled():
                    raise EngineError(
                        f"the call was cancelled by its caller before sampled token {position} of "
                        f"{len(jobs)} completions"
                    )
                batch.sample(position)
                self._progress = replace(
                    before,
                    num_finished=before.num_finished + len(jobs) - batch.num_running,
                    num_tokens=before.num_tokens + int(batch.lengths.sum()),
                )
                if not batch.num_running or position + 1 == sampling.max_completion_length:
                    break
                batch.compact()
                batch.feed(position)
        self._progress = replace(self._progress, num_finished=before.num_finished + len(jobs))
        return [self._completion(batch, row, job.request) for row, job in enumerate(jobs)]

    def _completion(self, batch: Batch, row: int, request: Request) -> Completion:
        length, stopped = int(batch.lengths[row]), bool(batch.stopped[row])
        token_ids = batch.token_ids[row, :length].cpu().numpy().astype(np.int32)
        routes = batch.routes_of(row, length)
        trace = None
        if routes is not None:
            trace = self._description.trace(
                routes, request.sequence(token_ids), policy_version=self._policy_version
            )
        return Completion(
            token_ids=token_ids,
            rollout_logprobs=batch.rollout_logprobs[row, :length].cpu().numpy(),
            trace=trace,
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
            policy_version=self._policy_version,
            candidates=batch.candidates_of(row, length),
        )


def _views_of(model: Any) -> dict[str, torch.Tensor]:
    """Return views on a model's memory by the names that a push has: of each expert its own."""
    views = checkpoint_views(model)
    if not has_usual_names(model.config.model_type):
        return dict(views)
    return {
        usual: view if part.expert is None else part.part_of(view)
        for name, view in views.items()
        for usual, part in usual_parts(name, tuple(view.shape), model.config.model_type)
    }


def load_model(model_dir: Path, dtype: torch.dtype, device: str) -> Any:
    """Return a frozen transformers model of a checkpoint, as this engine samples from.

    Raises:
        CheckpointError: when the checkpoint lacks a tensor, or holds one that is not finite.
        UnsupportedError: when its layers have a recurrent state.
    """
    from transformers import AutoModelForCausalLM, DynamicCache

    model, loaded = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    if absent := [*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])]:
        raise CheckpointError(
            f"{model_dir} lacks {shortened(sorted(absent))}, or has them in another shape; "
            "transformers would fill them with random numbers: copy the checkpoint again"
        )
    for name, parameter in model.named_parameters():
        refuse_non_finite(name, parameter)
    if has_usual_names(model.config.model_type):
        # Pushes come under the usual names, also where the checkpoint stacks its experts.
        model._weight_conversions = None
    model = model.to(device).eval().requires_grad_(False)
    if any(DynamicCache(config=model.config).is_linear):
        raise UnsupportedError(
            f"{type(model).__name__} has layers with a recurrent state, which cannot skip the padding "
            "of a batch: its completions would depend on the batch they run in"
        )
    # Copied, because tensors may be mapped from files that a trainer is free to overwrite.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")
    use_host_paths(model)
    return model
