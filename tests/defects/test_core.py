"""Defects of routing replay that the core makes impossible or loud."""

import numpy as np
import pytest

from moe_replay.batch import Microbatch, RankPlace, build_microbatch
from moe_replay.errors import MisalignmentError, TokenMismatchError, TraceError
from moe_replay.routing import (
    Coverage,
    LiveReason,
    Origin,
    RoutingTrace,
    RowIndex,
    check_routes,
    expert_dtype,
)
from moe_replay.testing.policies import lone_replica, shared
from moe_replay.testing.samples import RoutedSample
from moe_replay.testing.synthetic_routes import synthetic_trace

ALONE = RankPlace()


def record(ids, *, tokens, valid=None, num_experts: int = 64) -> RoutingTrace:
    count = len(tokens)
    return RoutingTrace.record(
        np.asarray(ids),
        token_ids=np.asarray(tokens),
        valid=np.ones(count, dtype=bool) if valid is None else np.array(valid),
        layers=range(np.asarray(ids).shape[1]),
        num_experts=num_experts,
        origin=Origin.single(
            engine="embedded", engine_version="1", policy_version=0, num_rows=count
        ),
    )


def sample(number: int, tokens, trace: RoutingTrace, prompt: int = 1) -> RoutedSample:
    ids = np.asarray(tokens, dtype=np.int32)
    return RoutedSample(
        sample_id=number,
        token_ids=ids,
        prompt_length=prompt,
        rollout_logprobs=np.zeros(len(ids) - prompt, dtype=np.float32),
        advantage=0.0,
        trains=True,
        trace=trace,
    )


def batch(*samples: RoutedSample, place: RankPlace = ALONE) -> Microbatch:
    """Return the microbatch of one rank with its routes, shared as in training."""
    packed = build_microbatch(0, samples, place=place)
    return shared([packed], samples, lone_replica(samples[0].trace.layers, place))[0]


def routes(num_rows: int, *, seed: int = 0, experts: int = 64, layers: int = 2, topk: int = 4):
    order = np.random.default_rng(seed).random((num_rows, layers, experts)).argsort(axis=2)
    return order[..., :topk]


ROLLOUT = np.array([10, 11, 12, 13, 14, 15, 16])


def test_a1_a_token_dropped_by_retokenising_is_not_the_missing_last_row():
    """Six rows were routed for seven tokens; the trainer, having lost token 12, also counts six."""
    trace = record(routes(6), tokens=ROLLOUT[:6])
    retokenised = np.delete(ROLLOUT, 2)
    assert len(retokenised) == len(trace)
    with pytest.raises(TokenMismatchError, match="from row 2 of 6 on"):
        batch(sample(0, retokenised, trace))


def test_a1_control_the_very_tokens_are_accepted():
    made = batch(sample(0, ROLLOUT[:6], record(routes(6), tokens=ROLLOUT[:6])))
    assert made.routes is not None and made.routes.valid.all()


def test_a1_a_row_too_few_is_not_filled_up():
    with pytest.raises(TraceError, match=r"routes of shape \[6, 2, 4\], 7 tokens"):
        record(routes(6), tokens=ROLLOUT)


def test_a2_padded_routes_lie_in_megatrons_sequence_major_order():
    """Two samples of four: row 2 p + i of Megatron's flattened batch is position p of sample i."""
    spelled = np.array([[i, p] for i in range(2) for p in range(4)])
    local = RowIndex.padded([4, 4], max_length=4).gather(spelled, fill=-1)
    assert local.tolist() == [[i, p] for p in range(4) for i in range(2)]


def test_a2_control_batch_major_flattening_gets_two_of_eight_rows_right():
    rows = RowIndex.padded([4, 4], max_length=4).rows
    assert int((rows == np.arange(8)).sum()) == 2


