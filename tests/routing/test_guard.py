"""The guard never fires on drift, always on misalignment, and names the cause."""

from dataclasses import replace

import numpy as np
import pytest

from moe_replay.errors import MisalignmentError, RecipeError, TraceError
from moe_replay.routing import Agreement, Guard, GuardEvidence, agreement_floor, measure_agreement
from moe_replay.testing.synthetic_routes import SyntheticRoutes, synthetic_routes

SHAPES = [(16, 4, 4), (8, 2, 3), (64, 6, 3), (128, 8, 4)]


def routes_of(seed: int, *, agreement: float, experts: int = 16, topk: int = 4, layers: int = 4):
    print(f"seed {seed}")
    return synthetic_routes(
        seed=seed,
        lengths=[50, 37, 44],
        num_layers=layers,
        num_experts=experts,
        topk=topk,
        agreement=agreement,
        skew=1.0,
        neighbour_overlap=0.5,
        shared_prompt=10,
    )


def run_guard(
    routes: SyntheticRoutes, replayed=None, *, topk: int = 4, checks: int = 8, rows: int = 64
) -> list[Agreement]:
    guard = Guard(num_experts=routes.num_experts, topk=topk)
    return [
        guard.check(
            routes.evidence(seed=check, num_sampled=rows, replayed=replayed), where="step 3"
        )
        for check in range(checks)
    ]


def cause_of(routes: SyntheticRoutes, replayed, *, topk: int = 4, rows: int = 64) -> str:
    with pytest.raises(MisalignmentError) as caught:
        run_guard(routes, replayed, topk=topk, rows=rows)
    return str(caught.value)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("agreement", [0.82, 0.9, 1.0])
def test_guard_accepts_drift(shape, agreement):
    experts, topk, layers = shape
    for seed in range(3):
        routes = routes_of(seed, agreement=agreement, experts=experts, topk=topk, layers=layers)
        measured = Agreement.total(run_guard(routes, topk=topk, checks=4))
        assert abs(measured.mean_slot_overlap - agreement) < 0.05


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shift", [-1, 1, 2])
def test_guard_names_a_token_shift(shape, shift):
    experts, topk, layers = shape
    routes = routes_of(11, agreement=0.9, experts=experts, topk=topk, layers=layers)
    moved = [np.roll(part, shift, axis=0) for part in routes.replayed]
    assert f"token shift {shift:+d}" in cause_of(routes, moved, topk=topk)


def test_guard_names_a_token_shift_that_starts_in_the_middle():
    routes = routes_of(5, agreement=0.9)
    moved = [np.concatenate([part[:20], np.roll(part[20:], 1, axis=0)]) for part in routes.replayed]
    assert "token shift +1" in cause_of(routes, moved)


def test_guard_finds_a_shift_in_one_sample_of_three():
    routes = routes_of(6, agreement=0.9)
    first, *others = routes.replayed
    message = cause_of(routes, [np.roll(first, 1, axis=0), *others])
    assert "token shift +1" in message
    assert "sample 0, positions" in message
    assert "sample 1" not in message


def test_guard_pools_checks_that_are_too_small_alone():
    routes = routes_of(7, agreement=0.9)
    moved = [np.roll(part, 1, axis=0) for part in routes.replayed]
    guard = Guard(num_experts=16, topk=4)
    guard.check(routes.evidence(seed=0, num_sampled=3, replayed=moved), where="microbatch 0")
    with pytest.raises(MisalignmentError, match="token shift"):
        for number in range(1, 30):
            guard.check(
                routes.evidence(seed=number, num_sampled=3, replayed=moved),
                where=f"microbatch {number}",
            )


def test_guard_decides_on_one_row_a_check():
    routes = routes_of(7, agreement=0.9)
    stray = list(routes_of(97, agreement=1.0).replayed)
    guard = Guard(num_experts=16, topk=4)
    with pytest.raises(MisalignmentError, match="share"):
        for number in range(60):
            evidence = routes.evidence(seed=number, num_sampled=1, replayed=stray)
            guard.check(evidence, where="here")


def test_guard_accepts_drift_on_one_row_a_check():
    routes = routes_of(7, agreement=0.85)
    guard = Guard(num_experts=16, topk=4)
    parts = [
        guard.check(routes.evidence(seed=number, num_sampled=1), where="here")
        for number in range(60)
    ]
    assert Agreement.total(parts).mean_slot_overlap > 0.8


def test_guard_notices_an_error_that_starts_late():
    routes = routes_of(8, agreement=0.9)
    moved = [np.roll(part, 1, axis=0) for part in routes.replayed]
    guard = Guard(num_experts=16, topk=4)
    for number in range(20):
        guard.check(routes.evidence(seed=number, num_sampled=64), where="early")
    with pytest.raises(MisalignmentError, match="late"):
        for number in range(8):
            late = routes.evidence(seed=number, num_sampled=64, replayed=moved)
            guard.check(late, where="late")


