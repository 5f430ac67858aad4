"""The reference router: by hand, and against the real Megatron-Core."""

from importlib import import_module
from itertools import product

import numpy as np
import pytest

from moe_replay.errors import RecipeError, TraceError
from moe_replay.routing.reference import (
    RouterRule,
    ScoreFunction,
    gate_weights,
    live_ids,
)

from ..support.gates import dense_weights, gate_gradient

TOKENS, EXPERTS, TOPK = 24, 16, 4
GROUPS = [(None, None), (4, 2)]


def rule(
    function: ScoreFunction, *, normalise: bool = True, groups=(None, None), scale: float = 1.0
) -> RouterRule:
    return RouterRule(
        num_experts=EXPERTS,
        topk=TOPK,
        score_function=function,
        normalise=normalise,
        scaling_factor=scale,
        num_groups=groups[0],
        groups_per_token=groups[1],
    )


def tiny(function: ScoreFunction, *, topk: int, normalise: bool, scale: float = 1.0) -> RouterRule:
    return RouterRule(
        num_experts=3,
        topk=topk,
        score_function=function,
        normalise=normalise,
        scaling_factor=scale,
    )


def logits_of(seed: int) -> np.ndarray:
    print(f"seed {seed}")
    return np.random.default_rng(seed).standard_normal((TOKENS, EXPERTS)) * 2


def replayed_of(seed: int) -> np.ndarray:
    """Ids that have nothing to do with the logits, so most lie outside the live top-k."""
    return np.random.default_rng(seed).random((TOKENS, EXPERTS)).argsort(axis=1)[:, :TOPK]


LOG = np.log(np.array([[1.0, 2.0, 5.0]]))


def test_softmax_over_all_experts_gives_their_probabilities():
    weights = gate_weights(
        LOG, np.array([[2, 0]]), tiny(ScoreFunction.SOFTMAX, topk=2, normalise=False)
    )
    assert weights == pytest.approx(np.array([[5 / 8, 1 / 8]]))


def test_softmax_over_the_chosen_experts_sums_to_the_scaling_factor():
    chosen = tiny(ScoreFunction.SOFTMAX, topk=2, normalise=True, scale=2.5)
    assert gate_weights(LOG, np.array([[2, 0]]), chosen) == pytest.approx(
        np.array([[2.5 * 5 / 6, 2.5 / 6]])
    )


def test_sigmoid_scores_are_normalised_over_the_chosen():
    # sigmoid(log x) = x / (1 + x): 1/2, 2/3, 5/6.
    chosen = tiny(ScoreFunction.SIGMOID, topk=2, normalise=True)
    assert gate_weights(LOG, np.array([[0, 2]]), chosen) == pytest.approx(
        np.array([[3 / 8, 5 / 8]])
    )


def test_sqrt_softplus_scores_by_hand():
    # softplus(log x) = log(1 + x).
    chosen = tiny(ScoreFunction.SQRT_SOFTPLUS, topk=1, normalise=False)
    assert gate_weights(LOG, np.array([[2]]), chosen) == pytest.approx(
        np.array([[np.log(6) ** 0.5]])
    )


def test_live_ids_come_best_first():
    chosen = tiny(ScoreFunction.SOFTMAX, topk=2, normalise=True)
    assert live_ids(np.array([[0.5, 3.0, 1.0]]), chosen).tolist() == [[1, 2]]


def test_expert_bias_moves_the_choice_and_not_the_weights():
    chosen = tiny(ScoreFunction.SIGMOID, topk=1, normalise=False)
    ids = live_ids(LOG, chosen, np.array([1.0, 0.0, 0.0]))
    assert ids.tolist() == [[0]]
    assert gate_weights(LOG, ids, chosen) == pytest.approx(np.array([[0.5]]))


def test_group_limit_keeps_experts_of_the_best_groups():
    # Groups (0, 1) and (2, 3): expert 0 is the best of all, yet group 1 has the larger sum.
    limited = RouterRule(
        num_experts=4,
        topk=2,
        score_function=ScoreFunction.SIGMOID,
        normalise=True,
        num_groups=2,
        groups_per_token=1,
    )
    assert live_ids(np.array([[2.0, -9.0, 1.5, 1.0]]), limited).tolist() == [[2, 3]]


def test_replayed_ids_may_leave_the_group_limit():
    limited = rule(ScoreFunction.SIGMOID, groups=(4, 2))
    spread = np.tile([0, 4, 8, 12], (TOKENS, 1))
    assert gate_weights(logits_of(1), spread, limited).sum(axis=1) == pytest.approx(np.ones(TOKENS))


