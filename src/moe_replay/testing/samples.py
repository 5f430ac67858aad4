"""Random samples, and the misalignments that frameworks have shipped, planted on purpose.

In: seeds, samples with traces. Out: samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Bool, Integer

from moe_replay.batch import Sample
from moe_replay.routing import Origin, RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutedSample(Sample):
    """A sample and the trace that an engine would have returned for it."""

    trace: RoutingTrace
    """P + T rows bound to ``token_ids``."""


def with_trace(sample: Sample, trace: RoutingTrace) -> RoutedSample:
    """Return ``sample`` with ``trace``."""
    return RoutedSample(**{f.name: getattr(sample, f.name) for f in fields(Sample)}, trace=trace)


def make_samples(
    count: int, *, seed: int, vocab_size: int = 99, min_length: int = 8, max_length: int = 24
) -> list[Sample]:
    """Return ``count`` samples of random tokens with prompts of 4, without traces."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        length = int(rng.integers(min_length, max_length + 1))
        samples.append(
            Sample(
                sample_id=number,
                token_ids=rng.integers(4, vocab_size, length).astype(np.int32),
                prompt_length=4,
                rollout_logprobs=np.zeros(length - 4, dtype=np.float32),
                advantage=1.0,
                trains=True,
            )
        )
    return samples


def with_routes(
    sample: RoutedSample,
    expert_ids: Integer[np.ndarray, "tokens layers topk"],
    *,
    valid: Bool[np.ndarray, " tokens"] | None = None,
) -> RoutedSample:
    """Return ``sample`` with other routes, bound to its tokens as if an engine had reported them.

    The binding holds, so that only a comparison with the model's own routing can find out that they
    are wrong.
    """
    before = sample.trace
    trace = RoutingTrace.record(
        expert_ids,
        token_ids=sample.token_ids,
        valid=before.valid if valid is None else valid,
        layers=before.layers,
        num_experts=before.num_experts,
        origin=Origin.single(
            engine="planted", engine_version="0", policy_version=0, num_rows=len(expert_ids)
        ),
    )
    return replace(sample, trace=trace)


def random_routes(
    rng: np.random.Generator, like: Integer[np.ndarray, "tokens layers topk"], num_experts: int
) -> Integer[np.ndarray, "tokens layers topk"]:
    """Return routes of random distinct experts in the shape of ``like``."""
    noise = rng.random((*like.shape[:2], num_experts))
    return noise.argsort(axis=2)[..., : like.shape[2]]


def _each(
    samples: Sequence[RoutedSample], change: Callable[[np.ndarray], np.ndarray]
) -> list[RoutedSample]:
    return [with_routes(s, change(s.trace.expert_ids)) for s in samples]


def shift_tokens(samples: Sequence[RoutedSample], by: int) -> list[RoutedSample]:
    """Give every row the routes of the row ``by`` before it; first and last rows wrap around."""
    return _each(samples, lambda ids: np.roll(ids, by, axis=0))


def shift_layers(samples: Sequence[RoutedSample], by: int) -> list[RoutedSample]:
    """Give every layer the routes of the layer ``by`` before it; the ends wrap around."""
    return _each(samples, lambda ids: np.roll(ids, by, axis=1))


def swap_samples(samples: Sequence[RoutedSample]) -> list[RoutedSample]:
    """Give every sample the routes of the next one, repeated or cut to its own length."""
    swapped = []
    for sample, other in zip(samples, [*samples[1:], samples[0]], strict=True):
        ids = np.resize(
            other.trace.expert_ids, (len(sample.token_ids), *other.trace.expert_ids.shape[1:])
        )
        swapped.append(with_routes(sample, ids))
    return swapped


def randomise_routes(samples: Sequence[RoutedSample], *, seed: int) -> list[RoutedSample]:
    """Give every row random experts."""
    rng = np.random.default_rng(seed)
    return _each(samples, lambda ids: random_routes(rng, ids, samples[0].trace.num_experts))
