"""The station between sampling and learning: samples, microbatches, and this rank's routes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count

import numpy as np

from moe_replay.batch import Microbatch, Sample, build_microbatch, plan_microbatches
from moe_replay.batch.balance import deal, work_of
from moe_replay.batch.packing import spread_over
from moe_replay.engines.types import Completion, FinishReason
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import Rollout, SampleOrigin, Scored, StepBatch
from moe_replay.megatron.ranks.dealing import Key, hand_over
from moe_replay.megatron.ranks.repacking import repack_routes
from moe_replay.megatron.ranks.sharing import share_completions, share_routes
from moe_replay.routing import Coverage, LiveReason, Routing, RoutingTrace


def make_batch(run: Run, rollout: Rollout, scored: Scored) -> StepBatch:
    """Join prompts, completions and advantages, pack them, and bring each rank its routes (R3).

    The traces of the rollout are emptied: what a rank needs of them is in its microbatches.

    Raises:
        CoverageError: when too few rows of what trains can be replayed; nothing is learned then.
        TokenMismatchError: when a trace is bound to other tokens than its sample has.
    """
    parts, traces, origins = _make_samples(run, rollout, scored)
    rollout.traces.clear()
    samples = list(chain.from_iterable(parts))
    batch = run.recipe.batch
    limits = (batch.max_tokens_per_microbatch, batch.micro_batch_size)
    minibatches = _pack(run, parts, *limits)
    scoring: tuple[Microbatch, ...] = ()
    budget = batch.max_tokens_per_scoring_microbatch
    if budget is not None and (run.recipe.why_old_pass or run.reference is not None):
        (scoring,) = _pack(run, [samples], budget, None)
    coverage = Coverage()
    if run.mode.replays:
        padding = _padding(run, chain.from_iterable(minibatches))
        coverage = Coverage.total([padding, *_rows(run, samples, traces)])
    batch = StepBatch(minibatches=minibatches, scoring=scoring, origins=origins, coverage=coverage)
    if run.mode.passes.engine is not Routing.RECORD:
        return batch
    # An engine that gave up on a request may have no routes of it, and nothing is learned from it.
    learned = [sample for sample in samples if sample.trains]
    here = Coverage.total(_rows(run, learned, traces))
    # Of the step, on every rank: one rank may hold a single sample.
    Coverage.total(run.ranks.gather(here)).require(run.min_coverage)
    batch = batch.with_routes(share_routes(run.replica, batch.microbatches, traces))
    if scoring:
        shared = {m.key: m.routes for m in batch.microbatches if m.routes is not None}
        routes = repack_routes(run.replica, shared, batch.microbatches, scoring)
        batch = batch.with_scoring_routes(routes)
    # The next station begins with collectives of the device, which give up after ten minutes on a
    # rank that has more to share.
    run.ranks.barrier()
    return batch


def _make_samples(
    run: Run, rollout: Rollout, scored: Scored
) -> tuple[list[list[Sample]], dict[int, RoutingTrace], tuple[SampleOrigin, ...]]:
    """Return this replica's samples by mini-batch, traces that this rank holds, and all origins."""
    own = {
        (index, number): completion
        for index, group in zip(rollout.own, rollout.groups, strict=True)
        for number, completion in enumerate(group.completions)
    }
    everyone = run.ranks.gather({key: len(completion.token_ids) for key, completion in own.items()})
    rank_of = {key: rank for rank, part in enumerate(everyone) for key in part}
    num_tokens = {key: count for part in everyone for key, count in part.items()}
    own, held = _held_here(run, rollout, own, num_tokens)
    untrained = {FinishReason.ABORTED}
    if run.recipe.grpo.overlong_filter:
        untrained.add(FinishReason.LENGTH)
    parts: list[list[Sample]] = [[] for _ in range(run.recipe.batch.steps_per_generation)]
    origins: list[SampleOrigin] = []
    traces: dict[int, RoutingTrace] = {}
    for key, completion in share_completions(run.replica, own).items():
        place, number = key
        prompt = rollout.prompts[place]
        sample = Sample(
            sample_id=len(origins),
            token_ids=np.concatenate([prompt.prompt_ids, completion.token_ids]),
            prompt_length=len(prompt.prompt_ids),
            rollout_logprobs=completion.rollout_logprobs,
            advantage=float(scored.advantages[key]),
            trains=completion.finish_reason not in untrained and bool(scored.counts[key]),
            server=completion.server,
            reported_here=key in own,
            turn_mask=completion.turn_mask,
            candidates=completion.candidates,
        )
        parts[_minibatch_of(run, place)].append(sample)
        origins.append(
            SampleOrigin(
                index=place * run.recipe.rollout.num_generations + number,
                item=prompt.index,
                completion=number,
                server=completion.server,
                policy_version=completion.oldest_version,
                rank=rank_of[key],
            )
        )
        if key in held:
            traces[sample.sample_id] = held[key]
    return parts, traces, tuple(origins)