def test_a_bias_of_a_softmax_router_is_added_to_probabilities_not_to_logits():
    """Logits of 0 and log 3 are shares of 1/4 and 3/4: 0.6 moves the choice, 0.4 does not."""
    chosen = RouterRule(num_experts=2, topk=1, score_function=ScoreFunction.SOFTMAX, normalise=True)
    logits = np.array([[0.0, np.log(3.0)]])
    assert live_ids(logits, chosen, np.array([0.6, 0.0])).tolist() == [[0]]
    assert live_ids(logits, chosen, np.array([0.4, 0.0])).tolist() == [[1]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [([[0, 0]], "names an expert twice"), ([[0, 3]], r"lie in 0\.\.2"), ([[0]], "ids of shape")],
)
def test_gate_weights_refuse_impossible_ids(ids, message):
    with pytest.raises(TraceError, match=message):
        gate_weights(LOG, np.array(ids), tiny(ScoreFunction.SOFTMAX, topk=2, normalise=True))


@pytest.mark.parametrize("groups", [(3, 1), (4, 3), (8, 1), (4, None)])
def test_rule_refuses_groups_that_do_not_fit(groups):
    with pytest.raises(RecipeError):
        rule(ScoreFunction.SIGMOID, groups=groups)


def test_gate_gradient_of_unchosen_experts_is_zero_when_normalised():
    ids = replayed_of(3)
    gradient = gate_gradient(
        logits_of(2),
        ids,
        rule(ScoreFunction.SOFTMAX),
        np.arange(TOKENS * TOPK).reshape(TOKENS, -1) / 9,
    )
    chosen = dense_weights(ids, np.ones(ids.shape), EXPERTS) > 0
    assert (gradient[~chosen] == 0).all()
    assert (gradient[chosen] != 0).all()


def megatron_route(logits: np.ndarray, chosen: RouterRule, *, bias=None, replayed=None):
    """Return (inputs, weights, map) of the real Megatron-Core, which computes in float32."""
    import_module("moe_replay.megatron")  # makes megatron.core importable without CUDA
    import torch
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    router = None
    if replayed is not None:
        router = RouterReplay()
        RouterReplay.global_router_replay_instances.remove(router)
        router.set_target_indices(torch.tensor(replayed))
        router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    inputs = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    weights, routing_map = topk_routing_with_score_function(
        inputs,
        chosen.topk,
        use_pre_softmax=not chosen.normalise,
        num_groups=chosen.num_groups,
        group_topk=chosen.groups_per_token,
        scaling_factor=chosen.scaling_factor,
        score_function=str(chosen.score_function),
        expert_bias=None if bias is None else torch.tensor(bias, dtype=torch.float32),
        router_replay=router,
    )
    return inputs, weights, routing_map.numpy()


CASES = [
    (function, normalise, groups, biased)
    for function, normalise, groups, biased in product(
        (ScoreFunction.SOFTMAX, ScoreFunction.SIGMOID), (True, False), GROUPS, (False, True)
    )
    # Megatron-Core normalises every sigmoid router, and biases no softmax router.
    if (normalise or function is ScoreFunction.SOFTMAX)
    and not (biased and function is ScoreFunction.SOFTMAX)
]


@pytest.mark.parametrize(("function", "normalise", "groups", "biased"), CASES)
def test_live_routes_equal_megatron(function, normalise, groups, biased):
    logits = logits_of(5)
    chosen = rule(function, normalise=normalise, groups=groups, scale=2.5)
    bias = np.random.default_rng(6).standard_normal(EXPERTS) if biased else None
    ids = live_ids(logits, chosen, bias)
    _, weights, routing_map = megatron_route(logits, chosen, bias=bias)
    assert (dense_weights(ids, np.ones(ids.shape), EXPERTS) > 0).tolist() == routing_map.tolist()
    ours = dense_weights(ids, gate_weights(logits, ids, chosen), EXPERTS)
    assert ours == pytest.approx(weights.detach().numpy(), abs=1e-6)


@pytest.mark.parametrize(("function", "normalise", "groups", "biased"), CASES)
def test_replayed_weights_and_gradients_equal_megatron(function, normalise, groups, biased):
    logits, ids = logits_of(7), replayed_of(8)
    chosen = rule(function, normalise=normalise, groups=groups, scale=2.5)
    bias = np.random.default_rng(9).standard_normal(EXPERTS) if biased else None
    inputs, weights, routing_map = megatron_route(logits, chosen, bias=bias, replayed=ids)
    upstream = np.random.default_rng(10).standard_normal((TOKENS, EXPERTS))
    (weights * weights.new_tensor(upstream)).sum().backward()
    assert (dense_weights(ids, np.ones(ids.shape), EXPERTS) > 0).tolist() == routing_map.tolist()
    ours = dense_weights(ids, gate_weights(logits, ids, chosen), EXPERTS)
    assert ours == pytest.approx(weights.detach().numpy(), abs=1e-6)
    gradient = gate_gradient(logits, ids, chosen, np.take_along_axis(upstream, ids, axis=1))
    assert gradient == pytest.approx(inputs.grad.numpy(), abs=1e-5)


def test_live_and_replayed_megatron_weights_differ():
    logits, ids = logits_of(7), replayed_of(8)
    chosen = rule(ScoreFunction.SOFTMAX)
    live, replayed = (megatron_route(logits, chosen, replayed=r)[1] for r in (None, ids))
    assert (live != replayed).any()
