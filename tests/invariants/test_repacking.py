"""Routes that are packed anew are those that sharing brings into the other packing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_replay.megatron.ranks.repacking import repack_routes
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.routing import RouteSlice
from moe_replay.testing.layouts import CASES, SEED, Case, coded_samples, layout, replica_share
from moe_replay.testing.policies import pack, shared, start_policy
from moe_replay.testing.ranks import run_ranks

pytestmark = pytest.mark.ranks
LAYERS = tuple(range(1, 8))
Bits = list[tuple[np.ndarray, np.ndarray, tuple[int, ...]]]


def both_ways(checkpoint: Path, case: Case) -> tuple[Bits, Bits, Bits]:
    """Return routes as shared in a wide packing, packed anew into it, and back into the narrow."""
    actor = start_policy(checkpoint, case.layout, **case.overrides)
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    samples = replica_share(coded_samples(LAYERS), replica)
    narrow = pack(samples, scorer=actor, routed=False, max_tokens=40, count=4)
    # Another order too: the last sample is padded on, so that its rows are cut elsewhere.
    wide = pack(samples[::-1], scorer=actor, routed=False, max_tokens=90, row_multiple=8)
    assert len(narrow) != len(wide)
    given = {m.key: m.routes for m in shared(narrow, samples, replica) if m.routes is not None}
    expected = {m.key: m.routes for m in shared(wide, samples, replica) if m.routes is not None}
    found = repack_routes(replica, given, narrow, wide)
    back = repack_routes(replica, found, wide, narrow)
    assert same(bits(back), bits(given))
    return bits(found), bits(expected), bits(given)


def bits(routes: dict[int, RouteSlice]) -> Bits:
    """Return what the routes of each microbatch hold where they are valid."""
    return [
        (r.valid, np.where(r.valid[None, :, None], r.expert_ids, 0), r.layers)
        for _, r in sorted(routes.items())
    ]


def same(first: Bits, second: Bits) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) and a[2] == b[2]
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize(
    "name", ["dp2", "tp2", "pp2", "pp2 without moe", "cp2", "ep2", "tp2 cp2", "pp2 vpp2 tp2"]
)
def test_routes_are_those_of_their_tokens_in_another_packing(checkpoint: Path, name: str) -> None:
    print("seed", SEED)
    case = CASES[name]
    for found, expected, given in run_ranks(both_ways, case.ranks, checkpoint, case):
        assert same(found, expected)
        assert sum(int(valid.sum()) for valid, _, _ in found) > 0
        # Control: the two packings differ, so routes that stay where they are would be wrong.
        assert not same(given, expected)


def foreign(checkpoint: Path) -> None:
    actor = start_policy(checkpoint, layout())
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    samples = coded_samples(LAYERS)
    given = shared(pack(samples[1:], scorer=actor, routed=False), samples[1:], replica)
    routes = {m.key: m.routes for m in given if m.routes is not None}
    repack_routes(replica, routes, given, pack(samples, scorer=actor, routed=False))


def test_a_packing_of_other_samples_is_not_filled(checkpoint: Path) -> None:
    with pytest.raises(AssertionError, match="two packings hold different samples"):
        run_ranks(foreign, 1, checkpoint)