def test_a3_both_padding_sides_give_each_token_its_route():
    ids = routes(5)
    tokens = np.arange(5) + 30
    found = {}
    for side in ("left", "right"):
        index = RowIndex.padded([3, 2], max_length=4, side=side)
        local_tokens, local_ids = index.gather(tokens, fill=-1), index.gather(ids, fill=0)
        found[side] = {
            int(token): route.tolist()
            for token, route in zip(local_tokens, local_ids, strict=True)
            if token >= 0
        }
    assert found["left"] == found["right"]
    assert found["left"] == {int(token): ids[row].tolist() for row, token in enumerate(tokens)}


def test_a3_control_the_sides_place_rows_differently():
    left, right = (
        RowIndex.padded([3, 2], max_length=4, side=side).rows.tolist() for side in ("left", "right")
    )
    assert left != right


def test_a4_a_short_trace_raises_before_anything_is_padded():
    trace = record(routes(5), tokens=ROLLOUT[:5])
    with pytest.raises(TokenMismatchError, match="recorded for 5 tokens, the sample has 7"):
        batch(sample(0, ROLLOUT, trace))


def test_a4_routes_that_were_zero_padded_to_the_right_length_raise():
    padded = np.concatenate([routes(5), np.zeros((2, 2, 4), dtype=np.int64)])
    with pytest.raises(TraceError, match=r"row 5, layer 0: experts \[0, 0, 0, 0\] name one twice"):
        record(padded, tokens=ROLLOUT)


def test_a4_control_the_same_rows_marked_invalid_are_accepted_and_counted():
    padded = np.concatenate([routes(5), np.zeros((2, 2, 4), dtype=np.int64)])
    trace = record(padded, tokens=ROLLOUT, valid=[True] * 5 + [False] * 2)
    found = Coverage.of_rows(trace.valid, prompt_length=1)
    assert found.num_replayed == 5
    assert found.num_live[LiveReason.ENGINE_GAVE_NONE] == 1
    assert found.num_live[LiveReason.LAST_TOKEN] == 1


@pytest.mark.parametrize("partition", ["zigzag", "contiguous"])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_a9_tokens_and_routes_share_one_context_partition(cp_size, partition):
    lengths = [11, 6]
    spelled = np.array([[i, p] for i, length in enumerate(lengths) for p in range(length)])
    tokens = spelled[:, 0] * 100 + spelled[:, 1]
    seen = []
    for rank in range(cp_size):
        index = RowIndex.packed(lengths, cp_size=cp_size, cp_rank=rank, cp_partition=partition)
        local = index.gather(spelled, fill=-1)[index.is_token]
        held = index.gather(tokens, fill=-1)[index.is_token]
        assert (local[:, 0] * 100 + local[:, 1]).tolist() == held.tolist()
        seen += held.tolist()
    assert sorted(seen) == sorted(tokens.tolist())


def test_a9_control_mixing_the_partitions_would_misplace_routes():
    zigzag, contiguous = (
        RowIndex.packed([8], cp_size=2, cp_partition=partition).rows
        for partition in ("zigzag", "contiguous")
    )
    assert (zigzag != contiguous).any()


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_a10_padding_of_each_sequence_moves_routes_with_their_tokens(cp_size):
    """Lengths that need different padding; the microbatch is asked where each route landed."""
    lengths = [3, 8, 5, 2]
    samples = [
        sample(
            number,
            100 * number + np.arange(length),
            record(
                np.stack([[[number, 20 + t]] for t in range(length)]),
                tokens=100 * number + np.arange(length),
            ),
        )
        for number, length in enumerate(lengths, start=1)
    ]
    landed = 0
    for rank in range(cp_size):
        made = batch(*samples, place=RankPlace(cp_size=cp_size, cp_rank=rank))
        assert made.routes is not None
        held = made.routes.expert_ids[0, made.routes.valid].astype(np.int64)
        token = made.token_ids[made.routes.valid]
        assert (held[:, 0] * 100 + held[:, 1] - 20 == token).all()
        landed += len(token)
    assert landed == sum(lengths)


