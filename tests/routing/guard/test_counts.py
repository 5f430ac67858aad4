"""Counts of shared slots are those of plain loops over rows, layers and places."""

import numpy as np
import pytest

from moe_replay.errors import TraceError
from moe_replay.routing.guard import PLACES, count_overlaps


def drawn(seed: int, *, experts: int, topk: int, layers: int, rows: int = 40):
    """Rows of three samples in any order, some invalid, some positions missing."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    ids = rng.random((rows, layers, experts)).argsort(axis=2)[..., :topk]
    live = np.where(rng.random((rows, layers, 1)) < 0.6, ids[..., ::-1], np.roll(ids, 3, axis=0))
    places = rng.permutation([(s, p) for s in (2, 5, 9) for p in range(rows // 3 + 1)])[:rows]
    valid = rng.random(rows) < 0.85
    ids[~valid], live[~valid] = experts - 1, 0
    return ids, live, valid, places[:, 0], places[:, 1]


def by_loops(ids, live, valid, sample, position, experts):
    """The definition, row by row: a dict of (sample, position) -> numbers."""
    at = {(int(sample[r]), int(position[r])): r for r in np.flatnonzero(valid)}
    layers = ids.shape[1]
    found = {}
    for (s, p), r in sorted(at.items()):
        own = [len({*live[r, m]} & {*ids[r, m]}) for m in range(layers)]
        gains = np.zeros((len(PLACES), layers), int)
        for m in range(layers):
            mine = {*live[r, m]}
            for place, (by, up) in enumerate([(1, 0), (-1, 0), (0, 1), (0, -1)]):
                other = at.get((s, p + by))
                if other is not None and 0 <= m + up < layers:
                    gains[place, m] = len(mine & {*ids[other, m + up]}) - own[m]
            if experts > 256:
                wrapped = {int(e) % 256 for e in mine}
                gains[4, m] = sum(int(e) in wrapped for e in ids[r, m]) - own[m]
        others = [
            sum(len({*live[r, m]} & {*ids[o, m]}) for (t, _), o in at.items() if t == s and o != r)
            for m in range(layers)
        ]
        before = at.get((s, p - 1))
        same = [
            before is not None and all({*a[r, m]} == {*a[before, m]} for m in range(layers))
            for a in (ids, live)
        ]
        found[s, p] = (own, others, gains, same[0] and not same[1])
    return found


@pytest.mark.parametrize(
    "shape", [(8, 2, 1), (16, 8, 4), (300, 8, 3), (600, 10, 2)], ids=lambda s: "/".join(map(str, s))
)
def test_counts_are_those_of_plain_loops(shape):
    experts, topk, layers = shape
    ids, live, valid, sample, position = drawn(3, experts=experts, topk=topk, layers=layers)
    # A stale stretch, so that rows repeat.
    stretch = [r for r in np.flatnonzero(valid) if sample[r] == 5 and 4 <= position[r] < 12]
    ids[stretch] = ids[stretch[0]]
    got = count_overlaps(
        ids,
        live,
        valid=valid,
        sample=sample,
        position=position,
        layers=range(1, layers + 1),
        num_experts=experts,
    )
    want = by_loops(ids, live, valid, sample, position, experts)
    assert got.layers == tuple(range(1, layers + 1))
    assert got.sample_ids.tolist() == sorted({s for s, _ in want})
    owners = np.repeat(got.sample_ids, got.num_rows)
    assert list(zip(owners.tolist(), got.position.tolist(), strict=True)) == list(want)
    own = np.array([o for o, *_ in want.values()])
    others = np.array([o for _, o, *_ in want.values()])
    gains = np.array([g for *_, g, _ in want.values()])
    assert got.own.tolist() == own.sum(1).tolist()
    assert got.others.tolist() == others.sum(1).tolist()
    assert got.flips.tolist() == (own < topk).sum(1).tolist()
    assert got.nearer.T.tolist() == np.maximum(gains, 0).sum(2).tolist()
    assert got.farther.T.tolist() == np.maximum(-gains, 0).sum(2).tolist()
    assert got.repeats.tolist() == [bool(r) for *_, r in want.values()]
    assert got.repeats.any()
    for entry, number in enumerate(got.sample_ids):
        of = owners == number
        assert got.layer_own[entry].tolist() == own[of].sum(0).tolist()
        assert got.layer_others[entry].tolist() == others[of].sum(0).tolist()
        assert got.layer_own_squares[entry].tolist() == (own[of] ** 2).sum(0).tolist()
        assert got.layer_flips[entry].tolist() == (own[of] < topk).sum(0).tolist()
        assert got.layer_nearer[:, entry].tolist() == np.maximum(gains[of], 0).sum(0).tolist()
        assert got.layer_farther[:, entry].tolist() == np.maximum(-gains[of], 0).sum(0).tolist()
        assert got.layer_gain_squares[:, entry].tolist() == (gains[of] ** 2).sum(0).tolist()


def test_counts_of_no_valid_row_are_empty():
    ids, live, valid, sample, position = drawn(4, experts=8, topk=2, layers=2)
    got = count_overlaps(
        ids,
        live,
        valid=np.zeros_like(valid),
        sample=sample,
        position=position,
        layers=(0, 1),
        num_experts=8,
    )
    assert (len(got.own), got.layer_own.shape, got.nearer.shape) == (0, (0, 2), (5, 0))


def test_counts_refuse_a_place_that_occurs_twice():
    ids, live, valid, sample, _ = drawn(5, experts=8, topk=2, layers=2)
    with pytest.raises(TraceError, match="two valid rows have the same sample and position"):
        count_overlaps(
            ids,
            live,
            valid=valid,
            sample=sample,
            position=np.zeros(len(ids), int),
            layers=(0, 1),
            num_experts=8,
        )
