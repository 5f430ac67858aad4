"""A sample's rows: which of them predict sampled tokens."""

import numpy as np
import pytest

from moe_replay.batch import Sample
from moe_replay.errors import TraceError


def sample(*, prompt=2, num_logprobs=None, trains=True) -> Sample:
    ids = np.arange(1, 6, dtype=np.int32)
    count = len(ids) - prompt if num_logprobs is None else num_logprobs
    return Sample(
        sample_id=7,
        token_ids=ids,
        prompt_length=prompt,
        rollout_logprobs=np.zeros(count, dtype=np.float32),
        advantage=1.0,
        trains=trains,
    )


def test_rows_before_sampled_tokens_predict_them():
    assert sample().predicts_sampled.tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(("prompt", "num_logprobs"), [(0, 5), (5, 0), (2, 2), (2, 4)])
def test_sample_refuses_counts_that_do_not_add_up(prompt, num_logprobs):
    with pytest.raises(TraceError, match="sample 7: 5 tokens"):
        sample(prompt=prompt, num_logprobs=num_logprobs)


def test_e16_a_sample_without_a_sampled_token_predicts_nothing_and_cannot_train():
    aborted = sample(prompt=5, trains=False)
    assert not aborted.predicts_sampled.any()
    with pytest.raises(TraceError, match="leave 0 sampled tokens"):
        sample(prompt=5)


def test_e6_a_sample_keeps_what_it_was_made_with():
    ids, logprobs = np.arange(1, 6, dtype=np.int32), np.zeros(3, dtype=np.float32)
    made = Sample(
        sample_id=7,
        token_ids=ids,
        prompt_length=2,
        rollout_logprobs=logprobs,
        advantage=1.0,
        trains=True,
    )
    ids[:], logprobs[:] = 9, -1.0
    assert made.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert made.rollout_logprobs.tolist() == [0.0] * 3
    # The control: the buffers hold something else now.
    assert (ids == 9).all() and (logprobs == -1).all()


def turns(mask=(True, True, False, True), num_logprobs=3, trains=True) -> Sample:
    """A prompt of 2, two sampled tokens, one of a tool, one sampled."""
    return Sample(
        sample_id=7,
        token_ids=np.array([1, 2, 3, 4, 5, 6], dtype=np.int32),
        prompt_length=2,
        rollout_logprobs=np.arange(num_logprobs, dtype=np.float32),
        advantage=1.0,
        trains=trains,
        turn_mask=np.array(mask),
    )


def test_tokens_of_an_environment_are_predicted_by_no_row_that_counts():
    made = turns()
    assert made.is_sampled.tolist() == [False, False, True, True, False, True]
    assert made.predicts_sampled.tolist() == [False, True, True, False, True, False]
    assert made.completion_length == 3
    # The control: without a mask all four tokens after the prompt count.
    assert sample(prompt=2).completion_length == 3
    assert sample(prompt=2).is_sampled.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("mask", "num_logprobs"),
    [((True, True, False, True), 4), ((True, True, False), 2), ((True,) * 5, 5)],
)
def test_a_mask_that_does_not_fit_the_tokens_is_refused(mask, num_logprobs):
    with pytest.raises(TraceError, match="flags in turn_mask"):
        turns(mask, num_logprobs)


def test_a_sample_of_environment_tokens_alone_cannot_train():
    assert turns((False,) * 4, 0, trains=False).completion_length == 0
    with pytest.raises(TraceError, match="leave 0 sampled tokens"):
        turns((False,) * 4, 0)
