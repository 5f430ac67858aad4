"""Flips by layer, position, token and sequence, against counts made by hand."""

import numpy as np
import pytest

from moe_replay.errors import TokenMismatchError, TraceError
from moe_replay.routing import Origin, RoutingTrace, compare_traces, flipped
from moe_replay.testing.synthetic_routes import synthetic_trace


def trace(ids, *, tokens=None, valid=None) -> RoutingTrace:
    array = np.array(ids)
    count = len(array)
    return RoutingTrace.record(
        array,
        token_ids=np.arange(count) if tokens is None else np.array(tokens),
        valid=np.ones(count, dtype=bool) if valid is None else np.array(valid),
        layers=(2, 5),
        num_experts=8,
        origin=Origin.single(
            engine="embedded", engine_version="1", policy_version=0, num_rows=count
        ),
    )


OURS = [[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[4, 5], [6, 7]], [[4, 5], [6, 7]]]
# Row 0: equal, one of them in another order. Row 1: one slot of layer 5. Row 2: both layers. Row 3:
# not held.
THEIRS = [[[1, 0], [2, 3]], [[0, 1], [2, 4]], [[4, 0], [0, 1]], [[0, 1], [2, 3]]]


@pytest.fixture
def comparison():
    return compare_traces([(trace(OURS), trace(THEIRS, valid=[True, True, True, False]))])


def test_compare_counts_flips_by_layer(comparison):
    assert comparison.layers == (2, 5)
    assert comparison.flip_frac_by_layer == pytest.approx([1 / 3, 2 / 3])
    assert comparison.flip_frac == pytest.approx(0.5)


def test_compare_leaves_out_rows_that_one_side_does_not_hold(comparison):
    assert (comparison.num_tokens, comparison.num_skipped) == (3, 1)


def test_compare_counts_flips_by_position(comparison):
    assert comparison.flip_frac_by_position == pytest.approx([0, 0.5, 1, np.nan], nan_ok=True)
    assert comparison.num_tokens_by_position.tolist() == [1, 1, 1, 0]


def test_compare_counts_shared_slots(comparison):
    assert comparison.slot_overlap_by_layer == pytest.approx([5 / 6, 3 / 6])
    assert comparison.slot_overlap == pytest.approx(2 / 3)


def test_compare_counts_tokens_with_a_flip(comparison):
    assert comparison.tokens_with_flip_frac == pytest.approx(2 / 3)
    assert comparison.mean_flips_per_token == pytest.approx(1.0)


def test_compare_predicts_tokens_with_a_flip_from_independent_layers(comparison):
    assert comparison.tokens_with_flip_if_independent_frac == pytest.approx(1 - 2 / 3 * 1 / 3)


def test_compare_counts_tokens_by_their_number_of_flips(comparison):
    assert comparison.num_tokens_by_flips.tolist() == [1, 1, 1]


def test_compare_counts_flips_by_token_id():
    """Token 7 is in rows 0 and 2 and in another sequence, token 3 in row 1; row 3 is not held."""
    tokens = [7, 3, 7, 9]
    first = (trace(OURS, tokens=tokens), trace(THEIRS, tokens=tokens, valid=[True] * 3 + [False]))
    second = (trace(OURS[:1], tokens=[7]), trace(OURS[1:2], tokens=[7]))
    whole = compare_traces(pair for pair in (first, second))
    assert whole.token_ids.tolist() == [3, 7]
    assert whole.flip_frac_by_token_id == pytest.approx([0.5, 2 / 6])
    assert whole.num_tokens_by_token_id.tolist() == [1, 3]


def test_compare_counts_as_a_set_comparison_does():
    """Over more rows than one chunk holds, with ids of two bytes."""
    tokens = np.arange(1500)
    options = {"num_layers": 24, "num_experts": 300, "topk": 8}
    ours, theirs = (synthetic_trace(tokens, seed=seed, **options) for seed in (1, 2))
    shared = (ours.expert_ids[..., None] == theirs.expert_ids[..., None, :]).any(axis=3)
    whole = compare_traces([(ours, theirs)])
    assert whole.slot_overlap_by_layer == pytest.approx(shared[:-1].mean(axis=(0, 2)))
    assert whole.flip_frac_by_layer == pytest.approx(1 - shared[:-1].all(axis=2).mean(axis=0))
    flips, held = flipped(ours, theirs)
    assert (flips[held] == ~shared[:-1].all(axis=2)).all()


def test_compare_weighs_sequences_by_their_tokens():
    same = trace(OURS[:1])
    other = (trace(OURS[:3]), trace(THEIRS[:3]))
    whole = compare_traces([(same, same), other])
    assert whole.flip_frac_by_sequence == pytest.approx([0.0, 0.5])
    assert whole.flip_frac == pytest.approx(3 / 8)
    assert whole.flip_frac_by_position == pytest.approx([0, 0.5, 1])
    assert whole.num_tokens_by_position.tolist() == [2, 1, 1]


def test_compare_of_a_trace_with_itself_finds_nothing():
    ours = synthetic_trace(np.arange(40), seed=1, num_experts=300, topk=8)
    whole = compare_traces([(ours, ours)])
    assert (whole.flip_frac, whole.slot_overlap, whole.tokens_with_flip_frac) == (0.0, 1.0, 0.0)


def test_compare_of_independent_routes_finds_chance():
    tokens = np.arange(4000)
    whole = compare_traces([(synthetic_trace(tokens, seed=1), synthetic_trace(tokens, seed=2))])
    # Top-4 of 16: 4/16 of the slots, and 1 of C(16, 4) = 1820 sets.
    assert whole.slot_overlap == pytest.approx(0.25, abs=0.01)
    assert whole.flip_frac == pytest.approx(1 - 1 / 1820, abs=0.002)


def test_compare_without_a_shared_row_is_nan_not_zero():
    ours = trace(OURS[:1], valid=[False])
    whole = compare_traces([(ours, ours)])
    assert np.isnan([whole.flip_frac, whole.slot_overlap, whole.tokens_with_flip_frac]).all()


def test_flipped_marks_each_token_and_layer():
    flips, held = flipped(trace(OURS), trace(THEIRS, valid=[True, True, True, False]))
    assert flips.tolist() == [[False, False], [False, True], [True, True], [False, False]]
    assert held.tolist() == [True, True, True, False]


def test_compare_refuses_traces_of_other_tokens():
    with pytest.raises(TokenMismatchError, match=r"sequence 1: .*from row 2 of 4 on"):
        compare_traces(
            [(trace(OURS), trace(THEIRS)), (trace(OURS), trace(THEIRS, tokens=[0, 1, 9, 3]))]
        )


def test_compare_refuses_traces_of_another_length():
    with pytest.raises(TokenMismatchError, match="traces of 4 and 3 tokens"):
        compare_traces([(trace(OURS), trace(THEIRS[:3]))])


def test_compare_refuses_traces_of_another_model():
    with pytest.raises(TraceError, match="sequence 0, second trace"):
        compare_traces([(trace(OURS), synthetic_trace(np.arange(4), seed=1))])


def test_compare_refuses_nothing():
    with pytest.raises(TraceError, match="no traces"):
        compare_traces([])
