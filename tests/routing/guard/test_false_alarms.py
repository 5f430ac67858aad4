"""Healthy steps are clean, however the router drifts, with a history and without."""

import numpy as np
import pytest

from moe_replay.routing.guard import Guard, check_routes, count_overlaps, judge, summarise
from moe_replay.testing.drawn_steps import DrawnSteps

HABITS = {
    "plain": {},
    "long tail": {"spread": 0.35},
    "noise of single samples": {"spread": 0.6},
    "alike neighbours": {"memory": (0.9, 0.9), "agreement": 0.85, "spread": 0.35},
    "strong topics": {"topic": 2.1},
    "few popular experts": {"popularity": 3.0, "spread": 0.35},
    "collapsed router": {"popularity": 8.0},
    "hard drift": {"agreement": 0.65, "spread": 0.35},
}
SHAPES = [(8, 2, 4, 16, 10), (8, 2, 4, 40, 8), (16, 8, 4, 24, 5), (64, 6, 6, 24, 3)]


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_healthy_steps_are_clean(shape, habit):
    experts, topk, layers, rows, steps = shape
    seed = [20, experts, rows]
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    source = DrawnSteps(
        num_experts=experts, topk=topk, num_layers=layers, num_rows=rows, **HABITS[habit]
    )
    heat, guard, looks = source.heat(rng), Guard(), 0
    for _ in range(steps):
        counts = source.count(*source.draw(rng, heat))
        gaps = source.gaps(rng)
        for judged_by in (Guard(), guard):
            baseline = judged_by.baseline([summarise([counts])])
            evidence = [judge(counts, baseline)]
            verdict = judged_by.decide(baseline, evidence, gaps=gaps, looks={})
            assert verdict.is_clean, verdict.summary()
            assert verdict.margin_nats < 0
        looks += len(judged_by.decide(baseline, evidence, gaps=gaps).suspects)
        guard.accept(verdict)
    # A second look costs a pass of a microbatch, so it must be rare.
    assert looks <= 0.2 * steps + 2


def test_samples_of_stale_versions_are_compared_among_themselves():
    print("seed 21")
    rng = np.random.default_rng(21)
    fresh = DrawnSteps(num_experts=64, topk=6, num_layers=4, num_rows=24, agreement=0.97)
    stale = DrawnSteps(num_experts=64, topk=6, num_layers=4, num_rows=24, agreement=0.5)
    parts = [source.draw(rng, source.heat(rng)) for source in (fresh, stale)]
    replayed, live = (np.concatenate(pair) for pair in zip(*parts, strict=True))
    counts = fresh.count(replayed, live)
    guard = Guard()
    versions = {sample: 7 if sample < 32 else 5 for sample in range(64)}
    baseline = guard.baseline([summarise([counts])], versions=versions)
    assert baseline.kappa.shape[0] == 2
    assert baseline.kappa[1].mean() > baseline.kappa[0].mean() + 0.2
    assert guard.decide(baseline, [judge(counts, baseline)], looks={}).is_clean


@pytest.mark.parametrize("shape", [(8, 2, 4), (64, 6, 6)], ids=str)
@pytest.mark.parametrize("lasting", [True, False])
def test_a_long_text_that_repeats_one_word_is_clean(shape, lasting):
    """Rows that are all alike: the routes of every row fit equally, and nothing is wrong."""
    experts, topk, layers = shape
    print("seed 22")
    rng = np.random.default_rng(22)
    source = DrawnSteps(num_experts=experts, topk=topk, num_layers=layers, num_rows=200)
    replayed, live = source.draw(rng, source.heat(rng))
    loops = [4, 19]
    for sample in loops:
        replayed[sample, 10:] = live[sample, 10:] = replayed[sample, 10]
        unused = next(e for e in range(experts) if e not in replayed[sample, 10, 1])
        if lasting:  # a flip that stays as long as the text repeats
            live[sample, 10:, 1, 0] = unused
        else:
            flipped = rng.random((190, layers)) < 0.3
            for layer in range(layers):
                taken = replayed[sample, 10, layer]
                unused = next(e for e in range(experts) if e not in taken)
                live[sample, 10:, layer, 0][flipped[:, layer]] = unused
    counts = source.count(replayed, live)
    guard = Guard()
    baseline = guard.baseline([summarise([counts])])
    verdict = guard.decide(baseline, [judge(counts, baseline)], looks={})
    assert verdict.is_clean, verdict.summary()
    # Control: the same samples with the routes of other tokens.
    replayed[loops] = np.roll(replayed[loops], 4, axis=2) if layers > 4 else 1 + replayed[loops]
    counts = source.count(replayed % experts, live)
    baseline = guard.baseline([summarise([counts])])
    verdict = guard.decide(baseline, [judge(counts, baseline)], looks={})
    assert {finding.sample for finding in verdict.misaligned} == set(loops)


