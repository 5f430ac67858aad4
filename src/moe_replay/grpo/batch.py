"""The station between sampling and learning: samples, their microbatches, and the routes that this rank replays.

In: a rollout with rewards. Out: StepBatch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_replay.batch import (
    Microbatch,
    Sample,
    build_microbatch,
    plan_microbatches,
)
from moe_replay.batch.packing import split_to
from moe_replay.engines.types import FinishReason
from moe_replay.grpo.rollout import Rollout, Scored
from moe_replay.grpo.run import Run
from moe_replay.megatron.ranks.sharing import SharedCompletion, share_completions, share_routes
from moe_replay.routing import Coverage, LiveReason, RouteSlice, Routing, RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MiniBatch:
    """What one optimizer step learns from, on this rank."""

    samples: tuple[Sample, ...]
    """Of this replica, without traces."""
    microbatches: tuple[Microbatch, ...]
    """The same, packed; every rank of the run has equally many."""

    def with_routes(self, routes: Mapping[int, RouteSlice]) -> MiniBatch:
        """Return the mini-batch with recorded routes (microbatch key -> routes)."""
        return replace(
            self,
            microbatches=tuple(replace(m, routes=routes[m.key]) for m in self.microbatches),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrigin:
    """Where a sample comes from, in words that hold on every rank."""

    number: int
    """Of the sample among those of the step: prompt after prompt, completion after completion."""
    item: int
    """Dataset item of its prompt."""
    completion: int
    """Its number among the completions of the prompt."""
    server: str
    """Address of the server that sampled it; empty for an engine in a trainer's process."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepBatch:
    """What a step learns from, on this rank."""

    minibatches: tuple[MiniBatch, ...]
    """One for each optimizer step."""
    origins: tuple[SampleOrigin, ...]
    """By ``sample_id``."""
    coverage: Coverage
    """Rows of the tokens sampled here, and of this rank's padding: those with a route, and the others by reason."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All samples of this replica."""
        return tuple(sample for part in self.minibatches for sample in part.samples)

    @property
    def microbatches(self) -> list[Microbatch]:
        """All microbatches, with keys from 0."""
        return [microbatch for part in self.minibatches for microbatch in part.microbatches]

    @property
    def route_bytes(self) -> int:
        """Bytes of the routes that this rank holds."""
        return sum(m.routes.nbytes for m in self.microbatches if m.routes is not None)


def make_batch(run: Run, rollout: Rollout, scored: Scored) -> StepBatch:
    """Join prompts, completions and advantages, pack them, and bring each rank the routes that it replays (R3).

    The traces of the rollout are let go: what a rank needs of them is in its microbatches.

    Raises:
        CoverageError: when too few rows of what trains can be replayed; nothing has been learned then.
        TokenMismatchError: when a trace is bound to other tokens than its sample has.
    """
    samples, traces, origins = _make_samples(run, rollout, scored)
    rollout.traces.clear()
    size = len(samples) // run.recipe.batch.steps_per_generation
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    minibatches = _pack(run, parts)
    if run.mode.passes.engine is not Routing.RECORD:
        return StepBatch(minibatches=minibatches, origins=origins, coverage=Coverage())
    coverage = _coverage(run, minibatches, traces)
    batch = StepBatch(minibatches=minibatches, origins=origins, coverage=coverage)
    # An engine that gave up on a request may have no routes of it, and nothing is learned from it.
    learned = {sample.sample_id for sample in samples if sample.trains}
    _coverage(
        run, minibatches, {number: trace for number, trace in traces.items() if number in learned}
    ).require(run.min_coverage)
    shared = share_routes(run.replica, batch.microbatches, traces)
    return with_routes(batch, {m.key: m.routes for m in shared if m.routes is not None})


def with_routes(batch: StepBatch, routes: Mapping[int, RouteSlice]) -> StepBatch:
    """Return the batch with routes (microbatch key -> routes)."""
    return replace(batch, minibatches=tuple(part.with_routes(routes) for part in batch.minibatches))


def without(batch: StepBatch, dropped: Collection[int]) -> StepBatch:
    """Return the batch in which the samples ``dropped`` (sample ids) do not train.

    They stay in their microbatches, and count in the denominators of the loss as other untrained samples do: not at all.
    """
    if not dropped:
        return batch

    def change(samples: Sequence[Sample]) -> tuple[Sample, ...]:
        return tuple(
            replace(sample, trains=False) if sample.sample_id in dropped else sample
            for sample in samples
        )

    return replace(
        batch,
        minibatches=tuple(
            MiniBatch(
                samples=change(part.samples),
                microbatches=tuple(
                    replace(m, samples=change(m.samples)) for m in part.microbatches
                ),
            )
            for part in batch.minibatches
        ),
    )


