"""Margins at flips, against numbers worked out by hand and routes made from known scores."""

import numpy as np
import pytest

from moe_replay.errors import TokenMismatchError, TraceError
from moe_replay.routing import Origin, RoutingTrace, compare_margins, topk_margins


def trace(ids, valid=None) -> RoutingTrace:
    count = len(ids)
    return RoutingTrace.record(
        np.array(ids),
        token_ids=np.arange(count),
        valid=np.ones(count, dtype=bool) if valid is None else np.array(valid),
        layers=range(np.array(ids).shape[1]),
        num_experts=16,
        origin=Origin.single(engine="e", engine_version="1", policy_version=0, num_rows=count),
    )


def chosen(scores: np.ndarray, topk: int) -> np.ndarray:
    return np.argsort(-scores, axis=2)[..., :topk]


def test_margin_is_the_gap_between_the_last_chosen_and_the_first_left_out():
    scores = np.array([[[0.5, 0.1, 0.4, 0.25], [1.0, 2.0, 4.0, 8.0]]])
    assert topk_margins(scores, 2) == pytest.approx(np.array([[0.15, 2.0]]))
    assert topk_margins(scores, 1) == pytest.approx(np.array([[0.1, 4.0]]))


def test_margin_is_that_of_sorted_scores_for_many_experts():
    scores = np.random.default_rng(3).normal(size=(50, 2, 300))
    ordered = -np.sort(-scores, axis=2)
    assert topk_margins(scores, 8) == pytest.approx(ordered[..., 7] - ordered[..., 8])


def test_margins_are_split_by_flips():
    """Rows 0 and 1 flip, rows 2 and 3 agree, row 4 is not held by the second trace."""
    ours = trace([[[0, 1]], [[0, 1]], [[0, 1]], [[2, 3]], [[2, 3]]])
    theirs = trace([[[0, 2]], [[4, 1]], [[1, 0]], [[2, 3]], [[5, 6]]], [True] * 4 + [False])
    margins = np.array([[0.1], [0.3], [1.0], [2.0], [9.0]])
    found = compare_margins([(ours, theirs)], [margins])
    assert (found.num_flips, found.num_agreeing) == (2, 2)
    assert found.median_margin_at_flips == pytest.approx(0.2)
    assert found.median_margin_elsewhere == pytest.approx(1.5)
    assert found.num_pairs_by_margin.sum() == 4
    assert found.flip_frac_by_margin[:4].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert found.margin_edges[:5] == pytest.approx([0.1, 0.3, 1.0, 2.0, 2.0])


@pytest.fixture(scope="module")
def scores() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1000, 2, 16))


def test_small_noise_flips_narrow_margins(scores):
    noisy = scores + 0.05 * np.random.default_rng(1).normal(size=scores.shape)
    pairs = [(trace(chosen(scores, 4)), trace(chosen(noisy, 4)))]
    found = compare_margins(pairs, [topk_margins(scores, 4)])
    assert found.flip_frac_by_margin[0] > 0.3
    assert found.flip_frac_by_margin[-1] == 0.0
    assert found.median_margin_at_flips < 0.3 * found.median_margin_elsewhere


def test_control_routes_of_other_tokens_flip_at_every_margin(scores):
    shifted = chosen(np.roll(scores, 1, axis=0), 4)
    found = compare_margins([(trace(chosen(scores, 4)), trace(shifted))], [topk_margins(scores, 4)])
    assert found.flip_frac_by_margin.min() > 0.9


def test_margins_of_nothing_held_are_nan_not_zero():
    ours = trace([[[0, 1]]], [False])
    found = compare_margins([(ours, ours)], [np.ones((1, 1))])
    assert (found.num_flips, found.num_agreeing) == (0, 0)
    assert np.isnan([found.median_margin_at_flips, *found.flip_frac_by_margin]).all()


@pytest.mark.parametrize("topk", [0, 4])
def test_margin_needs_an_expert_that_is_left_out(topk):
    with pytest.raises(TraceError, match=f"topk is {topk} of 4 experts"):
        topk_margins(np.zeros((1, 1, 4)), topk)


def test_margin_refuses_scores_that_are_no_numbers():
    with pytest.raises(TraceError, match="1 scores are not numbers"):
        topk_margins(np.array([[[0.1, np.nan, 0.2]]]), 1)


def test_margins_of_another_shape_are_refused():
    ours = trace([[[0, 1]], [[2, 3]]])
    with pytest.raises(TraceError, match=r"sequence 0: margins of shape \(1, 1\)"):
        compare_margins([(ours, ours)], [np.ones((1, 1))])


def test_margins_of_traces_that_do_not_compare_are_refused():
    ours = trace([[[0, 1]], [[2, 3]]])
    with pytest.raises(TokenMismatchError, match="traces of 2 and 1 tokens"):
        compare_margins([(ours, ours.crop(0, 1))], [np.ones((2, 1))])


@pytest.mark.parametrize("count", [0, 2])
def test_margins_for_another_number_of_pairs_are_refused(count):
    ours = trace([[[0, 1]]])
    with pytest.raises(TraceError, match=f"1 pairs of traces and {count} arrays"):
        compare_margins([(ours, ours)], [np.ones((1, 1))] * count)
