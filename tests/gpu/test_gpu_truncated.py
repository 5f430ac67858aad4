"""Truncated sampling on a GPU: log-probabilities are those among the candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_replay.batch import Sample
from moe_replay.megatron.actor import MegatronActor
from moe_replay.routing import Routing
from moe_replay.routing.candidates import Candidates
from moe_replay.testing.policies import pack
from moe_replay.testing.samples import make_samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SEED = 23
WORDS = np.array([7, 31, 60, 88])
TOLERANCE = 2e-2
"""Of a log-probability: kernels may add up in another order from call to call, in bfloat16."""


def ending_in(sample: Sample, word: int) -> Sample:
    """Return a sample whose last token is another one."""
    return replace(sample, token_ids=np.append(sample.token_ids[:-1], np.int32(word)))


def limited(sample: Sample, words: np.ndarray) -> Sample:
    """Return a sample whose last token was drawn from these words, and the others from all."""
    free = [np.empty(0, dtype=np.int64)] * (len(sample.rollout_logprobs) - 1)
    sets = [*free, np.unique(np.append(words, sample.token_ids[-1]))]
    return replace(sample, candidates=Candidates.of_sets(sets, [*[1.0] * len(free), 0.5]))


def scored(actor: MegatronActor, samples: Sequence[Sample]) -> list[np.ndarray]:
    scores = actor.score(pack(samples, scorer=actor), temperature=1.0, routing=Routing.LIVE).samples
    return [scores[sample.sample_id].token_logprobs for sample in samples]


def test_probabilities_are_those_among_the_candidates(actor: MegatronActor) -> None:
    print("seed", SEED)
    samples = make_samples(6, seed=SEED)
    # By the full vocabulary, what each of the words would have had in the last token's place.
    full = np.array(
        [[row[-1] for row in scored(actor, [ending_in(s, w) for s in samples])] for w in WORDS]
    )
    expected = full - np.log(np.exp(full).sum(axis=0))
    for row, word in enumerate(WORDS):
        ending = [ending_in(sample, word) for sample in samples]
        found = scored(actor, [limited(sample, WORDS) for sample in ending])
        assert np.abs([f[-1] for f in found] - expected[row]).max() < TOLERANCE
        for one, other in zip(found, scored(actor, ending), strict=True):
            assert np.abs(one[:-1] - other[:-1]).max(initial=0) < TOLERANCE
    # The control: one of the samples has fewer candidates, and it alone is off.
    ending = [ending_in(sample, WORDS[0]) for sample in samples]
    given = [limited(sample, WORDS) for sample in ending]
    given[2] = limited(ending[2], WORDS[:2])
    off = np.abs([f[-1] for f in scored(actor, given)] - expected[0])
    assert off[2] > 0.3
    assert np.delete(off, 2).max() < TOLERANCE
