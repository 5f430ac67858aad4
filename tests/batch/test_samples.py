"""A sample's rows: which of them predict sampled tokens, and which can be replayed."""

import numpy as np
import pytest

from moe_replay.batch import Sample
from moe_replay.errors import TokenMismatchError, TraceError
from moe_replay.routing import LiveReason
from moe_replay.testing.synthetic_routes import synthetic_trace


def sample(
    *, tokens=(1, 2, 3, 4, 5), prompt=2, num_logprobs=None, valid=None, trace=None, trains=True
) -> Sample:
    ids = np.array(tokens, dtype=np.int32)
    count = len(ids) - prompt if num_logprobs is None else num_logprobs
    if trace is None:
        flags = None if valid is None else np.array(valid)
        trace = synthetic_trace(ids, seed=1, valid=flags)
    return Sample(
        sample_id=7,
        token_ids=ids,
        prompt_length=prompt,
        rollout_logprobs=np.zeros(count, dtype=np.float32),
        advantage=1.0,
        trains=trains,
        trace=trace,
    )


def test_rows_before_sampled_tokens_predict_them():
    assert sample().predicts_sampled.tolist() == [False, True, True, True, False]


def test_coverage_counts_the_last_row_apart():
    found = sample().coverage()
    assert found.num_replayed == 4
    assert {reason: n for reason, n in found.num_live.items() if n} == {LiveReason.LAST_TOKEN: 1}
    assert found.fraction == 1.0


def test_coverage_tells_prompt_rows_from_sampled_ones():
    found = sample(valid=[False, True, False, True, False]).coverage()
    assert found.num_replayed == 2
    assert found.num_live[LiveReason.PROMPT_OMITTED] == 1
    assert found.num_live[LiveReason.ENGINE_GAVE_NONE] == 1
    assert found.num_live[LiveReason.LAST_TOKEN] == 1
    assert found.fraction == 0.5


def test_coverage_of_a_valid_last_row_counts_it_as_replayed():
    assert sample(valid=[True] * 5).coverage().num_replayed == 5


@pytest.mark.parametrize(("prompt", "num_logprobs"), [(0, 5), (5, 0), (2, 2), (2, 4)])
def test_sample_refuses_counts_that_do_not_add_up(prompt, num_logprobs):
    with pytest.raises(TraceError, match="sample 7: 5 tokens"):
        sample(prompt=prompt, num_logprobs=num_logprobs)


def test_sample_refuses_the_trace_of_other_tokens():
    other = synthetic_trace(np.array([1, 2, 9, 4, 5]), seed=1)
    with pytest.raises(TokenMismatchError, match=r"sample 7: .* from row 2 of 5 on"):
        sample(trace=other)


def test_e16_a_sample_without_a_sampled_token_predicts_nothing_and_cannot_train():
    aborted = sample(prompt=5, valid=[True, True, False, False, False], trains=False)
    assert not aborted.predicts_sampled.any()
    found = aborted.coverage()
    assert found.num_replayed == 2
    assert found.num_live[LiveReason.PROMPT_OMITTED] == 2
    assert found.num_live[LiveReason.LAST_TOKEN] == 1
    with pytest.raises(TraceError, match="leave 0 sampled tokens"):
        sample(prompt=5)


def test_e6_a_sample_keeps_what_it_was_made_with():
    trace = synthetic_trace(np.arange(1, 6, dtype=np.int32), seed=1)
    ids, logprobs = np.arange(1, 6, dtype=np.int32), np.zeros(3, dtype=np.float32)
    made = Sample(
        sample_id=7,
        token_ids=ids,
        prompt_length=2,
        rollout_logprobs=logprobs,
        advantage=1.0,
        trains=True,
        trace=trace,
    )
    ids[:], logprobs[:] = 9, -1.0
    assert made.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert made.rollout_logprobs.tolist() == [0.0] * 3
    # The control: the buffers are no longer those of the trace's tokens.
    with pytest.raises(TokenMismatchError):
        trace.check_tokens(ids, where="here")
