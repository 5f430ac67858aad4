"""Every per-token value of a microbatch lands on the row of its token, on whatever rank that is."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.batch import Microbatch, RankPlace, build_microbatch
from moe_replay.errors import TraceError
from moe_replay.routing import Origin, RoutingTrace
from moe_replay.testing.policies import lone_replica, shared
from moe_replay.testing.samples import RoutedSample
from moe_replay.testing.synthetic_routes import synthetic_trace

EXPERTS = 64
ALONE = RankPlace()


def spelled_trace(number: int, ids: np.ndarray) -> RoutingTrace:
    """Routes that spell where they belong: layer 3 of row t of sample i has experts {i, 20 + t}."""
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


def samples_of(shapes) -> list[RoutedSample]:
    """One sample for each (prompt, completion) length; token t of sample i is 100 i + t."""
    samples = []
    for number, (prompt, completion) in enumerate(shapes):
        ids = (100 * (number + 1) + np.arange(prompt + completion)).astype(np.int32)
        samples.append(
            RoutedSample(
                sample_id=number + 1,
                token_ids=ids,
                prompt_length=prompt,
                rollout_logprobs=-np.arange(completion, dtype=np.float32),
                advantage=1.0,
                trains=True,
                trace=spelled_trace(number + 1, ids),
            )
        )
    return samples


def routed(samples: list[RoutedSample], *, place: RankPlace = ALONE, layers=(3, 5)) -> Microbatch:
    """One microbatch with the routes of one rank, shared as in training."""
    packed = build_microbatch(4, samples, place=place)
    return shared([packed], samples, lone_replica(layers, place))[0]


def ranks_of(shapes, cp: int, tp: int) -> list[Microbatch]:
    """One microbatch for each context- and tensor-parallel rank, tensor ranks together."""
    return [
        routed(
            samples_of(shapes),
            place=RankPlace(cp_size=cp, cp_rank=cp_rank, tp_size=tp, tp_rank=tp_rank),
        )
        for cp_rank in range(cp)
        for tp_rank in range(tp)
    ]


shape_lists = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=5)


def test_microbatch_of_one_sample_by_hand():
    first, last = ranks_of([(2, 3)], cp=1, tp=2)
    assert first.token_ids.tolist() == last.token_ids.tolist() == [100, 101, 102, 103, 104, 100]
    assert first.positions.tolist() == [0, 1, 2, 3, 4, 0]
    assert first.sample_ids.tolist() == [1, 1, 1, 1, 1, -1]
    assert first.next_ids.tolist() == [101, 102, 103, 104, 0, 0]
    assert first.predicts_sampled.tolist() == [False, True, True, True, False, False]
    assert first.routes is not None and last.routes is not None
    assert first.routes.valid.tolist() == [True, True, True]
    assert last.routes.valid.tolist() == [True, False, False]
    assert first.routes.expert_ids[0].tolist() == [[1, 20], [1, 21], [1, 22]]
    assert (last.routes.layers, last.routes.num_experts) == ((3, 5), EXPERTS)
    assert (first.num_rows, first.num_padding_rows, last.num_padding_rows) == (6, 0, 1)


def test_microbatch_holds_the_layers_of_its_stage_alone():
    made = routed(samples_of([(2, 2)]), layers=(5,))
    assert made.routes is not None
    assert made.routes.layers == (5,)
    assert made.routes.expert_ids[:, 0].tolist() == [[20, 1]]
    assert made.routes.nbytes == 1 * 4 * 2 + 4


def test_sharing_refuses_a_layer_that_the_traces_lack():
    with pytest.raises(TraceError, match=r"routes hold layers \[3, 5\], the model .* in \[4\]"):
        routed(samples_of([(2, 2)]), layers=(3, 4))


@given(shape_lists, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_routes_land_on_the_rows_of_their_tokens(shapes, cp, tp):
    for made in ranks_of(shapes, cp, tp):
        assert made.routes is not None
        held, rows = made.routes.valid, made.router_rows
        sample, position = made.sample_ids[rows][held], made.positions[rows][held]
        assert (made.token_ids[rows][held] == 100 * sample + position).all()
        spelled = np.stack([sample, 20 + position], axis=1)
        assert (made.routes.expert_ids[0, held] == spelled).all()
        assert (made.routes.expert_ids[1, held] == spelled[:, ::-1]).all()


@given(shape_lists, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_every_route_lands_once_over_all_ranks(shapes, cp, tp):
    landed = []
    for made in ranks_of(shapes, cp, tp):
        assert made.routes is not None
        held, rows = made.routes.valid, made.router_rows
        landed += zip(
            made.sample_ids[rows][held].tolist(), made.positions[rows][held].tolist(), strict=True
        )
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
    made = ranks_of(shapes, cp, 2)[::2]
    whole = np.zeros(made[0].index.num_rows, dtype=np.float32)
    for rank in made:
        local = rank.place(values, fill=-1.0)
        assert ((local >= 0) == rank.predicts_sampled).all()
        rank.index.scatter(local, whole)
    collected = made[0].collect(whole)
    assert [part.tolist() for part in collected] == [part.tolist() for part in values]


def test_values_of_turns_skip_the_rows_before_tokens_of_an_environment():
    masks = [[True, False, False, True], [True, True]]
    samples = [
        replace(
            sample,
            turn_mask=np.array(mask),
            rollout_logprobs=np.zeros(sum(mask), dtype=np.float32),
        )
        for sample, mask in zip(samples_of([(2, 4), (1, 2)]), masks, strict=True)
    ]
    made = build_microbatch(0, samples)
    predicts = [False, True, False, False, True, False, True, True, False]
    assert made.predicts_sampled.tolist() == predicts
    placed = made.place([np.array([1.0, 2.0]), np.array([3.0, 4.0])], fill=-1.0)
    assert placed.tolist() == [-1, 1, -1, -1, 2, -1, 3, 4, -1]
    assert [part.tolist() for part in made.collect(placed)] == [[1, 2], [3, 4]]
    # The control: one value for every token after the prompt is refused.
    with pytest.raises(AssertionError, match="one value for each sampled token"):
        made.place([np.zeros(4), np.zeros(2)], fill=0.0)


def test_place_refuses_values_of_another_length():
    made = build_microbatch(0, samples_of([(2, 2)]))
    with pytest.raises(AssertionError, match="one value for each sampled token"):
        made.place([np.zeros(3)], fill=0.0)


def test_microbatch_has_no_routes_before_they_are_shared():
    assert build_microbatch(0, samples_of([(2, 2)])).routes is None


def test_sharing_refuses_a_sample_without_a_trace_among_others():
    samples = samples_of([(2, 2), (2, 2)])
    packed = build_microbatch(0, samples)
    with pytest.raises(TraceError, match=r"\[2\] have a trace on no rank"):
        shared([packed], samples[:1])


def test_sharing_refuses_traces_of_two_models():
    ids = np.array([7, 8, 9], dtype=np.int32)
    other = RoutedSample(
        sample_id=9,
        token_ids=ids,
        prompt_length=1,
        rollout_logprobs=np.zeros(2, dtype=np.float32),
        advantage=0.0,
        trains=True,
        trace=synthetic_trace(ids, seed=1),
    )
    with pytest.raises(TraceError, match="hold traces of 2 forms"):
        routed([*samples_of([(2, 2)]), other])


@pytest.mark.parametrize(
    ("tp", "cp", "multiple", "rows"), [(1, 1, 1, 1), (2, 1, 1, 2), (1, 2, 1, 2), (2, 2, 6, 6)]
)
def test_a_microbatch_without_samples_is_the_fewest_rows_of_padding(tp, cp, multiple, rows):
    spare = np.array([7, 8, 9], dtype=np.int32)
    for rank in range(cp):
        place = RankPlace(tp_size=tp, tp_rank=tp - 1, cp_size=cp, cp_rank=rank)
        made = build_microbatch(3, [], place=place, row_multiple=multiple, spare_ids=spare)
        assert (made.num_rows, made.num_padding_rows, made.lengths) == (rows, rows // tp, [])
        # Of all context-parallel ranks together, as attention is told.
        assert made.index.padded_lengths == (rows * cp,)
        assert made.token_ids.tolist() == [spare[n % 3] for n in range(rows)]
        assert not made.predicts_sampled.any() and (made.sample_ids == -1).all()
        assert made.place([], fill=0.5).tolist() == [0.5] * rows
        assert made.collect(np.empty(0, dtype=np.float32)) == []
        assert len(made.router_index.rows) == rows // tp
