"""Every misalignment that the guard knows is named, and aligned routes are called aligned."""

import numpy as np
import pytest

from moe_replay.errors import TraceError
from moe_replay.routing import Cause, diagnose
from moe_replay.testing.synthetic_routes import SyntheticRoutes, synthetic_routes


def routes_of(seed: int, *, experts: int = 16, topk: int = 4, layers: int = 4) -> SyntheticRoutes:
    print(f"seed {seed}")
    return synthetic_routes(
        seed=seed,
        lengths=[70, 64, 81],
        num_layers=layers,
        num_experts=experts,
        topk=topk,
        agreement=0.9,
        skew=0.5,
        neighbour_overlap=0.4,
    )


def diagnosis_of(routes: SyntheticRoutes, replayed=None, *, rows: int = 160, layers=None):
    evidence = routes.evidence(seed=3, num_sampled=rows, replayed=replayed)
    return diagnose(evidence, num_experts=routes.num_experts, layers=layers)


def test_diagnose_calls_aligned_routes_aligned():
    found = diagnosis_of(routes_of(1))
    assert found.cause is Cause.ALIGNED
    assert found.agreement == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
def test_diagnose_names_token_shifts_with_their_sign(shift):
    routes = routes_of(2)
    found = diagnosis_of(routes, [np.roll(part, shift, axis=0) for part in routes.replayed])
    assert (found.cause, found.shift) == (Cause.TOKEN_SHIFT, shift)
    assert found.agreement == pytest.approx(0.9, abs=0.03)
    assert found.aligned < 0.6


@pytest.mark.parametrize("shift", [-17, -3, 9, 20])
def test_diagnose_names_a_shift_by_many_tokens(shift):
    routes = routes_of(13)
    found = diagnosis_of(routes, [np.roll(part, shift, axis=0) for part in routes.replayed])
    assert (found.cause, found.shift) == (Cause.TOKEN_SHIFT, shift)
    assert found.agreement == pytest.approx(0.9, abs=0.03)


def test_diagnose_names_another_shift_in_each_sample():
    """As when each sample's routes are written at the start of its own prompt."""
    routes = routes_of(14)
    moved = [
        np.roll(part, -prompt, axis=0)
        for part, prompt in zip(routes.replayed, (12, 0, 31), strict=True)
    ]
    found = diagnosis_of(routes, moved)
    assert (found.cause, found.shift) == (Cause.TOKEN_SHIFT, 0)
    assert "rows later: -12 in sample 0, -31 in sample 2;" in found.sentence


def test_diagnose_names_a_rotation_over_many_layers():
    routes = routes_of(3, layers=7)
    found = diagnosis_of(routes, [np.roll(part, 3, axis=1) for part in routes.replayed])
    assert (found.cause, found.shift) == (Cause.LAYER_SHIFT, 3)


def test_diagnose_names_layers_in_another_order():
    routes = routes_of(4, layers=6)
    order = [2, 0, 5, 1, 3, 4]
    found = diagnosis_of(routes, [part[:, order] for part in routes.replayed])
    assert found.cause is Cause.LAYER_ORDER
    # Entry 0 of the replayed ids holds layer entry 2; layers are numbered from 1.
    assert "3 has those of 1" in found.sentence


def test_diagnose_names_all_layers_holding_one_layers_routes():
    routes = routes_of(5)
    found = diagnosis_of(
        routes, [np.repeat(part[:, :1], 4, axis=1) for part in routes.replayed], layers=[1]
    )
    assert found.cause is Cause.ALIGNED


def test_diagnose_names_each_pair_of_swapped_samples():
    routes = routes_of(6)
    first, second, third = routes.replayed
    shortest = len(second)
    found = diagnosis_of(
        routes,
        [
            np.concatenate([second, first[shortest:]]),
            first[:shortest],
            third,
        ],
    )
    assert found.cause is Cause.SWAPPED_SAMPLES
    assert "sample 0 has the routes of 1, sample 1 has the routes of 0;" in found.sentence


@pytest.mark.parametrize("offset", [-3, 1, 7])
def test_diagnose_names_an_expert_offset(offset):
    routes = routes_of(7)
    found = diagnosis_of(routes, [(part + offset) % 16 for part in routes.replayed])
    assert (found.cause, found.shift) == (Cause.EXPERT_OFFSET, offset)


@pytest.mark.parametrize("pooled", [True, False])
def test_diagnose_names_renamed_experts(pooled):
    seed = 8
    routes = routes_of(seed)
    generator = np.random.default_rng(seed)
    maps = np.stack([generator.permutation(16) for _ in range(4)])
    if pooled:
        maps[1:] = maps[0]
    entry = np.arange(4)[None, :, None]
    found = diagnosis_of(routes, [maps[entry, part] for part in routes.replayed])
    assert found.cause is Cause.EXPERT_IDS
    assert ("for all layers" in found.sentence) is pooled


def test_diagnose_names_ids_wrapped_at_256():
    routes = routes_of(9, experts=300, topk=8, layers=1)
    found = diagnosis_of(routes, [part % 256 for part in routes.replayed])
    assert found.cause is Cause.EXPERT_WRAP


def test_diagnose_explains_random_routes_by_nothing():
    found = diagnosis_of(routes_of(10), list(routes_of(77).replayed))
    assert found.cause is Cause.UNEXPLAINED
    assert found.agreement < 0.45


def test_diagnose_restricted_to_layers_judges_those_alone():
    routes = routes_of(11)
    moved = [part.copy() for part in routes.replayed]
    for part, right in zip(moved, routes.replayed, strict=True):
        part[:, 2] = np.roll(right[:, 2], 1, axis=0)
    assert diagnosis_of(routes, moved, layers=[3]).cause is Cause.TOKEN_SHIFT
    assert diagnosis_of(routes, moved, layers=[2]).cause is Cause.ALIGNED


def test_diagnose_needs_a_row():
    with pytest.raises(TraceError, match="no row was sampled"):
        diagnosis_of(routes_of(12), rows=0)