def _held_here(
    run: Run, rollout: Rollout, own: dict[Key, Completion], num_tokens: Mapping[Key, int]
) -> tuple[dict[Key, Completion], dict[Key, RoutingTrace]]:
    """Return the completions and traces that this rank brings to its replica; collective.

    They are those that it sampled (``own``), unless ``batch.balance`` deals all, of ``num_tokens``,
    by their work.
    """
    if not run.recipe.batch.balance or run.replica.num_replicas == 1:
        return own, dict(rollout.traces)
    lengths = {
        key: len(rollout.prompts[key[0]].prompt_ids) + count for key, count in num_tokens.items()
    }
    to: dict[Key, int] = {}
    for update in range(run.recipe.batch.steps_per_generation):
        keys = sorted(key for key in lengths if _minibatch_of(run, key[0]) == update)
        dealt = deal(_work(run, [lengths[key] for key in keys]), run.replica.num_replicas)
        assert dealt is not None
        to |= {keys[at]: number for number, part in enumerate(dealt) for at in part}
    return hand_over(run.replica, own, rollout.traces, to)


def _minibatch_of(run: Run, place: int) -> int:
    """Return the mini-batch that learns from the step's prompt number ``place``."""
    return place * run.recipe.batch.steps_per_generation // run.recipe.prompts_per_step


def _work(run: Run, lengths: Sequence[int]) -> list[float]:
    return [work_of(length, run.even_length) for length in lengths]


def _pack(
    run: Run,
    parts: Sequence[Sequence[Sample]],
    max_tokens: int | None,
    max_samples: int | None,
) -> tuple[tuple[Microbatch, ...], ...]:
    """Pack mini-batches into microbatches, equally many on every rank: experts may span replicas.

    Example: a mini-batch fills 3 microbatches on one replica and 5 on another. Both run 5; with an
    interleaved pipeline of 2 stages both run 6. One with fewer samples runs some of padding alone.
    """
    lengths = [[len(sample.token_ids) for sample in part] for part in parts]
    limits = {"max_tokens": max_tokens, "max_samples": max_samples}
    plans = [plan_microbatches(each, **limits) for each in lengths]
    gathered = run.ranks.gather([len(plan) for plan in plans])
    for update, plan in enumerate(plans):
        largest = max(counts[update] for counts in gathered)
        plans[update] = spread_over(
            plan,
            run.recipe.megatron.round_up_microbatches(largest),
            lengths=lengths[update],
            work=_work(run, lengths[update]),
            **limits,
        )
    row_multiple = _row_multiple(run, plans, lengths)
    key = count()
    # Of another sample where a microbatch has none: a replica has at least one in each step.
    spare = next(sample.token_ids for part in parts for sample in part)
    return tuple(
        tuple(
            build_microbatch(
                next(key),
                [part[position] for position in group],
                place=run.actor.place,
                row_multiple=row_multiple,
                spare_ids=spare if not group else None,
            )
            for group in plan
        )
        for part, plan in zip(parts, plans, strict=True)
    )


def _row_multiple(
    run: Run, plans: Sequence[Sequence[Sequence[int]]], lengths: Sequence[Sequence[int]]
) -> int:
    """Return what rows are padded to: 1, or for an all-gather the longest of all ranks."""
    if run.recipe.megatron.moe_token_dispatcher_type != "allgather":
        return 1
    longest = max(
        len(run.actor.place.row_index([sizes[position] for position in group]).rows)
        for plan, sizes in zip(plans, lengths, strict=True)
        for group in plan
    )
    return max(run.ranks.gather(longest))


def _rows(
    run: Run, samples: Sequence[Sample], traces: Mapping[int, RoutingTrace]
) -> list[Coverage]:
    """Count the rows of the samples reported here: those that the mode replays, and the others."""
    own = [sample for sample in samples if sample.reported_here]
    if run.mode.passes.old is Routing.RECORD:
        # A recording pass covers every row of a token.
        return [Coverage(num_replayed=len(sample.token_ids)) for sample in own]
    return [
        Coverage.of_rows(
            traces[sample.sample_id].valid,
            prompt_length=sample.prompt_length,
            is_sampled=sample.is_sampled,
        )
        for sample in own
        if sample.sample_id in traces
    ]


def _padding(run: Run, microbatches: Iterable[Microbatch]) -> Coverage:
    """Count this rank's padding rows.

    Pipeline stages all see the same rows, so the last one counts.
    """
    rows = sum(microbatch.num_padding_rows for microbatch in microbatches)
    return Coverage(num_live={LiveReason.PADDING: rows if run.replica.is_last_stage else 0})
