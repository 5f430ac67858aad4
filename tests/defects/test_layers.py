"""Defects by which routes land in other layers; one id of the catalogue in each test's name."""

import numpy as np
import pytest

from moe_replay.errors import TraceError
from moe_replay.routing import Origin, RoutedModel, RoutingTrace, trace_from_payload

TOKENS = np.arange(40) + 5
NUM_EXPERTS, TOPK = 32, 4


def spelled(num_rows: int, layers: list[int]) -> np.ndarray:
    """Return routes whose first expert is the decoder layer, so that a shift by a layer shows."""
    rest = np.random.default_rng(0).random((num_rows, len(layers), 16)).argsort(axis=2)
    ids = 16 + rest[..., :TOPK]
    ids[..., 0] = layers
    return ids


def trace_of(payload: np.ndarray, moe_layers: list[int], num_layers: int) -> RoutingTrace:
    return trace_from_payload(
        payload,
        token_ids=TOKENS,
        num_prompt_tokens=10,
        model=RoutedModel(
            moe_layers=tuple(moe_layers),
            num_decoder_layers=num_layers,
            num_experts=NUM_EXPERTS,
            topk=TOPK,
        ),
        origin=Origin.single(
            engine="vllm", engine_version="1", policy_version=0, num_rows=len(TOKENS)
        ),
        where="request 0",
    )


LAYOUTS = {
    "first dense": ([1, 2, 3, 4, 5], 6),
    "three dense first": ([3, 4, 5], 6),
    "every second": ([1, 3, 5], 6),
    "frequency list": ([0, 2, 3], 6),
    "none dense": ([0, 1, 2, 3], 4),
}


@pytest.mark.parametrize("form", ["all layers", "MoE layers"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_b1_each_router_gets_the_routes_of_its_own_decoder_layer(layout, form):
    moe_layers, num_layers = LAYOUTS[layout]
    payload = spelled(39, moe_layers)
    if form == "all layers":
        every = np.zeros((39, num_layers, TOPK), dtype=payload.dtype)
        every[:, moe_layers] = payload
        payload = every
    trace = trace_of(payload, moe_layers, num_layers)
    assert trace.layers == tuple(moe_layers)
    assert (trace.expert_ids[:39, :, 0] == moe_layers).all()


def test_b1_control_taking_the_first_layers_would_shift_every_route():
    moe_layers, num_layers = LAYOUTS["first dense"]
    every = np.zeros((39, num_layers, TOPK), dtype=np.int64)
    every[:, moe_layers] = spelled(39, moe_layers)
    assert not (every[:, : len(moe_layers), 0] == moe_layers).any()


def test_b2_as_many_prediction_layers_as_dense_ones_raise_although_the_count_fits():
    """46 decoder layers, the first one dense; the engine appends its MTP layer to the 45."""
    appended = spelled(39, [k % 16 for k in range(1, 47)])
    assert appended.shape[1] == 46
    with pytest.raises(TraceError, match=r"layer 0 is dense, .* multi-token-prediction layers"):
        trace_of(appended, list(range(1, 46)), 46)


def test_b2_control_the_decoder_layers_in_order_are_accepted():
    every = spelled(39, [k % 16 for k in range(46)])
    every[:, 0] = 0
    trace = trace_of(every, list(range(1, 46)), 46)
    assert (trace.expert_ids[:39, :, 0] == [k % 16 for k in range(1, 46)]).all()
