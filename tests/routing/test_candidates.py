"""Candidates move with their tokens, and none that cannot be theirs passes the border."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.engines.checks import check_groups
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.stop_strings import _ended
from moe_replay.engines.types import Request, RolloutGroup, SamplingParams
from moe_replay.errors import EngineError
from moe_replay.routing.candidates import Candidates

TOKENS = np.array([7, 9, 5], dtype=np.int32)


def made(sets, mass=None):
    return Candidates.of_sets(
        [np.array(each, dtype=np.int64) for each in sets],
        [0.5] * len(sets) if mass is None else mass,
    )


def listed(candidates):
    return [candidates.of(token).tolist() for token in range(len(candidates))]


# Of the class's example: nothing was cut off the second token.
GOOD = made([[3, 7], [], [5]], [0.9, 1.0, 0.6])


def test_candidates_by_hand():
    assert GOOD.counts.tolist() == [2, 0, 1]
    assert GOOD.ids.tolist() == [3, 7, 5]
    assert GOOD.nbytes == 3 * 8 + 3 * 4
    assert listed(GOOD.take(np.array([2, 0, 2]))) == [[5], [3, 7], [5]]
    assert listed(GOOD.crop(1)) == [[3, 7]]
    assert listed(Candidates.concat([GOOD, GOOD.crop(2)])) == [[3, 7], [], [5], [3, 7], []]
    assert GOOD.check(TOKENS, vocab_size=10, where="here") is None


@given(
    st.lists(st.sets(st.integers(0, 40), max_size=6), max_size=12),
    st.data(),
)
def test_sets_stay_with_their_tokens_however_they_are_taken(sets, data):
    sets = [sorted(each) for each in sets]
    order = data.draw(st.lists(st.integers(0, len(sets) - 1), max_size=20)) if sets else []
    mass = [1 / (1 + number) for number in range(len(sets))]
    taken = made(sets, mass).take(np.array(order, dtype=np.int64))
    assert listed(taken) == [sets[number] for number in order]
    assert taken.kept_mass.tolist() == pytest.approx([mass[number] for number in order])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (made([[3, 7], []]), "candidates of 2 tokens, expected 3"),
        (made([[3, 7], [], [5, 10]]), "sampled token 2 is 10, expected ids below 10"),
        (made([[3, 7], [], [5, 5]]), "token 2 hold 5 before 5.*each once"),
        (made([[7, 3], [], [5]]), "token 0 hold 7 before 3, expected ascending"),
        # Shifted by one token: the sets are sound, and belong to others.
        (made([[], [5], [3, 7]]), r"token 1 is 9, which is not among its 1 candidates \[5\]"),
        (made([[3, 7], [], [5]], [0.9, 1.0, 0.0]), "token 2 had the probability 0.0"),
        (made([[3, 7], [], [5]], [1.1, 1.0, 0.5]), "token 0 had the probability 1.1"),
        (made([[3, 7], [], [5]], [0.9, np.nan, 0.5]), "token 1 had the probability nan"),
    ],
)
def test_candidates_of_other_tokens_are_refused(wrong, message):
    with pytest.raises(EngineError, match=rf"here: .*{message}"):
        wrong.check(TOKENS, vocab_size=10, where="here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": np.array([2, 0, 2], np.int32)}, "sum to 4, 3 ids"),
        ({"counts": np.array([4, -1, 0], np.int32)}, "counts from -1 on"),
        ({"counts": np.array([2, 0, 1])}, r"counts of candidates is int64\[3\].* int32"),
        ({"ids": np.array([3, 7, 5], np.int32)}, "ids of candidates is int32.* uint32"),
        ({"kept_mass": np.ones(2, np.float32)}, "2 values of kept_mass"),
        ({"kept_mass": [1.0] * 3}, "kept_mass of candidates is list"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(change, message):
    # Past the type checks that only these tests install.
    wrong = copy.copy(GOOD)
    for name, array in change.items():
        object.__setattr__(wrong, name, array)
    with pytest.raises(EngineError, match=message):
        wrong.__post_init__()


SAMPLING = SamplingParams(max_completion_length=12, top_k=5, keeps_candidates=True, seed=3)
REQUEST = Request(request_id=4, prompt_ids=np.array([3, 4], dtype=np.int32), num_generations=2)


def check(group, sampling=SAMPLING):
    engine = FakeEngine()
    check_groups(
        [group], [REQUEST], sampling, engine.description, vocab_size=32, policy_versions=range(1)
    )


def changed(group, change):
    first, *others = group.completions
    return RolloutGroup(request=REQUEST, completions=(change(first), *others))


def test_an_answer_has_candidates_exactly_when_they_are_asked_for():
    (group,) = FakeEngine().generate([REQUEST], SAMPLING)
    assert check(group) is None
    with pytest.raises(
        EngineError, match=r"completion 0: no candidates, expected those of .*top_k"
    ):
        check(changed(group, lambda c: replace(c, candidates=None)))
    with pytest.raises(EngineError, match="completion 0: candidates, expected none"):
        check(group, replace(SAMPLING, keeps_candidates=False))


def test_candidates_shifted_by_a_token_in_one_completion_are_named():
    (group,) = FakeEngine().generate([REQUEST], SAMPLING)
    order = np.roll(np.arange(12), 1)
    shifted = changed(
        group, lambda c: replace(c, candidates=c.candidates.take(order[: len(c.candidates)]))
    )
    with pytest.raises(EngineError, match=r"request 4, completion 0: sampled token \d+ is \d+, .*"):
        check(shifted)


def test_log_probabilities_over_the_full_vocabulary_are_known_too():
    (limited,) = FakeEngine().generate([REQUEST], SAMPLING)
    (whole,) = FakeEngine().generate([REQUEST], replace(SAMPLING, keeps_candidates=False))
    for ours, theirs in zip(limited.completions, whole.completions, strict=True):
        assert np.abs(ours.untruncated_logprobs - theirs.rollout_logprobs).max() < 1e-6
        assert np.abs(ours.rollout_logprobs - theirs.rollout_logprobs).max() > 0.1
        assert theirs.untruncated_logprobs is theirs.rollout_logprobs


def test_a_stop_string_cuts_candidates_with_their_tokens():
    (group,) = FakeEngine().generate([REQUEST], SAMPLING)
    whole = group.completions[0]
    cut = _ended(whole, 2, 3)
    assert listed(cut.candidates) == listed(whole.candidates)[:3]
    assert check(changed(group, lambda _: cut)) is None
