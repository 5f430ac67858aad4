"""Slices of ranks: each route lands once, on the rank, row and layer that it names."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.errors import TraceError
from moe_replay.routing import Origin, RouteSlice, RoutingTrace, RowIndex, slice_routes

LAYERS = (1, 2, 5, 7)


def spelled(sample: int, num_rows: int, *, num_experts: int = 256, topk: int = 3) -> RoutingTrace:
    """Return a trace whose routes name the sample, the row and the layer that they belong to."""
    ids = np.zeros((num_rows, len(LAYERS), topk), dtype=np.int64)
    ids[..., 0] = sample
    ids[..., 1] = 50 + np.arange(num_rows)[:, None]
    ids[..., 2] = 100 + np.array(LAYERS)
    ids[..., 3:] = 200 + np.arange(topk - 3)
    return RoutingTrace.record(
        ids,
        token_ids=1000 * sample + np.arange(num_rows),
        valid=np.arange(num_rows) < num_rows - 1,
        layers=LAYERS,
        num_experts=num_experts,
        origin=Origin.single(
            engine="vllm", engine_version="1", policy_version=0, num_rows=num_rows
        ),
    )


def batch(lengths, **options) -> list[RoutingTrace]:
    return [spelled(number, length, **options) for number, length in enumerate(lengths)]


def landed(made: RouteSlice) -> list[tuple[int, int, int]]:
    """Return (sample, row, layer) of every valid route, after checking its layer."""
    found = []
    for place, layer in enumerate(made.layers):
        ids = made.expert_ids[place, made.valid].astype(int)
        assert (ids[:, 2] == 100 + layer).all()
        found += [(int(ids[r, 0]), int(ids[r, 1]) - 50, layer) for r in range(len(ids))]
    return found


def test_slice_of_one_rank_holds_the_batch_layer_by_layer():
    made = slice_routes(batch([3, 2]), RowIndex.packed([3, 2], pad_multiple=4))
    assert made.expert_ids.shape == (4, 8, 3)
    assert made.expert_ids[:, :, 0].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]] * 4
    assert made.expert_ids[:, :5, 1].tolist() == [[50, 51, 52, 50, 51]] * 4
    assert made.valid.tolist() == [True, True, False, True, False, False, False, False]
    assert (made.layers, made.num_experts) == (LAYERS, 256)


@pytest.mark.parametrize("layers", [(1,), (2, 5), (1, 7), (1, 5, 7)])
def test_slice_holds_the_layers_that_were_asked_for(layers):
    made = slice_routes(batch([3, 2]), RowIndex.packed([3, 2]), layers=layers)
    assert made.layers == layers
    assert landed(made) == [(s, r, n) for n in layers for s, r in ((0, 0), (0, 1), (1, 0))]


@given(
    st.lists(st.integers(1, 13), min_size=1, max_size=5),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from(["zigzag", "contiguous"]),
    st.sampled_from(["packed", "left", "right"]),
)
def test_every_route_lands_once_over_all_ranks(lengths, cp, tp, partition, form):
    """Over context, sequence and pipeline ranks, for packed batches and padded ones."""
    traces, found = batch(lengths), []
    for cp_rank, tp_rank, stage in product(range(cp), range(tp), ((1, 2), (5,), (7,))):
        options = {"cp_size": cp, "cp_rank": cp_rank, "cp_partition": partition}
        index = (
            RowIndex.packed(lengths, pad_multiple=tp, **options)
            if form == "packed"
            else RowIndex.padded(lengths, max_length=16, side=form, **options)
        ).sequence_shard(tp, tp_rank)
        made = slice_routes(traces, index, layers=stage)
        assert made.expert_ids.nbytes == len(index.rows) * len(stage) * 3
        assert not made.valid[~index.is_token].any()
        found += landed(made)
    expected = product(
        ((s, r) for s, length in enumerate(lengths) for r in range(length - 1)), LAYERS
    )
    assert sorted(found) == sorted((s, r, layer) for (s, r), layer in expected)


@given(
    st.lists(st.integers(1, 13), min_size=1, max_size=5),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["zigzag", "contiguous"]),
)
def test_slice_is_what_gathering_the_whole_batch_would_give(lengths, cp, partition):
    traces = batch(lengths)
    ids = np.concatenate([trace.expert_ids for trace in traces])
    valid = np.concatenate([trace.valid for trace in traces])
    for rank in range(cp):
        index = RowIndex.packed(lengths, cp_size=cp, cp_rank=rank, cp_partition=partition)
        made = slice_routes(traces, index)
        gathered = index.gather(ids, fill=0).transpose(1, 0, 2)
        assert made.expert_ids.tolist() == gathered.tolist()
        assert made.valid.tolist() == index.gather(valid, fill=False).tolist()


def test_control_another_partition_would_put_routes_elsewhere():
    lengths = [8, 5]
    zigzag, contiguous = (
        landed(
            slice_routes(
                batch(lengths), RowIndex.packed(lengths, cp_size=2, cp_partition=partition)
            )
        )
        for partition in ("zigzag", "contiguous")
    )
    assert sorted(zigzag) != sorted(contiguous)


@pytest.mark.parametrize("topk", [3, 4, 6, 8])
@pytest.mark.parametrize(("num_experts", "itemsize"), [(256, 1), (257, 2)])
def test_slice_is_as_wide_as_the_trace_for_any_topk(topk, num_experts, itemsize):
    traces = batch([3, 2], num_experts=num_experts, topk=topk)
    made = slice_routes(traces, RowIndex.packed([3, 2]), layers=(2, 5))
    assert made.expert_ids.nbytes == 2 * 5 * topk * itemsize
    assert (made.expert_ids[..., 3:] == 200 + np.arange(topk - 3)).all()
    assert len(landed(made)) == 2 * 3


def test_slice_reads_traces_of_any_memory_order():
    trace = spelled(0, 4)
    turned = replace(
        trace, expert_ids=np.asfortranarray(trace.expert_ids), valid=np.ones(4, dtype=bool)
    )
    assert not turned.expert_ids.flags.c_contiguous
    made = slice_routes([turned], RowIndex.packed([4]))
    assert made.expert_ids.transpose(1, 0, 2).tolist() == trace.expert_ids.tolist()


@pytest.mark.parametrize("layers", [(1, 3), (0,)])
def test_slice_refuses_layers_that_the_traces_do_not_hold(layers):
    with pytest.raises(TraceError, match="were asked for, the traces hold"):
        slice_routes(batch([3]), RowIndex.packed([3]), layers=layers)


def test_slice_of_a_stage_of_dense_layers_says_only_which_rows_have_routes():
    made = slice_routes(batch([3]), RowIndex.packed([3], pad_multiple=4), layers=())
    assert made.expert_ids.shape[:2] == (0, 4)
    assert made.valid.tolist() == [*spelled(0, 3).valid.tolist(), False]


def test_slice_refuses_layers_in_another_order():
    with pytest.raises(TraceError, match=r"layers \[5, 2\] were asked for, expected increasing"):
        slice_routes(batch([3]), RowIndex.packed([3]), layers=(5, 2))


def test_slice_refuses_traces_of_another_batch():
    with pytest.raises(TraceError, match=r"1 traces have 3 rows, the batch .* has 5"):
        slice_routes(batch([3]), RowIndex.packed([3, 2]))


def test_slice_refuses_traces_of_two_models():
    mixed = [spelled(0, 3), spelled(1, 2, topk=4)]
    with pytest.raises(TraceError, match="traces of 2 forms"):
        slice_routes(mixed, RowIndex.packed([3, 2]))


def test_slice_refuses_an_empty_batch():
    with pytest.raises(TraceError, match="traces of 0 forms"):
        slice_routes([], RowIndex.packed([1]))