@pytest.mark.parametrize("shape", [(8, 2, 4), (64, 6, 6)], ids=str)
def test_a_policy_whose_texts_all_repeat_one_word_is_clean(shape):
    experts, topk, layers = shape
    print("seed 23")
    rng = np.random.default_rng(23)
    source = DrawnSteps(num_experts=experts, topk=topk, num_layers=layers, num_rows=200)
    replayed, live = source.draw(rng, source.heat(rng))
    replayed[:, 4:] = live[:, 4:] = replayed[:, [4]]
    flipped = rng.random(live.shape[:3]) < 0.25 * topk / 2
    live[..., 0][flipped] = (replayed.max(axis=3)[flipped] + 1) % experts
    unique = np.sort(live, axis=3)
    twice = (unique[..., 1:] == unique[..., :-1]).any(axis=3)
    live[twice] = replayed[twice]
    counts = source.count(replayed, live)
    guard = Guard()
    baseline = guard.baseline([summarise([counts])])
    verdict = guard.decide(baseline, [judge(counts, baseline)], looks={})
    assert verdict.is_clean, verdict.summary()
    assert verdict.agreement.mean() < 0.93


@pytest.mark.parametrize("shape", [(8, 2, 4), (64, 6, 6)], ids=str)
@pytest.mark.parametrize("longest", [3, 12, 50])
def test_short_and_uneven_samples_with_rows_missing_are_clean_on_any_ranks(shape, longest):
    experts, topk, layers = shape
    seed = [24, experts, longest]
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    source = DrawnSteps(num_experts=experts, topk=topk, num_layers=layers, num_rows=50, spread=0.35)
    heat, guard = source.heat(rng), Guard()
    for _ in range(3):
        replayed, live = (ids.reshape(-1, layers, topk) for ids in source.draw(rng, heat))
        sample, position = np.repeat(np.arange(32), 50), np.tile(np.arange(50), 32)
        valid = (position < rng.integers(1, longest + 1, 32)[sample]) & (rng.random(1600) < 0.95)
        # Rows are cut anywhere over three ranks, layers over two stages.
        rank = np.minimum(np.arange(1600) * 3 // 1600 + (rng.random(1600) < 0.02), 2)
        counts = [
            count_overlaps(
                replayed[:, stage],
                live[:, stage],
                valid=valid & (rank == r),
                sample=sample,
                position=position,
                layers=tuple(range(layers))[stage],
                num_experts=experts,
            )
            for r in range(3)
            for stage in (slice(0, 1), slice(1, layers))
        ]
        baseline = guard.baseline([summarise([part]) for part in counts])
        verdict = guard.decide(baseline, [judge(part, baseline) for part in counts], looks={})
        assert verdict.is_clean, verdict.summary()
        guard.accept(verdict)


@pytest.mark.parametrize("period", [1, 2, 3])
@pytest.mark.parametrize("shape", [(8, 1, 4), (8, 2, 4), (16, 8, 2), (16, 1, 1)], ids=str)
def test_texts_that_go_round_in_circles_are_clean_whatever_flips_last(shape, period):
    """Every round has the flips of the first: a few unlucky tokens, not a hundred."""
    experts, topk, layers = shape
    seed = [25, experts, topk, period]
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for agreement in (0.97, 0.92, 0.8):
        source = DrawnSteps(
            num_experts=experts, topk=topk, num_layers=layers, num_rows=60, agreement=agreement
        )
        heat = source.heat(rng)
        rows = np.arange(60)
        round_rows = np.where(rows < 10, rows, 10 + (rows - 10) % period)
        for _ in range(4):
            replayed, live = source.draw(rng, heat)
            loops = [4, 13, 20]
            for ids in (replayed, live):
                ids[loops] = ids[loops][:, round_rows]
            report = _checked(replayed, live, experts)
            assert report.is_clean, report.summary()
            if layers < 4 or agreement < 0.9:
                continue
            # Control: a sample beside them, and one that goes in circles after 40 of its 60 rows, a
            # row late.
            replayed[7, 41:] = live[7, 41:] = replayed[7, 40]
            replayed[[7, 9]] = np.roll(replayed[[7, 9]], 1, axis=1)
            report = _checked(replayed, live, experts)
            assert {finding.sample for finding in report.misaligned} == {7, 9}


def test_a_long_text_that_goes_round_in_circles_does_not_speak_for_its_step():
    """Two tokens with near ties, routed alike by the trainer, sixty times in one of 4 samples."""
    print("seed 28")
    rng = np.random.default_rng(28)
    source = DrawnSteps(num_experts=16, topk=2, num_layers=2, num_rows=120, num_samples=4)
    replayed, live = source.draw(rng, source.heat(rng))
    rows = np.arange(120) % 2
    replayed[0], live[0] = replayed[0][rows], replayed[0][1 - rows]
    valid = np.arange(120) < np.array([120, 9, 7, 8])[:, None]
    report = _checked(replayed, live, 16, valid=valid)
    assert report.is_clean, report.summary()


def test_equal_neighbours_of_a_small_model_are_clean():
    """With two layers of top-2 of 8, 16 neighbours of one sample in 8,000 steps share a route."""
    seed = [30, 7937]
    print(f"seed {seed}")
    source = DrawnSteps(
        num_experts=8,
        topk=2,
        num_layers=2,
        num_rows=20,
        num_samples=8,
        **{"topic": 2.1, "agreement": 0.8, "spread": 0.35},
    )
    heat, rng = source.heat(np.random.default_rng(30)), np.random.default_rng(seed)
    replayed, live = source.draw(rng, heat)
    valid = np.arange(20) < rng.integers(6, 21, 8)[:, None]
    equal = (np.sort(replayed[:, 1:]) == np.sort(replayed[:, :-1])).all(axis=(2, 3)) & valid[:, 1:]
    assert equal.sum(axis=1).max() >= 15
    report = _checked(replayed, live, 8, valid=valid)
    assert report.is_clean, report.summary()


@pytest.mark.parametrize("layers", [4, 8])
def test_control_equal_rows_of_a_short_sample_that_its_live_routes_are_not_like_are_found(layers):
    print("seed 29")
    rng = np.random.default_rng(29)
    source = DrawnSteps(num_experts=8, topk=2, num_layers=layers, num_rows=20, num_samples=6)
    replayed, live = source.draw(rng, source.heat(rng))
    assert _checked(replayed, live, 8).is_clean
    replayed[3, 2:] = replayed[3, 2]
    assert [finding.sample for finding in _checked(replayed, live, 8).misaligned] == [3]
    # Partly: five equal rows say nothing.
    replayed[3, 7:] = live[3, 7:]
    assert _checked(replayed, live, 8).is_clean


def test_two_rows_whose_live_routes_are_crossed_are_clean():
    """What two rows share by chance is measured on two rows, so it is uncertain."""
    replayed = np.zeros((16, 2, 1), np.int64)
    replayed[15, 0] = 3
    live = replayed.copy()
    live[14:] = live[14:, ::-1]
    report = _checked(replayed[:, :, None], live[:, :, None], 8)
    assert report.is_clean, report.summary()


@pytest.mark.parametrize("shape", [(8, 1, 4), (4, 3, 2), (16, 8, 2)], ids=str)
def test_samples_of_one_to_three_rows_are_clean(shape):
    experts, topk, layers = shape
    seed = [26, experts]
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    source = DrawnSteps(
        num_experts=experts, topk=topk, num_layers=layers, num_rows=3, popularity=3.0, spread=0.35
    )
    heat = source.heat(rng)
    for _ in range(40):
        replayed, live = source.draw(rng, heat)
        length = rng.integers(1, 4, 32)
        report = _checked(replayed, live, experts, valid=np.arange(3) < length[:, None])
        assert report.is_clean, report.summary()


def _checked(replayed, live, experts, valid=None):
    samples, rows = replayed.shape[:2]
    return check_routes(
        replayed.reshape(samples * rows, *replayed.shape[2:]),
        live.reshape(samples * rows, *live.shape[2:]),
        np.repeat(np.arange(samples), rows),
        num_experts=experts,
        valid=None if valid is None else valid.ravel(),
    )
