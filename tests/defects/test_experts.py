"""Defects of the choice and weight of experts, where the core alone decides."""

import numpy as np
import pytest

from moe_replay.errors import TraceError
from moe_replay.routing import Origin, RoutedModel, RowIndex, slice_routes, trace_from_payload
from moe_replay.routing.reference import (
    RouterRule,
    ScoreFunction,
    gate_weights,
    live_ids,
)
from moe_replay.testing.synthetic_routes import synthetic_trace

from ..support.gates import dense_weights, gate_gradient

EXPERTS, TOPK = 8, 2


def rule(function: ScoreFunction, *, normalise: bool = True, groups: int | None = None):
    return RouterRule(
        num_experts=EXPERTS,
        topk=TOPK,
        score_function=function,
        normalise=normalise,
        num_groups=groups,
        groups_per_token=None if groups is None else 1,
    )


def logits_of(seed: int) -> np.ndarray:
    print(f"seed {seed}")
    return np.random.default_rng(seed).standard_normal((6, EXPERTS))


def drifted(logits: np.ndarray, chosen: RouterRule) -> np.ndarray:
    """Return the two experts that the router likes least: none of them is in its live top-k."""
    worst = np.argsort(logits, axis=1)[:, :TOPK]
    live = live_ids(logits, chosen)
    assert not (worst[:, :, None] == live[:, None]).any()
    return worst


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("function", list(ScoreFunction))
def test_c7_experts_outside_the_live_choice_keep_weight_and_gradient(function, normalise):
    logits = logits_of(1)
    chosen = rule(function, normalise=normalise)
    ids = drifted(logits, chosen)
    weights = gate_weights(logits, ids, chosen)
    upstream = np.random.default_rng(2).standard_normal(ids.shape)
    gradient = gate_gradient(logits, ids, chosen, upstream)
    assert (weights > 0).all()
    assert (np.abs(np.take_along_axis(gradient, ids, axis=1)) > 1e-4).all()


def test_c7_control_scores_zeroed_after_the_live_choice_lose_them():
    """Gathered from the map of the live choice, replayed experts weigh nothing, ever."""
    chosen = rule(ScoreFunction.SOFTMAX)
    logits = logits_of(1)
    live = live_ids(logits, chosen)
    zeroed = dense_weights(live, gate_weights(logits, live, chosen), EXPERTS)
    assert (np.take_along_axis(zeroed, drifted(logits, chosen), axis=1) == 0).all()


def test_c8_routes_of_fewer_rows_than_tokens_raise():
    short = synthetic_trace(np.arange(5), seed=1)
    with pytest.raises(TraceError, match=r"1 traces have 5 rows, the batch .* has 7"):
        slice_routes([short], RowIndex.packed([7]))


def test_c8_control_a_short_target_would_leave_tokens_without_experts():
    used = np.zeros((7, 16), dtype=bool)
    ids = synthetic_trace(np.arange(5), seed=1).expert_ids[:, 0].astype(np.int64)
    np.put_along_axis(used[:5], ids, True, axis=1)
    assert used.sum(axis=1).tolist() == [4, 4, 4, 4, 4, 0, 0]


def test_c8_control_routes_of_every_row_are_cut():
    whole = synthetic_trace(np.arange(7), seed=1)
    assert slice_routes([whole], RowIndex.packed([7])).valid.tolist() == [True] * 6 + [False]


def payload_of(topk: int) -> np.ndarray:
    return synthetic_trace(np.arange(5), seed=1, num_experts=EXPERTS, topk=topk).expert_ids


def trace_of(payload: np.ndarray):
    return trace_from_payload(
        payload,
        token_ids=np.arange(6),
        num_prompt_tokens=3,
        model=RoutedModel(
            moe_layers=(0, 1, 2), num_decoder_layers=3, num_experts=EXPERTS, topk=TOPK
        ),
        origin=Origin.single(engine="vllm", engine_version="1", policy_version=0, num_rows=6),
        where="request 0",
    )


@pytest.mark.parametrize("topk", [1, 3])
def test_c9_routes_of_another_topk_raise(topk):
    with pytest.raises(TraceError, match=f"names {topk} experts per token .* the model uses 2"):
        trace_of(payload_of(topk))
    with pytest.raises(TraceError, match="ids of shape"):
        gate_weights(logits_of(1), np.tile(np.arange(topk), (6, 1)), rule(ScoreFunction.SOFTMAX))


def test_c9_control_the_models_topk_is_accepted():
    assert trace_of(payload_of(TOPK)).topk == TOPK


BIAS = np.array([9.0, 0, 0, 0, 0, 0, 0, 0])
LOGITS = np.log(np.array([[1.0, 3.0, 1.0, 4.0, 1.0, 1.0, 9.0, 1.0]]))


@pytest.mark.parametrize(
    ("function", "normalise", "expected"),
    [
        # By hand, of exp(logit) 1 and 9: softmax of both; 1/21 and 9/21 of all; sigmoid x / (1 + x)
        # = 1/2 and 9/10; sqrt(softplus) = sqrt(log(1 + x)).
        (ScoreFunction.SOFTMAX, True, [1 / 10, 9 / 10]),
        (ScoreFunction.SOFTMAX, False, [1 / 21, 9 / 21]),
        (ScoreFunction.SIGMOID, True, [5 / 14, 9 / 14]),
        (ScoreFunction.SIGMOID, False, [1 / 2, 9 / 10]),
        (ScoreFunction.SQRT_SOFTPLUS, False, [np.log(2) ** 0.5, np.log(10) ** 0.5]),
    ],
)
def test_c10_replayed_experts_of_two_groups_weigh_what_their_own_scores_say(
    function, normalise, expected
):
    """The router may use one group of four; the replayed experts 0 and 6 lie in two."""
    limited = rule(function, normalise=normalise, groups=2)
    weights = gate_weights(LOGITS, np.array([[0, 6]]), limited)
    assert weights == pytest.approx(np.array([expected]))


def test_c10_the_bias_chooses_and_does_not_weigh():
    chosen = rule(ScoreFunction.SIGMOID)
    ids = live_ids(LOGITS, chosen, BIAS)
    assert ids.tolist() == [[0, 6]]
    assert gate_weights(LOGITS, ids, chosen) == pytest.approx(np.array([[5 / 14, 9 / 14]]))


def test_c10_control_biased_scores_would_weigh_otherwise():
    biased = np.array([0.5, 0.9]) + BIAS[[0, 6]]
    assert biased / biased.sum() != pytest.approx(np.array([5 / 14, 9 / 14]), abs=0.1)


def test_c10_control_the_live_choice_keeps_to_one_group():
    limited = rule(ScoreFunction.SIGMOID, groups=2)
    assert sorted(live_ids(LOGITS, limited)[0].tolist()) == [1, 3]
    assert sorted(live_ids(LOGITS, rule(ScoreFunction.SIGMOID))[0].tolist()) == [3, 6]
