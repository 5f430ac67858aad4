"""Wrong rows scattered over many samples do not look usual, and drift in as many is clean."""

from functools import cache

import numpy as np
import pytest

from moe_replay.routing.guard import Guard, SecondLook, Verdict, judge, summarise
from moe_replay.testing.drawn_steps import DrawnSteps, planted

SAMPLES = 64
SOURCE = DrawnSteps(num_experts=64, topk=6, num_layers=6, num_rows=96, num_samples=SAMPLES)
DRIFTED = 13
"""Samples that drift more than the others: more than are looked at for other weak signs."""


@cache
def drawn(seed: int, times_heat: float = 1.0):
    """Return recorded and live ids of a step, and what its rows are with a tenth of them random."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    recorded, live = SOURCE.draw(rng, times_heat * SOURCE.heat(rng))
    made = planted(recorded, num_experts=64, group=SOURCE.group, rng=rng)
    return recorded, live, made["a tenth of the rows random"]()


def verdict_of(replayed, live, guard: Guard, **more) -> Verdict:
    counts = SOURCE.count(replayed, live)
    baseline = guard.baseline([summarise([counts])])
    return guard.decide(baseline, [judge(counts, baseline)], **{"looks": {}, **more})


def guard_after(steps: int) -> Guard:
    """Return a guard that remembers so many clean steps."""
    guard = Guard()
    guard.restore(remembered(steps))
    return guard


@cache
def remembered(steps: int):
    guard = Guard()
    for seed in range(steps):
        recorded, live, _ = drawn(101 + seed)
        verdict = verdict_of(recorded, live, guard)
        assert verdict.is_clean
        guard.accept(verdict)
    return guard.to_plain()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("share", [0.0, 0.015, 0.05, 0.1, 0.2, 0.4])
def test_strewn_rows_are_found_in_just_the_samples_that_have_them(share, steps):
    recorded, live, strewn = drawn(40)
    bad = np.random.default_rng(41).permutation(SAMPLES)[: round(share * SAMPLES)]
    replayed = recorded.copy()
    replayed[bad] = strewn[bad]
    verdict = verdict_of(replayed, live, guard_after(steps))
    assert {finding.sample for finding in verdict.misaligned} == set(bad.tolist())
    assert {finding.test for finding in verdict.misaligned} <= {"stray rows"}


def test_strewn_rows_in_most_samples_are_found_when_earlier_steps_had_none():
    recorded, live, strewn = drawn(40)
    bad = np.arange(SAMPLES) % 10 < 7
    replayed = np.where(bad[:, None, None, None], strewn, recorded)
    verdict = verdict_of(replayed, live, guard_after(2))
    named = {finding.sample for finding in verdict.misaligned}
    assert named <= set(np.flatnonzero(bad).tolist()) and len(named) >= 0.8 * bad.sum()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("times_heat", [2.0, 4.0])
def test_samples_that_drift_more_than_the_others_are_clean(times_heat, steps):
    recorded, live, _ = drawn(42)
    recorded, live = recorded.copy(), live.copy()
    for ids, hot in zip((recorded, live), drawn(43, times_heat), strict=False):
        ids[:DRIFTED] = hot[:DRIFTED]
    verdict = verdict_of(recorded, live, guard_after(steps))
    assert verdict.is_clean, verdict.summary()
    assert not verdict_of(recorded, live, guard_after(steps), looks=None).suspects


@cache
def with_strays_and_drift(seed: int):
    """Return a step in which `DRIFTED` samples drift far more, and lose some of their rows."""
    recorded, live, _ = (ids.copy() for ids in drawn(seed))
    recorded[:DRIFTED], live[:DRIFTED] = (ids[:DRIFTED] for ids in drawn(seed + 1, 5.0)[:2])
    live[:DRIFTED, 5::9] = (recorded[:DRIFTED, 5::9] + 29) % 64
    return recorded, live


@pytest.mark.parametrize("steps", [0, 2])
def test_strays_of_samples_that_drift_are_scored_live_before_anything_is_said_of_them(steps):
    recorded, live = with_strays_and_drift(44)
    guard = guard_after(steps)
    first = verdict_of(recorded, live, guard, looks=None)
    asked = {finding.sample for finding in first.suspects}
    assert asked == set(range(DRIFTED))
    assert {finding.test for finding in first.suspects} == {"strict stray rows"}
    assert first.is_clean
    # Nobody can look, or the engine gap is as large without replay: neither named nor dropped.
    drift = dict.fromkeys(asked, SecondLook(rho=0.3))
    for looks in ({}, drift):
        verdict = verdict_of(recorded, live, guard, looks=looks)
        assert verdict.is_clean and not verdict.lost, verdict.summary()
    # Replay alone makes it larger: of all, and of one.
    for wrong in (asked, {3}):
        looks = drift | dict.fromkeys(wrong, SecondLook(rho=4.0))
        found = verdict_of(recorded, live, guard, looks=looks).misaligned
        assert {finding.sample for finding in found} == wrong
        assert "have routes of other tokens" in found[0].cause


def test_steps_that_are_known_to_have_strays_are_not_scored_again():
    guard = Guard()
    for seed in (50, 60):
        guard.accept(verdict_of(*with_strays_and_drift(seed), guard))
    assert not verdict_of(*with_strays_and_drift(44), guard, looks=None).suspects
    # Control: the same step, seen without such a history.
    assert verdict_of(*with_strays_and_drift(44), Guard(), looks=None).suspects
