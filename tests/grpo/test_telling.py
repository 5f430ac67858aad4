"""Which samples of a step are kept with their tokens."""

import pytest

from moe_replay.grpo.telling import samples_with_tokens

AGREEMENT = {0: 0.99, 1: 0.95, 2: 0.99, 3: 0.90, 4: 0.98, 5: 0.97}


@pytest.mark.parametrize(
    ("num_kept", "dropped", "chosen"),
    [
        (0, (), set()),
        (1, (), {3}),
        (4, (), {0, 1, 2, 3}),
        (4, (5,), {0, 1, 3, 5}),
        (2, (5,), {0, 5}),
    ],
)
def test_half_are_the_dropped_and_least_agreeing_and_half_the_first(num_kept, dropped, chosen):
    assert samples_with_tokens(AGREEMENT, dropped, num_kept=num_kept) == chosen


def test_without_replay_all_are_the_first():
    assert samples_with_tokens({}, (), num_kept=3) == {0, 1, 2}