def test_a10_control_padding_sits_between_sequences_under_context_parallelism():
    index = RowIndex.packed([3, 8], cp_size=2)
    assert index.padded_lengths == (4, 8)
    assert index.rows.tolist() != [0, 1, 2, 3, 4, 5]


def test_a11_swapped_samples_of_equal_length_raise():
    first, second = (np.array([1, 2, 3]), np.array([1, 2, 4]))
    with pytest.raises(TokenMismatchError, match=r"sample 1: .* from row 2 of 3 on"):
        batch(sample(1, second, synthetic_trace(first, seed=1)))


def test_a11_control_the_right_sample_is_accepted():
    made = batch(sample(1, [1, 2, 3], synthetic_trace(np.array([1, 2, 3]), seed=1)))
    assert made.routes is not None and made.routes.valid.sum() == 2


@pytest.mark.parametrize("fill", ["zeros", "arange"])
def test_a12_tail_rows_filled_with_a_constant_are_not_taken_for_routes(fill):
    """Expert 0 in every slot is refused; rows marked invalid are counted and never read."""
    tokens = np.arange(60, 72)
    ids = routes(12)
    ids[8:] = 0 if fill == "zeros" else np.arange(4)
    trace = record(ids, tokens=tokens, valid=np.arange(12) < 8)
    whole = sample(0, tokens, trace)
    made = batch(whole, place=RankPlace(tp_size=8, tp_rank=4))
    assert made.routes is not None
    assert made.routes.valid.tolist() == [False, False]
    assert made.num_padding_rows == 0
    coverage = Coverage.of_rows(whole.trace.valid, prompt_length=1)
    assert coverage.num_replayed == 8
    assert coverage.num_live[LiveReason.ENGINE_GAVE_NONE] == 3
    assert coverage.num_live[LiveReason.LAST_TOKEN] == 1


def guarded(trace: RoutingTrace, live: np.ndarray) -> float:
    """Let a guard compare all rows of a trace with live routes; return their agreement."""
    sample = np.zeros(len(trace), dtype=np.int64)
    report = check_routes(
        trace.expert_ids,
        live,
        sample,
        num_experts=trace.num_experts,
        valid=trace.valid,
        layers=trace.layers,
    )
    report.raise_if_misaligned("step 1")
    return report.agreement[0]


def test_a12_a_layer_filled_with_arange_raises():
    live = routes(64)
    ids = live.copy()
    ids[:, 1] = np.arange(4)
    with pytest.raises(
        MisalignmentError, match=r"constant fill: layers \[1\] hold .* never wrote them"
    ):
        guarded(record(ids, tokens=np.arange(64)), live)


def test_a12_control_a_router_that_chooses_these_experts_is_accepted():
    ids = routes(64)
    ids[:, 1] = np.arange(4)
    assert guarded(record(ids, tokens=np.arange(64)), ids) == 1.0


def test_a12_control_routes_that_differ_are_accepted():
    assert len(record(routes(64), tokens=np.arange(64))) == 64


@pytest.mark.parametrize("experts", [384, 512])
def test_c1_ids_above_255_survive_record_crop_and_batch(experts):
    tokens = np.arange(40)
    ids = routes(40, experts=experts, topk=8)
    assert (ids > 255).any()
    trace = record(ids, tokens=tokens, num_experts=experts)
    made = batch(
        sample(0, tokens[:17], trace.crop(0, 17)), sample(1, tokens[17:], trace.crop(17, 40))
    )
    assert made.routes is not None
    assert made.routes.expert_ids.transpose(1, 0, 2).tolist() == ids.tolist()


def test_c1_control_eight_bits_would_change_half_of_the_ids():
    ids = routes(40, experts=512, topk=8)
    assert (ids.astype(np.uint8) != ids).mean() == pytest.approx(0.5, abs=0.1)


