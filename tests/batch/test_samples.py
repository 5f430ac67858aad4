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
