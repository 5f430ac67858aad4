"""Plain checks of what every engine keeps, over an `EngineCase`; test_engines.py runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moe_replay.engines.types import (
    Completion,
    Engine,
    FinishReason,
    Request,
    RolloutGroup,
    SamplingParams,
)
from moe_replay.routing import RoutingTrace

Weights = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCase:
    """An engine under test, and what it may be held to."""

    name: str
    make: Callable[[], Engine]
    make_at: Callable[[int], Engine]
    """Seed -> an engine that starts with those weights, without a push."""
    weights: Callable[[int], Weights]
    """Seed -> a full push; seed 0 is what `make` starts with."""
    forced: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
    """Token ids, seed of the weights -> (logits, routes) of running exactly these tokens, in the
    engine's dtype."""
    vocab_size: int
    exact: bool
    """True: routes and tokens must agree entirely; False: up to the rounding of bfloat16."""


# Share of (token, layer) expert sets on which a bfloat16 engine agrees with a bfloat16 model run at
# once.
BF16_AGREEMENT = 0.9
SAMPLING = SamplingParams(max_completion_length=20, temperature=0.9, seed=11)


def mixed_requests(case: EngineCase, *, count: int = 6, seed: int = 0) -> list[Request]:
    """Return prompts of different lengths that want different numbers of completions."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            request_id=100 + number,
            prompt_ids=rng.integers(4, case.vocab_size, rng.integers(2, 24)).astype(np.int32),
            num_generations=1 + number % 3,
        )
        for number in range(count)
    ]


def long_requests(case: EngineCase, *, seed: int = 1) -> list[Request]:
    """Return prompts that share a beginning, long enough for a prefix cache and chunked prefill."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(4, case.vocab_size, 96)
    tails = [rng.integers(4, case.vocab_size, length) for length in (3, 40, 3)]
    return [
        Request(
            request_id=200 + number,
            prompt_ids=np.concatenate([shared, tail]).astype(np.int32),
            num_generations=2,
        )
        for number, tail in enumerate(tails)
    ]


def completions_of(groups: Sequence[RolloutGroup]) -> list[tuple[Request, Completion]]:
    """Return every completion with its request."""
    return [(group.request, completion) for group in groups for completion in group.completions]


def whole(request: Request, completion: Completion) -> np.ndarray:
    """Return prompt and completion as one array of ids."""
    return np.concatenate([request.prompt_ids, completion.token_ids])


def route_agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the share of (row, layer) pairs whose expert sets are equal."""
    return float((np.sort(ours, axis=-1) == np.sort(theirs, axis=-1)).all(axis=-1).mean())


def forced_agreement(case: EngineCase, groups: Sequence[RolloutGroup], *, seed: int = 0) -> float:
    """Return how far traces agree with running the same tokens through the model at once."""
    ours, theirs = [], []
    for request, completion in completions_of(groups):
        _, routes = case.forced(whole(request, completion), seed)
        assert completion.trace is not None
        ours.append(completion.trace.expert_ids[completion.trace.valid])
        theirs.append(routes[completion.trace.valid])
    return route_agreement(np.concatenate(ours), np.concatenate(theirs))


def forced_logprob_gap(
    case: EngineCase, groups: Sequence[RolloutGroup], temperature: float, *, seed: int = 0
) -> float:
    """Return the mean absolute gap between rollout_logprobs and the model's own, in nats."""
    gaps = []
    for request, completion in completions_of(groups):
        logits, _ = case.forced(whole(request, completion), seed)
        first = len(request.prompt_ids) - 1
        logprobs = torch.log_softmax(torch.from_numpy(logits[first:-1]) / temperature, dim=-1)
        taken = logprobs.gather(1, torch.from_numpy(completion.token_ids.astype(np.int64))[:, None])
        gaps.append(np.abs(taken[:, 0].numpy() - completion.rollout_logprobs))
    return float(np.concatenate(gaps).mean())


def kept_ids(logits: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """Return the ids that a token may be drawn from: top_k, then top_p of what is left, then min_p.

    In float64, with the lower id first among equals.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    order = np.argsort(-p, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    before = np.cumsum(p[order]) - p[order]
    order = order[before < sampling.top_p * p[order].sum()]
    return np.sort(order[p[order] >= sampling.min_p * p[order[0]]])


def truncated_gap(
    case: EngineCase, groups: Sequence[RolloutGroup], sampling: SamplingParams
) -> tuple[float, float, float]:
    """Return how far log-probabilities and masses are from the model's own, and sets that agree.

    The first two are the largest gap in nats and the largest difference, both over the sets that
    came back; the third is a share of the tokens.
    """
    gaps, differences, same = [], [], []
    for request, completion in completions_of(groups):
        assert completion.candidates is not None
        logits, _ = case.forced(whole(request, completion), 0)
        for token, row in enumerate(logits[len(request.prompt_ids) - 1 : -1]):
            ids = completion.candidates.of(token).astype(np.int64)
            same.append(ids.tolist() == kept_ids(row, sampling).tolist())
            scaled = row.astype(np.float64) / sampling.temperature
            among = np.log(np.exp(scaled[ids] - scaled.max()).sum()) + scaled.max()
            every = np.log(np.exp(scaled - scaled.max()).sum()) + scaled.max()
            expected = scaled[completion.token_ids[token]] - among
            gaps.append(abs(expected - completion.rollout_logprobs[token]))
            differences.append(abs(np.exp(among - every) - completion.candidates.kept_mass[token]))
    return max(gaps), max(differences), float(np.mean(same))


def ends_as_it_says(completion: Completion, stops: set[int], max_length: int) -> bool:
    """Tell whether the finish reason fits the tokens: the stop token is kept last and only once."""
    tokens = completion.token_ids.tolist()
    if any(token in stops for token in tokens[:-1]):
        return False
    if completion.finish_reason is FinishReason.STOP:
        return tokens[-1] in stops
    return tokens[-1] not in stops and len(tokens) == max_length


def common_prefix(ours: Completion, theirs: Completion) -> int:
    """Return how many tokens two completions share from the start."""
    pairs = zip(ours.token_ids, theirs.token_ids, strict=False)
    return next(
        (place for place, (a, b) in enumerate(pairs) if a != b),
        min(len(ours.token_ids), len(theirs.token_ids)),
    )


def changed(groups: Sequence[RolloutGroup], **changes: object) -> list[RolloutGroup]:
    """Return the groups with fields of every completion replaced; callables get the completion."""
    return [
        replace(
            group,
            completions=tuple(
                replace(c, **{k: v(c) if callable(v) else v for k, v in changes.items()})
                for c in group.completions
            ),
        )
        for group in groups
    ]


def shifted_ids(trace: RoutingTrace) -> np.ndarray:
    """Return the ids with every routed row one place later, the first twice."""
    ids = trace.expert_ids.copy()
    ids[1:-1] = trace.expert_ids[:-2]
    return ids


def filled_ids(trace: RoutingTrace) -> np.ndarray:
    """Return the ids with a possible route in the last row."""
    ids = trace.expert_ids.copy()
    ids[-1] = ids[0]
    return ids
