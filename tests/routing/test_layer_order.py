"""A payload shifted by a layer is refused from its first rows on; one in order never is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moe_replay.errors import TraceError
from moe_replay.routing import (
    LayerOrder,
    Origin,
    RoutedModel,
    RoutingTrace,
    trace_from_payload,
    trace_from_split_payload,
)

EXPERTS, TOPK, LAYERS = 16, 4, 6
MODEL = RoutedModel(
    moe_layers=(1, 2, 3, 4, 5), num_decoder_layers=LAYERS, num_experts=EXPERTS, topk=TOPK
)


def routes(num_rows: int, num_layers: int, *, seed: int = 0, experts: int = EXPERTS) -> np.ndarray:
    draws = np.random.default_rng(seed).random((num_rows, num_layers, experts))
    return np.argsort(draws, axis=2)[:, :, :TOPK].astype(np.uint8)


def shifted(num_rows: int, *, seed: int = 0) -> np.ndarray:
    """Layers 1 to 5 and a prediction layer, where layers 0 to 5 belong."""
    return routes(num_rows, LAYERS, seed=seed)


def in_order(num_rows: int, fill: Callable[[int], np.ndarray], *, seed: int = 0) -> np.ndarray:
    rows = routes(num_rows, LAYERS, seed=seed).astype(np.int64)
    rows[:, 0] = fill(num_rows)
    return rows


def read(rows: np.ndarray, *, model: RoutedModel = MODEL, **options: object) -> RoutingTrace:
    count = len(rows) + 1
    return trace_from_payload(
        rows,
        token_ids=np.arange(count),
        num_prompt_tokens=1,
        model=model,
        origin=Origin.single(engine="x", engine_version="1", policy_version=0, num_rows=count),
        where="request 7",
        **options,
    )


REFUSED = r"request 7: decoder layer 0 is dense, .* multi-token-prediction layers"


@pytest.mark.parametrize("num_rows", [2, 3, 5, 20, 31, 32, 200])
def test_e12_a_shift_is_refused_however_few_rows_there_are(num_rows):
    with pytest.raises(TraceError, match=REFUSED):
        read(shifted(num_rows))


@pytest.mark.parametrize("num_unwritten", [1, 50, 190])
def test_e12_rows_that_nobody_wrote_do_not_hide_a_shift(num_unwritten):
    rows = shifted(200)
    rows[:num_unwritten] = 0
    with pytest.raises(TraceError, match=REFUSED):
        read(rows, unwritten="invalid")


def test_e12_either_part_of_a_split_payload_shows_a_shift():
    for prompt, sampled in ((shifted(3), routes(4, 5)), (routes(3, 5), shifted(4))):
        with pytest.raises(TraceError, match=REFUSED):
            trace_from_split_payload(
                prompt,
                sampled,
                token_ids=np.arange(8),
                num_prompt_tokens=3,
                model=MODEL,
                origin=Origin.single(engine="x", engine_version="1", policy_version=0, num_rows=8),
                where="request 7",
            )


FILLS: dict[str, Callable[[int], np.ndarray]] = {
    "zeros": lambda n: np.zeros((n, TOPK)),
    "minus one": lambda n: np.full((n, TOPK), -1),
    "255": lambda n: np.full((n, TOPK), 255),
    "the first experts in every row": lambda n: np.tile(np.arange(TOPK), (n, 1)),
    "random bytes": lambda n: np.random.default_rng(n).integers(0, 256, (n, TOPK)),
    "leftovers of routes in a tenth of the rows": lambda n: (
        routes(n, 1, seed=5)[:, 0] * (np.arange(n) % 10 == 9)[:, None]
    ),
}


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS.keys())
@pytest.mark.parametrize("num_rows", [1, 2, 5, 31, 32, 400])
def test_e12_layers_in_order_are_taken_whatever_the_dense_one_holds(num_rows, fill):
    rows, order = in_order(num_rows, fill), LayerOrder()
    for _ in range(40):
        trace = read(rows, layer_order=order)
    assert (trace.expert_ids[:-1] == rows[:, 1:]).all()


def test_e12_rows_of_an_engine_add_up_where_one_alone_proves_nothing():
    order = LayerOrder()
    # A payload of one row: a filler could look like it.
    read(shifted(1, seed=0), layer_order=order)
    with pytest.raises(TraceError, match=REFUSED):
        read(shifted(1, seed=1), layer_order=order)
    # The control: without the engine's evidence both are taken.
    read(shifted(1, seed=0))
    read(shifted(1, seed=1))


def test_e12_a_server_that_is_replaced_is_judged_by_its_own_rows():
    order = LayerOrder()
    for seed in range(100):
        read(in_order(200, FILLS["zeros"], seed=seed), layer_order=order)
    with pytest.raises(TraceError, match=REFUSED):
        read(shifted(40), layer_order=order)


def test_e12_the_message_counts_the_rows():
    rows = shifted(10)
    rows[3] = 0
    with pytest.raises(TraceError, match="in 9 of 9 rows, which differ"):
        read(rows, unwritten="invalid")


def test_e12_models_without_dense_layers_are_not_judged():
    model = RoutedModel(
        moe_layers=tuple(range(LAYERS)), num_decoder_layers=LAYERS, num_experts=EXPERTS, topk=TOPK
    )
    assert len(read(shifted(40), model=model)) == 41


def test_e12_random_payloads_are_read_right_or_refused():
    """Any count of rows, dense layers anywhere, unwritten rows: no layer lands on another."""
    seed = 3
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for _ in range(300):
        num_layers, num_rows = int(rng.integers(2, 9)), int(rng.integers(2, 60))
        moe = np.flatnonzero(rng.random(num_layers) < 0.6)
        if len(moe) in (0, num_layers):
            continue
        model = RoutedModel(
            moe_layers=tuple(moe.tolist()),
            num_decoder_layers=num_layers,
            num_experts=EXPERTS,
            topk=TOPK,
        )
        every = routes(num_rows, num_layers, seed=int(rng.integers(1 << 30)))
        unwritten = rng.random(num_rows) < 0.3
        ordered = np.where(np.isin(np.arange(num_layers), moe)[None, :, None], every, 0)
        ordered[unwritten] = every[unwritten] = 0
        trace = read(ordered, model=model, unwritten="invalid")
        assert trace.valid[:-1].tolist() == (~unwritten).tolist()
        assert (trace.expert_ids[:-1] == ordered[:, moe]).all()
        if (~unwritten).sum() > 1:
            with pytest.raises(TraceError, match="is dense"):
                read(every, model=model, unwritten="invalid")
