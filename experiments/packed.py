"""Sequences through Megatron in packed microbatches, as in training; alone they take 4x as long.

In: rollout groups, a trainer. Out: Measured sequences, as `moe_replay.diagnose` takes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_replay.batch import Sample, build_microbatch
from moe_replay.diagnose import Measured
from moe_replay.diagnose.megatron_trainer import MegatronTrainer
from moe_replay.engines.files.group_log import trace_name
from moe_replay.engines.types import RolloutGroup
from moe_replay.megatron.recorded import gather_traces
from moe_replay.routing import Routing, RoutingTrace, slice_routes

PACKED = 8
"""Sequences a microbatch."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """What Megatron made of a sequence."""

    logprobs: np.ndarray
    """``[sampled]``, in nats, at temperature 1."""
    live: RoutingTrace | None = None
    """Its own routes; None in a pass that replays, and of a dense model."""
    margins: np.ndarray | None = None
    """``[tokens, layers]``, how close each choice was; None where ``live`` is."""


def measure_packed(groups: Iterable[RolloutGroup], trainer: MegatronTrainer) -> Iterator[Measured]:
    """Yield completions, one a prompt, as engine and trainer saw them, live and replayed."""
    waiting: list[RolloutGroup] = []
    for group in groups:
        waiting.append(group)
        if len(waiting) == PACKED:
            yield from _measured(waiting, trainer)
            waiting = []
    if waiting:
        yield from _measured(waiting, trainer)


def _measured(groups: Sequence[RolloutGroup], trainer: MegatronTrainer) -> Iterator[Measured]:
    samples = [sample_of(group, number) for number, group in enumerate(groups)]
    traces = [group.completions[0].trace for group in groups]
    live = score(trainer, samples)
    replayed = [None] * len(samples) if trainer.form is None else score(trainer, samples, traces)
    for group, sample, own, under in zip(groups, samples, live, replayed, strict=True):
        (completion,) = group.completions
        yield Measured(
            name=trace_name(group.request.request_id, 0),
            prompt=group.request.request_id,
            token_ids=sample.token_ids,
            recorded=completion.trace,
            live=own.live,
            rollout_logprobs=completion.rollout_logprobs,
            live_logprobs=own.logprobs,
            replayed_logprobs=None if under is None else under.logprobs,
            margins=own.margins,
        )


def sample_of(group: RolloutGroup, number: int) -> Sample:
    """Return the only completion of a group, as entry ``number`` of a microbatch."""
    (completion,) = group.completions
    return sample(
        group.request.sequence(completion.token_ids), len(group.request.prompt_ids), number
    )


def sample(token_ids: np.ndarray, num_prompt: int, number: int) -> Sample:
    """Return tokens as entry ``number`` of a microbatch."""
    return Sample(
        sample_id=number,
        token_ids=token_ids,
        prompt_length=num_prompt,
        rollout_logprobs=np.zeros(len(token_ids) - num_prompt, dtype=np.float32),
        advantage=0.0,
        trains=False,
    )


def score(
    trainer: MegatronTrainer,
    samples: Sequence[Sample],
    traces: Sequence[RoutingTrace] | None = None,
) -> list[Scored]:
    """Run samples in one microbatch, with their own routes or under ``traces``."""
    scorer, form = trainer.scorer, trainer.form
    microbatch = build_microbatch(0, samples, place=scorer.place)
    if traces is not None:
        routes = slice_routes(traces, microbatch.router_index, layers=sorted(scorer.routers))
        microbatch = replace(microbatch, routes=routes)
        scores = scorer.score([microbatch], temperature=1.0, routing=Routing.REPLAY)
    elif form is None:
        scores = scorer.score([microbatch], temperature=1.0, routing=Routing.LIVE)
    else:
        scores = scorer.score(
            [microbatch], temperature=1.0, routing=Routing.RECORD, with_margins=True
        )
        recorded = gather_traces(
            [microbatch], scores.routes, form, policy_version=0, device=scorer.device
        )
        margins = scores.margins[microbatch.key]
        rows = microbatch.sample_ids[microbatch.router_rows]
        return [
            Scored(
                logprobs=scores.samples[each.sample_id].token_logprobs,
                live=recorded[each.sample_id],
                margins=margins[rows == each.sample_id],
            )
            for each in samples
        ]
    return [Scored(logprobs=scores.samples[each.sample_id].token_logprobs) for each in samples]
