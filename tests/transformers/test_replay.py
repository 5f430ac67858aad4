from copy import deepcopy

import numpy as np
import pytest
import torch

from moe_replay.errors import ReplayScopeError, TraceError
from moe_replay.transformers import find_routers, record_routes, replay_routes
from moe_replay.transformers.replay import _check_routes

LAYERS = (0, 1)
ROWS = 14


def own_routes(model, token_ids):
    with torch.no_grad(), record_routes(model) as recorder:
        logits = model(token_ids).logits
    return recorder.take().numpy(), logits


def constant(experts=(0, 1, 2, 3)):
    return np.broadcast_to(np.array(experts), (ROWS, 2, 4)).copy()


def everywhere(value=True):
    return np.full(ROWS, value)


def replayed(model, token_ids, ids, valid):
    with torch.no_grad(), replay_routes(model, ids, valid, layers=LAYERS):
        return model(token_ids).logits


def test_own_routes_change_no_bit(model, token_ids):
    ids, live = own_routes(model, token_ids)
    assert torch.equal(replayed(model, token_ids, ids, everywhere()), live)


def test_own_routes_change_no_bit_in_bfloat16(model, token_ids):
    model.bfloat16()
    ids, live = own_routes(model, token_ids)
    assert torch.equal(replayed(model, token_ids, ids, everywhere()), live)


def test_constant_routes_change_the_logits(model, token_ids):
    _, live = own_routes(model, token_ids)
    logits = replayed(model, token_ids, constant(), everywhere())
    assert (logits - live).abs().amax(dim=-1).min() > 1e-3


def test_the_experts_that_run_are_the_replayed_ones(model, token_ids):
    ids = constant((3, 7, 1, 15))
    with (
        torch.no_grad(),
        replay_routes(model, ids, everywhere(), layers=LAYERS),
        record_routes(model) as recorder,
    ):
        model(token_ids)
    assert (recorder.take().numpy() == ids).all()


def test_a_recorder_around_the_scope_sees_live_routes(qwen, token_ids):
    live, _ = own_routes(qwen, token_ids)
    with torch.no_grad(), record_routes(qwen) as recorder:
        replayed(qwen, token_ids, constant(), everywhere())
    assert (recorder.take().numpy()[:, 0] == live[:, 0]).all()


def test_weights_are_the_softmax_over_the_replayed_experts(family_dirs, token_ids):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family_dirs["mixtral"], dtype=torch.float32)
    seen = []
    (router, *_) = (site.module for site in find_routers(model))
    with (
        torch.no_grad(),
        replay_routes(model, constant(), everywhere(), layers=LAYERS),
        router.register_forward_hook(lambda module, args, output: seen.append(output)),
    ):
        model(token_ids)
    ((logits, weights, ids),) = seen
    assert ids.tolist() == constant()[:, 0].tolist()
    assert torch.allclose(weights, torch.softmax(logits[:, :4], dim=-1), atol=1e-6)


def test_rows_without_route_run_live_and_their_ids_are_not_read(model, token_ids):
    ids, live = own_routes(model, token_ids)
    ids = ids.astype(np.uint16)
    valid = everywhere()
    valid[5:9] = False
    ids[5:9] = 65_535
    assert torch.equal(replayed(model, token_ids, ids, valid), live)


def test_only_valid_rows_are_forced(qwen, token_ids):
    valid = everywhere(False)
    valid[3] = True
    with (
        torch.no_grad(),
        replay_routes(qwen, constant(), valid, layers=LAYERS),
        record_routes(qwen) as recorder,
    ):
        qwen(token_ids)
    live, _ = own_routes(qwen, token_ids)
    ran = recorder.take().numpy()[:, 0]
    assert ran[3].tolist() == [0, 1, 2, 3]
    others = np.arange(ROWS) != 3
    assert (ran[others] == live[others, 0]).all()


def test_entries_are_found_by_layer_number(qwen, token_ids):
    ids, live = own_routes(qwen, token_ids)
    dense = np.full((ROWS, 1, 4), 9)
    wider = np.concatenate([ids[:, 1:], dense, ids[:, :1]], axis=1)
    with torch.no_grad(), replay_routes(qwen, wider, everywhere(), layers=(1, 5, 0)):
        assert torch.equal(qwen(token_ids).logits, live)


def test_the_gate_gets_its_gradient_through_the_replayed_experts(qwen, token_ids):
    gate = find_routers(qwen)[0].module.weight

    def loss():
        with replay_routes(qwen, constant(), everywhere(), layers=LAYERS):
            return qwen(token_ids).logits.square().mean()

    loss().backward()
    step = 1e-2
    expert = gate.grad.norm(dim=1)[:4].argmax()
    direction = gate.grad[expert] / gate.grad[expert].norm()
    with torch.no_grad():
        gate[expert] += step * direction
        up = loss()
        gate[expert] -= 2 * step * direction
        down = loss()
    slope = float(up - down) / (2 * step)
    assert slope == pytest.approx(float(gate.grad[expert].norm()), rel=0.02)
    # Experts that no row was sent to have no say in the weights that were renormalised over the
    # others.
    assert gate.grad[4:].abs().max() < 1e-6 * gate.grad[:4].abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_inside_the_scope_gives_the_same_gradients(qwen, token_ids, reentrant):
    qwen.train()

    def gradient():
        qwen.zero_grad()
        with replay_routes(qwen, constant(), everywhere(), layers=LAYERS):
            qwen(token_ids).logits.square().mean().backward()
        return find_routers(qwen)[0].module.weight.grad.clone()

    plain = gradient()
    qwen.activation_checkpointing_enable({"use_reentrant": reentrant})
    qwen.enable_input_require_grads()
    assert torch.equal(gradient(), plain)