def test_c1_ids_that_were_wrapped_before_are_refused_as_another_width():
    tokens = np.arange(40)
    wrapped = routes(40, experts=512).astype(np.uint8)
    good = record(routes(40, experts=512), tokens=tokens, num_experts=512)
    with pytest.raises(TraceError, match="expert_ids is uint8, expected uint16"):
        RoutingTrace(
            expert_ids=wrapped,
            valid=good.valid,
            layers=good.layers,
            num_experts=512,
            token_digest=good.token_digest,
            origin=good.origin,
        )


def test_c2_the_type_follows_the_model_not_the_largest_id():
    low = record(routes(8, experts=100), tokens=np.arange(8), num_experts=512)
    high = record(routes(8, experts=512), tokens=np.arange(8) + 50, num_experts=512)
    assert int(low.expert_ids.max()) <= 100 < int(high.expert_ids.max())
    assert low.expert_ids.dtype == high.expert_ids.dtype == np.uint16
    made = batch(sample(0, np.arange(8), low), sample(1, np.arange(8) + 50, high))
    assert made.routes is not None
    assert made.routes.expert_ids[:, 8:].transpose(1, 0, 2).tolist() == high.expert_ids.tolist()


def test_c2_id_200_never_turns_negative():
    ids = np.array([[[200, 3]], [[4, 199]]])
    trace = record(ids, tokens=[1, 2], num_experts=201)
    assert trace.expert_ids.astype(np.int64).tolist() == ids.tolist()


def test_c2_control_a_model_of_256_experts_takes_one_byte():
    assert (expert_dtype(256), expert_dtype(257)) == (np.uint8, np.uint16)


def test_c3_ids_beyond_the_logical_experts_raise():
    ids = routes(8, experts=64)
    ids[3, 1, 0] = 71
    with pytest.raises(TraceError, match=r"expert id 71 in row 3.*physical ids"):
        record(ids, tokens=np.arange(8))


def test_c3_an_all_zero_buffer_raises():
    with pytest.raises(TraceError, match="name one twice"):
        record(np.zeros((8, 2, 4), dtype=np.int64), tokens=np.arange(8))


def test_c3_a_buffer_of_equal_rows_raises():
    constant = np.tile(np.array([7, 3, 9, 1]), (64, 2, 1))
    trace = record(constant, tokens=np.arange(64))
    assert trace.constant_layers() == (0, 1)
    with pytest.raises(MisalignmentError, match=r"constant fill: layers \[0, 1\]"):
        guarded(trace, routes(64))


def test_c3_control_possible_routes_are_accepted():
    assert record(routes(8), tokens=np.arange(8)).num_valid == 8


def test_c4_an_expert_named_twice_raises():
    ids = routes(8)
    ids[5, 0, 3] = ids[5, 0, 0]
    with pytest.raises(TraceError, match=r"row 5, layer 0: .* name one twice"):
        record(ids, tokens=np.arange(8))


def test_c4_control_the_same_expert_in_two_layers_is_fine():
    ids = np.repeat(routes(8, layers=1), 2, axis=1)
    assert record(ids, tokens=np.arange(8)).num_valid == 8


@pytest.mark.parametrize("sentinel", [-1, 65_535])
def test_c6_a_sentinel_in_an_invalid_row_never_becomes_a_route(sentinel):
    ids, tokens = routes(8), np.arange(8)
    ids[5] = sentinel
    trace = record(ids, tokens=tokens, valid=np.arange(8) != 5)
    made = batch(sample(0, tokens, trace))
    assert made.routes is not None
    assert made.routes.valid.tolist() == [True] * 5 + [False] + [True] * 2
    held = made.routes.expert_ids[:, made.routes.valid]
    assert held.transpose(1, 0, 2).tolist() == np.delete(ids, 5, axis=0).tolist()


@pytest.mark.parametrize("sentinel", [-1, 65_535])
def test_c6_control_a_sentinel_in_a_valid_row_raises(sentinel):
    ids = routes(8)
    ids[5] = sentinel
    with pytest.raises(TraceError, match=f"expert id {sentinel} in row 5"):
        record(ids, tokens=np.arange(8))