def recorded_coverage(run: Run, batch: StepBatch) -> Coverage:
    """Count what a recording pass covers: every row of a token."""
    own = sum(len(sample.token_ids) for sample in batch.samples if sample.sampled_here)
    return Coverage.total([Coverage(num_replayed=own), _padding(run, batch.minibatches)])


def _make_samples(
    run: Run, rollout: Rollout, scored: Scored
) -> tuple[list[Sample], dict[int, RoutingTrace], tuple[SampleOrigin, ...]]:
    """Return the samples of this replica in the order of the prompts, the traces of those sampled here, and all origins."""
    own = [
        SharedCompletion(
            place=place,
            number=number,
            token_ids=completion.token_ids,
            rollout_logprobs=completion.rollout_logprobs,
            finish_reason=completion.finish_reason,
            server=completion.server,
        )
        for place, group in zip(rollout.places, rollout.groups, strict=True)
        for number, completion in enumerate(group.completions)
    ]
    here = {(completion.place, completion.number) for completion in own}
    untrained = {FinishReason.ABORTED}
    if run.recipe.grpo.overlong_filter:
        untrained.add(FinishReason.LENGTH)
    samples: list[Sample] = []
    origins: list[SampleOrigin] = []
    traces: dict[int, RoutingTrace] = {}
    for completion in share_completions(run.replica, own):
        prompt = rollout.prompts[completion.place]
        key = (completion.place, completion.number)
        sample = Sample(
            sample_id=len(samples),
            token_ids=np.concatenate([prompt.prompt_ids, completion.token_ids]),
            prompt_length=len(prompt.prompt_ids),
            rollout_logprobs=completion.rollout_logprobs,
            advantage=float(scored.advantages[key]),
            trains=completion.finish_reason not in untrained and bool(scored.counts[key]),
            server=completion.server,
            sampled_here=key in here,
            trace=None,
        )
        samples.append(sample)
        origins.append(
            SampleOrigin(
                number=completion.place * run.recipe.rollout.num_generations + completion.number,
                item=prompt.index,
                completion=completion.number,
                server=completion.server,
            )
        )
        trace = rollout.traces.get(key)
        if trace is not None:
            trace.check_tokens(sample.token_ids, where=f"sample {sample.sample_id}")
            traces[sample.sample_id] = trace
    return samples, traces, tuple(origins)


def _pack(run: Run, parts: Sequence[Sequence[Sample]]) -> tuple[MiniBatch, ...]:
    """Pack mini-batches into microbatches, equally many on every rank: experts may be spread over replicas."""
    batch = run.recipe.batch
    lengths = [[len(sample.token_ids) for sample in part] for part in parts]
    plans = [
        plan_microbatches(
            each, max_tokens=batch.max_tokens_per_microbatch, max_samples=batch.micro_batch_size
        )
        for each in lengths
    ]
    gathered = run.gather([len(plan) for plan in plans])
    for number, plan in enumerate(plans):
        most = max(counts[number] for counts in gathered)
        plans[number] = split_to(
            plan, lengths[number], run.recipe.megatron.round_up_microbatches(most)
        )
    row_multiple = _row_multiple(run, plans, lengths)
    minibatches = []
    key = 0
    for part, plan in zip(parts, plans, strict=True):
        microbatches = []
        for group in plan:
            samples = [part[position] for position in group]
            microbatches.append(
                build_microbatch(key, samples, place=run.actor.place, row_multiple=row_multiple)
            )
            key += 1
        minibatches.append(MiniBatch(samples=tuple(part), microbatches=tuple(microbatches)))
    return tuple(minibatches)


def _row_multiple(
    run: Run, plans: Sequence[Sequence[Sequence[int]]], lengths: Sequence[Sequence[int]]
) -> int:
    """Return what every microbatch's rows are padded to: 1, or with an all-gather the longest of all ranks."""
    if run.recipe.megatron.moe_token_dispatcher_type != "allgather":
        return 1
    longest = max(
        len(run.actor.place.row_index([sizes[position] for position in group]).rows)
        for plan, sizes in zip(plans, lengths, strict=True)
        for group in plan
    )
    return max(run.gather(longest))


def _coverage(
    run: Run, minibatches: Sequence[MiniBatch], traces: Mapping[int, RoutingTrace]
) -> Coverage:
    prompts = {s.sample_id: s.prompt_length for part in minibatches for s in part.samples}
    return Coverage.total(
        [
            _padding(run, minibatches),
            *(
                Coverage.of_rows(trace.valid, prompt_length=prompts[sample_id])
                for sample_id, trace in traces.items()
            ),
        ]
    )


def _padding(run: Run, minibatches: Sequence[MiniBatch]) -> Coverage:
    """Count this rank's padding rows; of the pipeline stages, which all see the same rows, the last one counts."""
    rows = sum(m.num_padding_rows for part in minibatches for m in part.microbatches)
    return Coverage(num_live={LiveReason.PADDING: rows if run.replica.is_last_stage else 0})
