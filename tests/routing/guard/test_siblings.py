"""Tokens that siblings have in common were routed alike; the one that differs is found."""

import numpy as np
import pytest

from moe_replay.routing.guard import Sibling, sibling_evidence


def groups_of(seed: int, *, flips: float = 0.0, prompt: int = 20, groups: int = 8):
    """Eight prompts of four samples each, equal in the prompt; a few rows flip as in engines that depend on the batch."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    found = []
    for group in range(groups):
        shared = rng.random((prompt, 3, 16)).argsort(axis=2)[..., :4]
        tokens = rng.integers(0, 1000, prompt)
        siblings = []
        for entry in range(4):
            ids = np.concatenate([shared, rng.random((30, 3, 16)).argsort(axis=2)[..., :4]])
            flipped = np.flatnonzero(rng.random(prompt) < flips)
            ids[flipped, 2] = (ids[flipped, 2] + 1) % 16
            siblings.append(
                Sibling(
                    sample=group * 4 + entry,
                    token_ids=np.concatenate([tokens, rng.integers(0, 1000, 30)]),
                    expert_ids=ids[:, :, ::-1] if entry % 2 else ids,
                    valid=np.arange(prompt + 30) < prompt + 29,
                )
            )
        found.append(siblings)
    return found


def change(groups, number: int, ids: np.ndarray) -> None:
    group, entry = divmod(number, 4)
    one = groups[group][entry]
    groups[group][entry] = Sibling(
        sample=one.sample, token_ids=one.token_ids, expert_ids=ids, valid=one.valid
    )


@pytest.mark.parametrize("flips", [0.0, 0.03])
@pytest.mark.parametrize("cause", ["one row late", "another prompt", "one layer"])
def test_one_sample_that_differs_from_its_siblings_is_found(cause, flips):
    groups = groups_of(1, flips=flips)
    ids = groups[3][1].expert_ids
    wrong = {
        "one row late": np.roll(ids, 1, axis=0),
        "another prompt": groups[5][1].expert_ids,
        "one layer": np.concatenate([ids[:, :2], ids[:, [1]]], axis=1),
    }
    change(groups, 13, wrong[cause])
    nats = sibling_evidence(groups)
    assert max(nats, key=lambda sample: nats[sample]) == 13
    assert nats[13] > 15
    assert max(value for sample, value in nats.items() if sample != 13) < 10


@pytest.mark.parametrize("flips", [0.0, 0.01, 0.1])
def test_siblings_that_agree_as_usual_are_quiet(flips):
    for seed in range(5):
        nats = sibling_evidence(groups_of(seed, flips=flips))
        assert len(nats) == 32
        assert max(nats.values()) < 10


def test_two_samples_have_no_majority():
    groups = [group[:2] for group in groups_of(1)]
    change(groups, 1, groups[3][1].expert_ids)
    assert sibling_evidence(groups) == {}


def test_siblings_are_compared_only_as_long_as_their_tokens_are_equal():
    groups = groups_of(2, prompt=0)
    assert sibling_evidence(groups) == {}