def test_guard_names_a_layer_shift():
    routes = routes_of(12, agreement=0.9)
    stray = routes_of(99, agreement=1.0).replayed
    moved = [
        np.concatenate([other[:, :1], part[:, :-1]], axis=1)
        for part, other in zip(routes.replayed, stray, strict=True)
    ]
    assert "layer shift +1" in cause_of(routes, moved)


def test_guard_names_a_rotation_of_layers():
    routes = routes_of(12, agreement=0.9)
    moved = [np.roll(part, 1, axis=1) for part in routes.replayed]
    assert "layers rotated by +1" in cause_of(routes, moved)


def test_guard_finds_one_wrong_layer():
    routes = routes_of(13, agreement=0.9)
    stray = routes_of(98, agreement=1.0).replayed
    moved = [
        np.concatenate([other[:, :1], part[:, 1:]], axis=1)
        for part, other in zip(routes.replayed, stray, strict=True)
    ]
    assert "in layer 1 " in cause_of(routes, moved)


def test_guard_names_swapped_samples_of_one_group():
    routes = routes_of(14, agreement=0.9)
    shortest = min(len(part) for part in routes.replayed)
    first, second, third = (part.copy() for part in routes.replayed)
    first[:shortest], second[:shortest] = (
        routes.replayed[1][:shortest],
        routes.replayed[0][:shortest],
    )
    message = cause_of(routes, [first, second, third])
    assert "sample 0 has the routes of 1, sample 1 has the routes of 0" in message.replace(
        "routes of sample", "routes of"
    )


def test_guard_names_random_routes_as_unexplained():
    routes = routes_of(15, agreement=0.9)
    stray = routes_of(97, agreement=1.0).replayed
    assert "they are random, of another model or weights" in cause_of(routes, stray)


def test_guard_error_says_got_expected_where_and_what_to_do():
    routes = routes_of(16, agreement=0.9)
    moved = [np.roll(part, 1, axis=0) for part in routes.replayed]
    message = cause_of(routes, moved)
    assert message.startswith("step 3: replayed and live routes share ")
    for part in ("expected 80-100 %", "Likely cause: token shift +1", "Fix where the routes"):
        assert part in message


def test_guard_does_not_judge_routers_that_send_all_rows_alike():
    routes = synthetic_routes(
        seed=1, lengths=[60, 60], num_layers=2, num_experts=8, topk=2, skew=12.0, agreement=1.0
    )
    stray = synthetic_routes(
        seed=1, lengths=[60, 60], num_layers=2, num_experts=8, topk=2, skew=12.0, agreement=0.95
    )
    measured = run_guard(routes, list(stray.live), topk=2)
    assert measured[0].mean_chance > 0.7


def test_guard_floor_of_the_recipe_replaces_the_measured_one():
    routes = routes_of(17, agreement=0.85)
    evidence = routes.evidence(seed=0, num_sampled=128)
    assert Guard(num_experts=16, topk=4).check(evidence, where="here").mean_slot_overlap > 0.8
    with pytest.raises(MisalignmentError, match="never below 97%"):
        Guard(num_experts=16, topk=4, floor=0.97).check(evidence, where="here")


def test_guard_refuses_a_floor_outside_0_to_1():
    with pytest.raises(RecipeError, match=r"guard floor is 1\.5"):
        Guard(num_experts=16, topk=4, floor=1.5)


def test_guard_accepts_a_microbatch_without_sampled_rows():
    routes = routes_of(18, agreement=1.0)
    evidence = routes.evidence(seed=0, num_sampled=0)
    assert Guard(num_experts=16, topk=4).check(evidence, where="here").num_rows.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("experts", "topk", "floor"), [(128, 8, 0.28375), (16, 4, 0.415), (8, 2, 0.415)]
)
def test_agreement_floor_lies_30_percent_of_the_way_to_healthy(experts, topk, floor):
    assert agreement_floor(experts, topk) == pytest.approx(floor)


def test_agreement_floor_rises_with_the_measured_chance():
    assert agreement_floor(16, 4, 0.5) == pytest.approx(0.59)


def test_agreement_floor_decides_nothing_when_chance_is_high():
    assert agreement_floor(16, 4, 0.75) == 0.0


def by_hand(live, replayed, valid=(True, True, True)) -> GuardEvidence:
    """Three rows of one sample, one layer, top-2; the first two rows are sampled."""
    return GuardEvidence(
        live_ids=np.array(live)[:, None, :],
        rows=np.array([0, 1]),
        expert_ids=np.array(replayed)[:, None, :],
        valid=np.array(valid),
        sample=np.zeros(3, dtype=np.int64),
        position=np.arange(3),
        layers=(5,),
    )


