"""A stop string ends a completion with the token that completes it.

Tokens, log-probabilities and routes stay together.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.engines.checks import check_group
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.stop_strings import StopStrings
from moe_replay.engines.types import FinishReason, Request, SamplingParams

TEXT = {2: "</", 3: "answer", 4: ">", 5: "er>\n", 6: "\u00e9", 7: "<eos>"}


class Pieces:
    """A tokenizer of pieces of text; ids it has no piece for are letters."""

    def decode(self, ids, *, skip_special_tokens, clean_up_tokenization_spaces):
        assert not skip_special_tokens
        assert not clean_up_tokenization_spaces
        return "".join(TEXT.get(n, chr(97 + n % 26)) for n in ids)


def stops(*strings: str) -> StopStrings:
    return StopStrings(strings=strings, tokenizer=Pieces())


@pytest.mark.parametrize(
    ("ids", "strings", "expected"),
    [
        ([8, 2, 3, 4, 9, 9], ["</answer>"], 4),
        ([8, 2, 3, 4], ["</answer>"], 4),
        ([2, 8, 9], ["</answer>", "</"], 1),
        # A token that holds more than the end of the string stays whole.
        ([8, 5, 9], ["er>"], 2),
        ([8, 6, 9], ["\u00e9"], 2),
        ([8, 7, 9], ["<eos>"], 2),
        ([8, 9, 10], ["</answer>"], None),
        ([2, 4, 3], ["</answer>"], None),
    ],
)
def test_e19_the_token_that_completes_a_string_is_the_last(ids, strings, expected):
    assert stops(*strings).end(np.array(ids, dtype=np.int32)) == expected


@given(st.lists(st.integers(2, 30), min_size=1, max_size=30), st.sampled_from(["er>", "</a", "cc"]))
def test_e19_no_shorter_prefix_holds_the_string(ids, string):
    end = stops(string).end(np.array(ids, dtype=np.int32))
    holding = [
        n
        for n in range(1, len(ids) + 1)
        if string in "".join(TEXT.get(i, chr(97 + i % 26)) for i in ids[:n])
    ]
    assert end == (holding[0] if holding else None)


def sampled(limit: int = 12):
    engine = FakeEngine(eos_id=31)
    request = Request(
        request_id=4, prompt_ids=np.array([5, 6, 7], dtype=np.int32), num_generations=6
    )
    (group,) = engine.generate([request], SamplingParams(max_completion_length=limit))
    return engine, group


def test_e19_a_completion_that_is_cut_keeps_the_contract_of_every_engine():
    engine, group = sampled()
    string = Pieces().decode(
        group.completions[0].token_ids[3:5].tolist(),
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    cut, num_cut = stops(string).cut(group)
    check_group(cut, engine.description)
    first, whole = cut.completions[0], group.completions[0]
    end = stops(string).end(whole.token_ids)
    assert end is not None
    assert end <= 5
    assert first.finish_reason is FinishReason.STOP
    assert first.token_ids.tolist() == whole.token_ids[:end].tolist()
    assert first.rollout_logprobs.tolist() == whole.rollout_logprobs[:end].tolist()
    assert first.trace.valid.tolist() == [True] * (3 + end - 1) + [False]
    assert (first.trace.expert_ids == whole.trace.expert_ids[: 3 + end]).all()
    lengths = [len(c.token_ids) for c in group.completions]
    assert num_cut == sum(lengths) - sum(len(c.token_ids) for c in cut.completions) > 0


def test_e19_without_strings_or_without_a_match_nothing_changes():
    _, group = sampled()
    assert stops().cut(group) == (group, 0)
    same, num_cut = stops("no such text").cut(group)
    assert num_cut == 0
    assert [c.finish_reason for c in same.completions] == [
        c.finish_reason for c in group.completions
    ]


def test_e19_a_string_that_ends_with_the_last_token_is_a_stop():
    engine, group = sampled(limit=4)
    last = group.completions[0].token_ids[-2:].tolist()
    string = "".join(TEXT.get(n, chr(97 + n % 26)) for n in last)
    cut, _ = stops(string).cut(group)
    check_group(cut, engine.description)
    assert cut.completions[0].finish_reason is FinishReason.STOP