def test_recomputation_after_the_scope_is_refused(qwen, token_ids):
    qwen.train()
    qwen.activation_checkpointing_enable()
    with (
        pytest.raises(ReplayScopeError, match=r"call backward\(\) inside"),
        replay_routes(qwen, constant(), everywhere(), layers=LAYERS),
    ):
        qwen(token_ids)


def test_a_forward_without_gradients_needs_no_backward(qwen, token_ids):
    qwen.train()
    qwen.activation_checkpointing_enable()
    replayed(qwen, token_ids, constant(), everywhere())


def test_routing_is_live_after_the_scope_and_after_an_exception(qwen, token_ids):
    _, live = own_routes(qwen, token_ids)
    with pytest.raises(KeyError), replay_routes(qwen, constant(), everywhere(), layers=LAYERS):
        raise KeyError
    assert torch.equal(own_routes(qwen, token_ids)[1], live)


def test_a_scope_in_which_nothing_ran_raises(qwen):
    with (
        pytest.raises(ReplayScopeError, match=r"layers \[0, 1\] never ran"),
        replay_routes(qwen, constant(), everywhere(), layers=LAYERS),
    ):
        pass


def test_a_forward_of_another_size_raises(qwen, token_ids):
    with pytest.raises(ReplayScopeError, match=r"got 7 rows.*for 14"):
        replayed(qwen, token_ids[:1], constant(), everywhere())


def test_a_layer_without_routes_raises(qwen):
    with (
        pytest.raises(TraceError, match=r"no routes for the model's layers \[1\]"),
        replay_routes(qwen, constant()[:, :1], everywhere(), layers=(0,)),
    ):
        pass


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (constant((0, 1, 2, 16)), "0 to 16, expected 0 to 15"),
        (constant((-1, 1, 2, 3)), "-1 to 3"),
        (constant((5, 1, 2, 5)), "one expert twice"),
        (constant()[..., :3], r"\[rows, 2, 3\]"),
    ],
)
def test_impossible_routes_raise(qwen, ids, message):
    with (
        pytest.raises(TraceError, match=message),
        replay_routes(qwen, ids, everywhere(), layers=LAYERS),
    ):
        pass


@pytest.mark.parametrize(
    ("ids", "valid", "message"),
    [
        (constant().astype(np.float32), everywhere(), "expected integers"),
        (constant(), everywhere()[:-1], r"expected bool\[14\]"),
        (constant(), everywhere().astype(int), r"expected bool\[14\]"),
    ],
)
def test_arrays_of_another_kind_raise(qwen, ids, valid, message):
    # Past the annotations, which would stop them first while tests run.
    with pytest.raises(TraceError, match=message):
        _check_routes(ids, valid, LAYERS, find_routers(qwen))


def test_a_second_replay_scope_is_refused(qwen, token_ids):
    with (
        pytest.raises(ReplayScopeError, match="already in an open replay scope"),
        replay_routes(qwen, constant(), everywhere(), layers=LAYERS),
    ):
        replayed(qwen, token_ids, constant(), everywhere())
    _, live = own_routes(qwen, token_ids)
    assert torch.equal(qwen(token_ids).logits, live)


def test_two_models_are_replayed_at_once(qwen, token_ids):
    other = deepcopy(qwen)
    _, live = own_routes(qwen, token_ids)
    expected = replayed(qwen, token_ids, constant(), everywhere())
    ids, _ = own_routes(qwen, token_ids)
    with (
        torch.no_grad(),
        replay_routes(qwen, constant(), everywhere(), layers=LAYERS),
        replay_routes(other, ids, everywhere(), layers=LAYERS),
    ):
        first, second = qwen(token_ids).logits, other(token_ids).logits
    assert torch.equal(first, expected)
    assert torch.equal(second, live)


def test_several_forwards_of_one_batch_may_share_a_scope(qwen, token_ids):
    expected = replayed(qwen, token_ids, constant(), everywhere())
    with torch.no_grad(), replay_routes(qwen, constant(), everywhere(), layers=LAYERS):
        assert torch.equal(qwen(token_ids).logits, expected)
        assert torch.equal(qwen(token_ids).logits, expected)


def test_a_copy_made_inside_a_scope_is_refused(qwen):
    with (
        pytest.raises(ReplayScopeError, match="copied or pickled inside a scope"),
        record_routes(qwen),
    ):
        deepcopy(qwen)
    deepcopy(qwen)


def test_a_forward_that_was_replaced_before_the_scope_comes_back(qwen, token_ids):
    router = find_routers(qwen)[0].module
    plain = router.forward

    def doubled(hidden_states):
        logits, weights, ids = plain(hidden_states)
        return logits, 2 * weights, ids

    router.forward = doubled
    ids, live = own_routes(qwen, token_ids)
    assert torch.equal(replayed(qwen, token_ids, ids, everywhere()), live)
    assert router.forward is doubled
    with (
        pytest.raises(ReplayScopeError, match="was replaced inside a scope"),
        record_routes(qwen),
    ):
        router.forward = plain
