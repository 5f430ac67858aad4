"""With candidates, log-probabilities are those of the distribution that was drawn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.batch import Sample
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.megatron.logprobs import token_statistics
from moe_replay.routing import Routing
from moe_replay.routing.candidates import Candidates
from moe_replay.testing.layouts import layout
from moe_replay.testing.policies import pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import VOCAB_SIZE

from .test_logprobs import _of_one_layer

pytestmark = pytest.mark.ranks
NUM_CASES, NUM_WORDS, WIDTH = 12, 12, 5


def case(seed: int) -> dict[str, Any]:
    """Return random rows with ragged sets: some of one word, some of all, some without any."""
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(1, 9))
    ids = rng.integers(0, NUM_WORDS, tokens)
    sets = []
    for token in ids:
        size = int(rng.integers(0, NUM_WORDS + 1))
        others = rng.choice(NUM_WORDS, size, replace=False)
        sets.append(np.unique(np.append(others, token)) if size else np.empty(0, np.int64))
    return {
        "hidden": rng.normal(size=(tokens, WIDTH)).astype(np.float32),
        "weight": rng.normal(size=(NUM_WORDS, WIDTH)).astype(np.float32),
        "ids": ids,
        "sets": sets,
        "of_logprobs": rng.normal(size=tokens),
        "of_entropies": rng.normal(size=tokens),
        "temperature": float(rng.choice([0.5, 1.0, 1.7])),
        "chunk_rows": int(rng.integers(1, 5)),
    }


def oracle(given: dict[str, Any]) -> list[np.ndarray]:
    """Return log-probabilities, entropies and gradients of hidden rows and weight, in float64."""
    hidden, weight = given["hidden"].astype(np.float64), given["weight"].astype(np.float64)
    logprobs, entropies = [], []
    of_hidden, of_weight = np.zeros_like(hidden), np.zeros_like(weight)
    for row, (token, kept) in enumerate(zip(given["ids"], given["sets"], strict=True)):
        kept = kept if len(kept) else np.arange(NUM_WORDS)
        logits = weight[kept] @ hidden[row] / given["temperature"]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        entropy = -(p * np.log(p)).sum()
        logprobs.append(np.log(p[kept == token][0]))
        entropies.append(entropy)
        of_logits = given["of_logprobs"][row] * ((kept == token) - p)
        of_logits -= given["of_entropies"][row] * p * (np.log(p) + entropy)
        of_logits /= given["temperature"]
        of_hidden[row] = of_logits @ weight[kept]
        of_weight[kept] += np.outer(of_logits, hidden[row])
    return [np.array(logprobs), np.array(entropies), of_hidden, of_weight]


def compute(model: Any, weight: torch.Tensor, seed: int, *, sets: Any = None) -> list[np.ndarray]:
    """Compute the same by `token_statistics`; ``weight`` is this rank's part."""
    given, rank = case(seed), model.output_layer.tp_group.rank()
    part = slice(rank * len(weight), (rank + 1) * len(weight))
    weight.data.copy_(torch.from_numpy(given["weight"][part]))
    weight.grad = None
    hidden = torch.from_numpy(given["hidden"]).unsqueeze(1).requires_grad_()
    sets = given["sets"] if sets is None else sets(given["sets"])
    with token_statistics(
        model,
        torch.arange(len(hidden)),
        torch.from_numpy(given["ids"]),
        temperature=given["temperature"],
        with_entropies=True,
        candidates=Candidates.of_sets(sets, [1.0] * len(hidden)),
        chunk_rows=given["chunk_rows"],
    ):
        values = model.output_layer(hidden)[0][:, 0].double()
    loss = values[:, 0] @ torch.from_numpy(given["of_logprobs"])
    loss = loss + values[:, 1] @ torch.from_numpy(given["of_entropies"])
    loss.backward()
    logprobs, entropies = values.detach().numpy().T
    return [logprobs, entropies, hidden.grad[:, 0].numpy(), weight.grad.numpy()]


def _all_cases(model: Any, weight: torch.Tensor) -> list[list[np.ndarray]]:
    return [compute(model, weight, seed) for seed in range(NUM_CASES)]


@pytest.mark.parametrize("tp", [1, 2])
def test_values_and_gradients_are_those_of_the_softmax_over_the_candidates(tp: int) -> None:
    ranks = run_ranks(_of_part, tp, tp)
    for seed in range(NUM_CASES):
        print("seed", seed)
        expected = oracle(case(seed))
        for rank, found in enumerate(ranks):
            size = NUM_WORDS // tp
            *those, of_weight = expected
            these = [*those, of_weight[rank * size : (rank + 1) * size]]
            for ours, theirs in zip(found[seed], these, strict=True):
                assert np.abs(ours - theirs).max() < 2e-5, seed


