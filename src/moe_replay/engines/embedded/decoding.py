"""One batch of the embedded engine: prefill, sample, feed, and what came of each sequence.

In: jobs, a model, a route recorder. Out: tokens, log-probabilities, candidates and routes by job.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.noise import Drawn, completion_noise, no_numbers, sample_tokens
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.routing import expert_dtype
from moe_replay.routing.candidates import Candidates
from moe_replay.transformers.record import RouteRecorder

# Ended sequences leave the batch once they are this share of it; copying the cache each time one
# ends costs more than the few rows that wait.
_COMPACT_FRAC = 0.25


class Job(NamedTuple):
    """One completion to sample."""

    request: Request
    number: int
    """Index among the request's completions."""


class Batch:
    """Sequences that are sampled together: their cache, and what came of each job so far.

    ``jobs`` are rows of the results; ``_job_of_row`` says which of them each row of the cache is,
    as finished ones leave. Prompts are padded on the left, so that all rows share the position at
    which they grow.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        sampling: SamplingParams,
        model: Any,
        recorder: RouteRecorder | None,
        device: torch.device,
        policy_version: int,
        facts: ModelFacts,
    ) -> None:
        num_jobs, limit = len(jobs), sampling.max_completion_length
        self._sampling, self._model, self._recorder = sampling, model, recorder
        self._device, self._policy_version = device, policy_version
        self._num_known_ids = facts.num_known_ids
        stops = sorted({*facts.eos_ids, *sampling.stop_token_ids})
        self._limits = np.array(
            [job.request.sampling(sampling).max_completion_length for job in jobs]
        )
        self._stops = torch.tensor(stops, dtype=torch.int64, device=device)
        self.token_ids = torch.zeros(num_jobs, limit, dtype=torch.int64, device=device)
        self.rollout_logprobs = torch.zeros(num_jobs, limit, dtype=torch.float32, device=device)
        self.lengths = np.zeros(num_jobs, dtype=np.int64)
        self.stopped = np.zeros(num_jobs, dtype=bool)
        noise = np.stack(
            [
                completion_noise(
                    seed=sampling.seed,
                    request_id=job.request.request_id,
                    completion=job.number,
                    length=limit,
                )
                for job in jobs
            ]
        )
        self._noise = torch.from_numpy(noise).to(device)
        # Of each job the sets of its tokens, and their mass.
        self._sets: list[list[np.ndarray]] = [[] for _ in jobs]
        self._kept_mass = np.ones((num_jobs, limit), dtype=np.float32)
        self._job_of_row = np.arange(num_jobs)
        self._running: Bool[np.ndarray, " rows"] = np.ones(num_jobs, dtype=bool)
        self._completion_routes: Shaped[np.ndarray, "jobs tokens layers topk"] | None = None
        if recorder is not None:
            shape = (num_jobs, limit, len(recorder.layers), recorder.topk)
            self._completion_routes = np.zeros(shape, dtype=expert_dtype(recorder.num_experts))
        self._prefill(jobs, limit)

    @property
    def num_running(self) -> int:
        """Sequences that have not ended."""
        return int(self._running.sum())

    def sample(self, position: int) -> None:
        """Draw the token of ``position`` for every running row, and see which rows it ends."""
        rows = torch.from_numpy(self._job_of_row).to(self._device)
        drawn = sample_tokens(
            self._logits,
            self._noise[rows, position],
            temperature=self._sampling.temperature,
            top_k=self._sampling.top_k,
            top_p=self._sampling.top_p,
            min_p=self._sampling.min_p,
            num_known_ids=self._num_known_ids,
        )
        ids, logprobs = drawn.ids, drawn.rollout_logprobs
        if self._sampling.keeps_candidates:
            logprobs = self._keep_candidates(drawn, position)
        self.token_ids[rows, position] = ids
        self.rollout_logprobs[rows, position] = logprobs
        self._last_ids = ids
        ends, broken = torch.stack([torch.isin(ids, self._stops), logprobs.isnan()]).cpu().numpy()
        if (broken & self._running).any():
            raise no_numbers("embedded", position, self._policy_version)
        ends = ends & self._running
        self.lengths[self._job_of_row[self._running]] = position + 1
        self.stopped[self._job_of_row[ends]] = True
        self._running = self._running & ~ends & (self._limits[self._job_of_row] > position + 1)

    def _keep_candidates(self, drawn: Drawn, position: int) -> Float[torch.Tensor, " rows"]:
        """Note what running rows were drawn from, and return the log-probabilities among it."""
        logprobs, mass = drawn.among_kept()
        self._kept_mass[self._job_of_row, position] = mass.cpu().numpy()
        for row, ids in enumerate(drawn.sets()):
            if self._running[row]:
                self._sets[self._job_of_row[row]].append(ids)
        return logprobs

    def candidates_of(self, row: int, length: int) -> Candidates | None:
        """Return what a job's first ``length`` tokens were drawn from, where that is asked for."""
        if not self._sampling.keeps_candidates:
            return None
        return Candidates.of_sets(self._sets[row][:length], self._kept_mass[row, :length])

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
        """Return the routes of a job's prompt and ``length`` tokens; the last row is 0."""
        if self._completion_routes is None:
            return None
        prompt = self._prompt_routes[self._prompt_of_job[row]]
        routes = np.concatenate([prompt, self._completion_routes[row, :length]])
        routes[-1] = 0
        return routes

    def _prefill(self, jobs: Sequence[Job], limit: int) -> None:
        """Run each distinct prompt once, and copy its cache and logits to each of its jobs.

        Jobs of requests 3, 3 and 5 run the two prompts; rows 0, 0 and 1 become the batch. Prompts
        of 2 and 4 tokens are padded on the left, so their first completion token has index 4 in the
        cache and positions 2 and 4 in the model::

            . . a b | x    positions 0 0 0 1 | 2
            c d e f | y              0 1 2 3 | 4
        """
        from moe_replay.transformers.cache import growing_cache

        chosen = {job.request.request_id: job.request.prompt_ids for job in jobs}
        row_of = {request_id: row for row, request_id in enumerate(chosen)}
        self._prompt_of_job = np.array([row_of[job.request.request_id] for job in jobs])
        prompts = list(chosen.values())
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
