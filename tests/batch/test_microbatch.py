"""Every per-token value of a microbatch lands on the row of its token, on whatever rank that is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.batch import Microbatch, Sample, build_microbatch
from moe_replay.errors import TraceError
from moe_replay.routing import LiveReason, Origin, RoutingTrace
from moe_replay.testing.synthetic_routes import synthetic_trace

EXPERTS = 64


def spelled_trace(number: int, ids: np.ndarray) -> RoutingTrace:
    """Routes that spell where they belong: layer 3 of row t of sample i holds experts {i, 20 + t}."""
    rows = np.arange(len(ids))
    route = np.stack([np.full(len(ids), number), 20 + rows], axis=1)
    return RoutingTrace.record(
        np.stack([route, route[:, ::-1]], axis=1),
        token_ids=ids,
        valid=rows < len(ids) - 1,
        layers=(3, 5),
        num_experts=EXPERTS,
        origin=Origin.single(
            engine="embedded", engine_version="1", policy_version=0, num_rows=len(ids)
        ),
    )


def samples_of(shapes, *, traced: bool = True) -> list[Sample]:
    """One sample for each (prompt, completion) length; token t of sample i is 100 i + t."""
    samples = []
    for number, (prompt, completion) in enumerate(shapes):
        ids = (100 * (number + 1) + np.arange(prompt + completion)).astype(np.int32)
        samples.append(
            Sample(
                sample_id=number + 1,
                token_ids=ids,
                prompt_length=prompt,
                rollout_logprobs=-np.arange(completion, dtype=np.float32),
                advantage=1.0,
                trains=True,
                trace=spelled_trace(number + 1, ids) if traced else None,
            )
        )
    return samples


def ranks_of(shapes, cp: int, pad: int) -> list[Microbatch]:
    return [
        build_microbatch(4, samples_of(shapes), cp_size=cp, cp_rank=rank, pad_multiple=pad)
        for rank in range(cp)
    ]


shape_lists = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=5)


def test_microbatch_of_one_sample_by_hand():
    made = build_microbatch(0, samples_of([(2, 2)]), pad_multiple=3)
    assert made.token_ids.tolist() == [100, 101, 102, 103, 0, 0]
    assert made.positions.tolist() == [0, 1, 2, 3, 0, 0]
    assert made.sample_ids.tolist() == [1, 1, 1, 1, -1, -1]
    assert made.next_ids.tolist() == [101, 102, 103, 0, 0, 0]
    assert made.predicts_sampled.tolist() == [False, True, True, False, False, False]
    assert made.route_valid.tolist() == [True, True, True, False, False, False]
    assert (made.layers, made.num_experts, made.num_rows) == ((3, 5), EXPERTS, 6)


@given(shape_lists, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_routes_land_on_the_rows_of_their_tokens(shapes, cp, pad):
    for made in ranks_of(shapes, cp, pad):
        held = made.route_valid
        assert made.expert_ids is not None
        assert (made.token_ids[held] == 100 * made.sample_ids[held] + made.positions[held]).all()
        spelled = np.stack([made.sample_ids, 20 + made.positions], axis=1)[held]
        assert (made.expert_ids[held, 0] == spelled).all()
        assert (made.expert_ids[held, 1] == spelled[:, ::-1]).all()


@given(shape_lists, st.sampled_from([1, 2, 4]))
def test_every_route_lands_once_over_all_ranks(shapes, cp):
    landed = [
        (int(sample), int(position))
        for made in ranks_of(shapes, cp, 1)
        for sample, position in zip(
            made.sample_ids[made.route_valid], made.positions[made.route_valid], strict=True
        )
    ]
    expected = [(number + 1, t) for number, (p, c) in enumerate(shapes) for t in range(p + c - 1)]
    assert sorted(landed) == expected


@given(shape_lists, st.sampled_from([1, 2, 4]))
def test_next_ids_never_cross_samples(shapes, cp):
    for made in ranks_of(shapes, cp, 1):
        follows = made.next_ids != 0
        assert (made.next_ids[follows] == made.token_ids[follows] + 1).all()
        assert not made.predicts_sampled[~follows].any()


@given(shape_lists, st.sampled_from([1, 2, 4]))
def test_collect_undoes_place_over_all_ranks(shapes, cp):
    values = [np.arange(c) + 1000.0 * number for number, (_, c) in enumerate(shapes)]
    made = ranks_of(shapes, cp, 2)
    whole = np.zeros(made[0].index.num_rows, dtype=np.float32)
    for rank in made:
        local = rank.place(values, fill=-1.0)
        assert ((local >= 0) == rank.predicts_sampled).all()
        rank.index.scatter(local, whole)
    collected = made[0].collect(whole)
    assert [part.tolist() for part in collected] == [part.tolist() for part in values]


def test_place_refuses_values_of_another_length():
    made = build_microbatch(0, samples_of([(2, 2)]))
    with pytest.raises(TraceError, match="sample 1: 3 values for 2 sampled tokens"):
        made.place([np.zeros(3)], fill=0.0)


def test_coverage_counts_padding_and_last_rows():
    found = build_microbatch(0, samples_of([(2, 2), (1, 2)]), pad_multiple=10).coverage
    assert found.num_replayed == 5
    assert found.num_live[LiveReason.LAST_TOKEN] == 2
    assert found.num_live[LiveReason.PADDING] == 3


def test_microbatch_without_traces_has_no_routes():
    made = build_microbatch(0, samples_of([(2, 2)], traced=False))
    assert made.expert_ids is None
    assert not made.route_valid.any()
    assert made.coverage.num_replayed == 0


def test_microbatch_refuses_a_sample_without_a_trace_among_others():
    traced, bare = samples_of([(2, 2)]), samples_of([(2, 2), (2, 2)], traced=False)[1:]
    with pytest.raises(TraceError, match=r"samples \[2\] have no trace"):
        build_microbatch(0, [*traced, *bare])


def test_microbatch_refuses_traces_of_two_models():
    ids = np.array([7, 8, 9], dtype=np.int32)
    other = Sample(
        sample_id=9,
        token_ids=ids,
        prompt_length=1,
        rollout_logprobs=np.zeros(2, dtype=np.float32),
        advantage=0.0,
        trains=True,
        trace=synthetic_trace(ids, seed=1),
    )
    with pytest.raises(TraceError, match="traces of one microbatch differ"):
        build_microbatch(0, [*samples_of([(2, 2)]), other])