def test_measure_agreement_counts_slots_whatever_their_order():
    evidence = by_hand([[1, 0], [2, 3]], [[0, 1], [3, 7], [0, 1]])
    measured = measure_agreement(evidence, num_experts=8)
    assert measured.slot_overlap.tolist() == [0.75]
    assert measured.equal_sets.tolist() == [0.5]
    # Row 0 shares 0 and 2 of 2 slots with the other rows, row 1 none with either.
    assert measured.chance.tolist() == [0.25]


def test_measure_agreement_does_not_read_invalid_rows():
    evidence = by_hand([[1, 0], [2, 3]], [[0, 1], [3, 7], [65535, 65535]], (True, True, False))
    assert measure_agreement(evidence, num_experts=8).chance.tolist() == [0.0]


def test_evidence_of_a_row_without_a_route_is_refused():
    with pytest.raises(TraceError, match="1 of 2 sampled rows are valid=False"):
        by_hand([[1, 0], [2, 3]], [[0, 1], [3, 7], [0, 1]], (True, False, True))


def test_evidence_of_other_layers_is_refused():
    with pytest.raises(TraceError, match="expert_ids has shape"):
        GuardEvidence(
            live_ids=np.zeros((1, 2, 2), dtype=np.int64),
            rows=np.array([0]),
            expert_ids=np.zeros((3, 2, 2), dtype=np.int64),
            valid=np.ones(3, dtype=bool),
            sample=np.zeros(3, dtype=np.int64),
            position=np.arange(3),
            layers=(5,),
        )


def test_agreement_total_adds_up_layer_by_layer():
    one = Agreement(
        layers=(0, 2),
        num_rows=np.array([1, 1]),
        slot_overlap=np.array([1.0, 0.5]),
        equal_sets=np.array([1.0, 0.0]),
        chance=np.array([0.2, 0.2]),
    )
    other = Agreement(
        layers=(2, 3),
        num_rows=np.array([3, 3]),
        slot_overlap=np.array([0.9, 0.7]),
        equal_sets=np.array([0.8, 0.0]),
        chance=np.array([0.4, 0.4]),
    )
    both = Agreement.total([one, other])
    assert both.layers == (0, 2, 3)
    assert both.num_rows.tolist() == [1, 4, 3]
    assert both.slot_overlap == pytest.approx([1.0, 0.8, 0.7])
    assert both.equal_sets == pytest.approx([1.0, 0.6, 0.0])
    assert both.mean_slot_overlap == pytest.approx((1.0 + 3.2 + 2.1) / 8)


def test_agreement_total_of_nothing_has_no_overlap():
    assert np.isnan(Agreement.total([]).mean_slot_overlap)


def with_layer(routes: SyntheticRoutes, layer: int, ids, samples=(0, 1, 2)):
    """Return the replayed routes with one entry of the layer dim filled by ``ids`` in some samples."""
    filled = [part.copy() for part in routes.replayed]
    for sample in samples:
        filled[sample][:, layer] = ids
    return filled


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_e13_a_layer_that_nobody_wrote_is_named_by_the_live_routes(shape):
    experts, topk, layers = shape
    routes = routes_of(4, agreement=0.95, experts=experts, topk=topk, layers=layers)
    message = cause_of(routes, with_layer(routes, 1, np.arange(topk)), topk=topk)
    assert "constant fill: layers [2] hold the same experts for all tokens" in message
    assert f"({list(range(topk))} in layer 2)" in message
    assert "the engine did not capture these layers" in message


def test_e13_all_layers_that_nobody_wrote_are_named():
    routes = routes_of(4, agreement=0.95)
    filled = [np.broadcast_to(np.arange(4), part.shape).copy() for part in routes.replayed]
    message = cause_of(routes, filled)
    assert "constant fill: layers [1, 2, 3, 4]" in message


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_e13_a_collapsed_router_whose_live_routes_agree_is_accepted(shape, drift):
    experts, topk, layers = shape
    routes = routes_of(4, agreement=0.95, experts=experts, topk=topk, layers=layers)
    filled = with_layer(routes, 1, np.arange(topk))
    live = with_layer(routes, 1, np.arange(topk))
    rng = np.random.default_rng(0)
    for part, own in zip(live, routes.live, strict=True):
        part[:, [place for place in range(layers) if place != 1]] = own[
            :, [place for place in range(layers) if place != 1]
        ]
        part[rng.random(len(part)) < drift, 1, 0] = experts - 1
    collapsed = replace(routes, live=tuple(live), replayed=tuple(filled))
    measured = Agreement.total(run_guard(collapsed, topk=topk))
    assert measured.slot_overlap[1] >= 1 - drift