def _of_part(tp: int) -> list[list[np.ndarray]]:
    return _of_one_layer([[0.0] * WIDTH] * NUM_WORDS, _all_cases, tp=tp)


def test_sets_of_the_row_before_give_other_values_and_gradients() -> None:
    """The control, with the sampled token put in so that nothing else can notice."""

    def shifted(sets: list[np.ndarray]) -> list[np.ndarray]:
        rolled = [sets[-1], *sets[:-1]]
        ids = case(3)["ids"]
        return [
            np.unique(np.append(each, token)) if len(each) else each
            for each, token in zip(rolled, ids, strict=True)
        ]

    def use(model: Any, weight: torch.Tensor) -> list[np.ndarray]:
        return compute(model, weight, 3, sets=shifted)

    (found,) = run_ranks(_of_one_layer, 1, [[0.0] * WIDTH] * NUM_WORDS, use)
    for ours, theirs in zip(found, oracle(case(3)), strict=True):
        assert np.abs(ours - theirs).max() > 0.1


LIMITS = [
    {"top_p": 0.9},
    {"top_k": 20},
    {"min_p": 0.05},
    {"top_p": 0.95, "top_k": 30, "min_p": 0.01, "temperature": 0.7},
]


def sampled(checkpoint: Path, limits: dict[str, Any]) -> list[Sample]:
    """Return samples of the embedded engine in float32."""
    engine = EmbeddedEngine(checkpoint, dtype="float32")
    sampling = SamplingParams(max_completion_length=12, seed=5, keeps_candidates=True, **limits)
    rng = np.random.default_rng(2)
    requests = [
        Request(
            request_id=number,
            prompt_ids=rng.integers(4, VOCAB_SIZE, 3 + number).astype(np.int32),
            num_generations=2,
        )
        for number in range(3)
    ]
    groups = engine.generate(requests, sampling)
    engine.close()
    every = [(g.request, c) for g in groups for c in g.completions]
    for request, completion in every:
        where = f"request {request.request_id}"
        completion.candidates.check(completion.token_ids, vocab_size=VOCAB_SIZE, where=where)
    return [
        Sample(
            sample_id=number,
            token_ids=request.sequence(completion.token_ids),
            prompt_length=len(request.prompt_ids),
            rollout_logprobs=completion.rollout_logprobs,
            advantage=1.0,
            trains=True,
            candidates=completion.candidates,
        )
        for number, (request, completion) in enumerate(every)
    ]


def gaps(checkpoint: Path, parallel: dict[str, int], sets: list[list[Sample]]) -> list[list[float]]:
    """Return the k3 of each sample under the trainer, for every list of samples."""
    actor = start_policy(checkpoint, layout(**parallel), chunk_rows=5)
    found = []
    for limits, samples in zip(LIMITS, sets, strict=True):
        scored = actor.score(
            pack(samples, scorer=actor, row_multiple=4),
            temperature=limits.get("temperature", 1.0),
            routing=Routing.LIVE,
        ).samples
        found.append([])
        for sample in samples:
            x = scored[sample.sample_id].token_logprobs.astype(np.float64) - sample.rollout_logprobs
            found[-1].append(float(np.mean(np.expm1(x) - x)))
    return found


def test_e17_the_trainer_computes_the_probabilities_that_truncation_drew_by(
    checkpoint: Path,
) -> None:
    """k3 of rollout and old log-probabilities in float32, with its controls."""
    sets = [sampled(checkpoint, limits) for limits in LIMITS]
    for parallel, num in (({}, 1), ({"tp": 2}, 2), ({"cp": 2}, 2), ({"pp": 2}, 2)):
        for found in run_ranks(gaps, num, checkpoint, parallel, sets):
            assert np.max(found) < 1e-9, parallel
    # Without the sets every sample is off, whatever cut it.
    bare = [[replace(sample, candidates=None) for sample in samples] for samples in sets]
    (without,) = run_ranks(gaps, 1, checkpoint, {}, bare)
    assert np.min(without) > 1e-4
    # One sample whose sets are those of the token before, with its own put in, and only that.
    wrong = [[_shifted(samples[0]), *samples[1:]] for samples in sets]
    (partly,) = run_ranks(gaps, 1, checkpoint, {}, wrong)
    for first, *others in partly:
        assert first > 1e-4
        assert max(others) < 1e-9


def _shifted(sample: Sample) -> Sample:
    candidates, ids = sample.candidates, sample.token_ids[sample.prompt_length :]
    assert candidates is not None
    rolled = [candidates.of(token - 1) for token in range(1, len(ids))]
    every = [candidates.of(len(ids) - 1), *rolled]
    made = [np.unique(np.append(each, token)) for each, token in zip(every, ids, strict=True)]
    return replace(sample, candidates=Candidates.of_sets(made, candidates.kept_mass.tolist()))
