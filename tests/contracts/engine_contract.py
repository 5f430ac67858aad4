"""Plain checks of what every engine keeps, over an `EngineCase`; test_engines.py runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
