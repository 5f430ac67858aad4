"""The guard finds one misaligned sample of a step and its cause; healthy steps are clean."""

from dataclasses import replace

import numpy as np
import pytest

from moe_replay.routing.guard import (
    Guard,
    Owner,
    SecondLook,
    Status,
    Verdict,
    join_evidence,
    judge,
    summarise,
)
from moe_replay.testing.drawn_steps import DrawnSteps, planted

PLAIN = DrawnSteps(num_experts=64, topk=6, num_layers=6, num_rows=40)


def drawn(source: DrawnSteps, seed: int):
    """Return a generator, recorded and live ids of one step."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    return rng, *source.draw(rng, source.heat(rng))


def spoil(source: DrawnSteps, rng, recorded, cause: str, samples) -> np.ndarray:
    made = planted(recorded, num_experts=source.num_experts, group=source.group, rng=rng)
    replayed = recorded.copy()
    replayed[samples] = made[cause]()[samples]
    return replayed


def verdict_of(source: DrawnSteps, replayed, live, guard: Guard | None = None, **more) -> Verdict:
    guard = guard or Guard()
    counts = source.count(replayed, live)
    baseline = guard.baseline([summarise([counts])])
    return guard.decide(baseline, [judge(counts, baseline)], **{"looks": {}, **more})


def misaligned(verdict: Verdict) -> list[int]:
    return sorted(finding.sample for finding in verdict.misaligned)


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ("one row late", "token shift +1"),
        ("one row early", "token shift -1"),
        ("two rows late", "even a neighbour's routes fit better"),
        ("another prompt", "hardly better than"),
        ("second half random", "hardly better than"),
        ("last quarter one row late", "token shift +1"),
        ("one layer one row late", "token shift +1"),
        ("layers rotated", "layer shift +1"),
    ],
)
def test_one_sample_of_32_is_found_and_the_others_are_not(cause, words):
    rng, recorded, live = drawn(PLAIN, 1)
    replayed = spoil(PLAIN, rng, recorded, cause, [13])
    found = verdict_of(PLAIN, replayed, live)
    assert misaligned(found) == [13]
    assert words in found.misaligned[0].cause
    assert misaligned(verdict_of(PLAIN, recorded, live)) == []


def test_a_verdict_is_the_same_when_ranks_hold_other_samples_and_layers():
    rng, recorded, live = drawn(PLAIN, 2)
    replayed = spoil(PLAIN, rng, recorded, "one row late", [5])
    guard = Guard()
    counts = []
    for layers in (slice(0, 3), slice(3, 6)):
        for samples in (slice(0, 16), slice(16, 32)):
            ids, own = (values[samples, :, layers] for values in (replayed, live))
            part = PLAIN.count(ids, own, first_sample=samples.start)
            counts.append(replace(part, layers=tuple(range(6))[layers]))
    baseline = guard.baseline([summarise([part]) for part in counts])
    evidence = [join_evidence([judge(part, baseline)]) for part in counts]
    found = guard.decide(baseline, evidence, looks={})
    whole = verdict_of(PLAIN, replayed, live)
    assert misaligned(found) == misaligned(whole) == [5]
    assert found.agreement == pytest.approx(whole.agreement)


def test_a_guard_restored_from_a_checkpoint_decides_alike():
    guard = Guard()
    rng, recorded, live = drawn(PLAIN, 3)
    guard.accept(verdict_of(PLAIN, recorded, live, guard))
    other = Guard()
    other.restore(guard.to_plain())
    replayed = spoil(PLAIN, rng, recorded, "a tenth of the rows random", [7])
    few = slice(4, 9)
    one, two = (verdict_of(PLAIN, replayed[few], live[few], g) for g in (guard, other))
    assert [str(f) for f in one.findings] == [str(f) for f in two.findings]
    assert one.margin_nats == two.margin_nats
    assert one.margin_nats != verdict_of(PLAIN, replayed[few], live[few]).margin_nats


def test_a_suspect_is_cleared_or_convicted_by_its_second_look():
    rng, recorded, live = drawn(PLAIN, 4)
    replayed = spoil(PLAIN, rng, recorded, "random", [9])
    first = verdict_of(PLAIN, replayed, live, looks=None)
    assert [finding.sample for finding in first.suspects] == [9]
    assert first.is_clean

    def after(look: SecondLook) -> Verdict:
        return verdict_of(PLAIN, replayed, live, looks={9: look})

    assert misaligned(after(SecondLook(rho=4.0))) == [9]
    assert misaligned(after(SecondLook(place="sample 3", nats=60.0, rho=1.5))) == [9]
    # Routes of other weights fit some place by chance; as far from the engine live, they are lost.
    for look in (SecondLook(rho=0.1), SecondLook(place="sample 3", nats=60.0, rho=0.1)):
        drifted = after(look)
        assert drifted.is_clean
        assert [(f.sample, f.status) for f in drifted.lost] == [(9, Status.LOST)]


def test_a_message_names_sample_prompt_server_version_and_positions():
    rng, recorded, live = drawn(PLAIN, 5)
    replayed = spoil(PLAIN, rng, recorded, "last quarter one row late", [11])
    owners = {s: Owner(server="http://b", policy_version=3, prompt=s // 4) for s in range(32)}
    message = verdict_of(PLAIN, replayed, live, owners=owners).message("step 7")
    assert message.startswith("step 7: the routes of 1 of 32 samples do not belong to their tokens")
    assert "sample 11 (prompt 2, server http://b, policy version 3), positions " in message
    assert "token shift +1" in message


@pytest.mark.parametrize(
    ("samples", "rows"), [(32, 16), (32, 17), (128, 12)], ids=lambda value: str(value)
)
def test_one_sample_is_found_wherever_it_lies_in_the_step(samples, rows):
    source = DrawnSteps(
        num_experts=32, topk=4, num_layers=6, num_rows=rows, num_samples=samples, spread=0.1
    )
    rng, recorded, live = drawn(source, 6)
    for place in np.linspace(0, samples - 1, 8).astype(int).tolist():
        replayed = spoil(source, rng, recorded, "one row late", [place])
        assert misaligned(verdict_of(source, replayed, live)) == [place]
    assert misaligned(verdict_of(source, recorded, live)) == []


@pytest.mark.parametrize("shape", [(8, 2, 4), (16, 8, 4), (64, 6, 6)], ids=str)
@pytest.mark.parametrize("length", [50, 70])
def test_a_stale_stretch_of_one_long_sample_is_found_with_its_place(shape, length):
    experts, topk, layers = shape
    source = DrawnSteps(
        num_experts=experts, topk=topk, num_layers=layers, num_rows=400, num_samples=8
    )
    _, recorded, live = drawn(source, 7)
    replayed = recorded.copy()
    replayed[3, 160 : 160 + length] = recorded[3, 160]
    [finding] = verdict_of(source, replayed, live).misaligned
    assert (finding.sample, finding.test) == (3, "equal rows")
    # A live route that happens to equal the one before cuts a run short.
    assert finding.first >= 158 and finding.last < 160 + length
    assert finding.last - finding.first > 40
    assert misaligned(verdict_of(source, recorded, live)) == []


def test_a_sample_that_repeats_one_word_is_not_a_stale_stretch():
    _, recorded, live = drawn(PLAIN, 8)
    recorded[4, 5:] = recorded[4, 5]
    live[4, 5:] = recorded[4, 5]
    # A near tie: in one layer, one of the live experts is another one in every second row.
    other = next(e for e in range(64) if e not in recorded[4, 5, 2])
    live[4, 5::2, 2, 0] = other
    found = verdict_of(PLAIN, recorded, live)
    assert found.is_clean, found.summary()
    # Control: the same rows with live routes of their own.
    stale = recorded.copy()
    _, _, own = drawn(PLAIN, 8)
    live[4] = own[4]
    assert misaligned(verdict_of(PLAIN, stale, live)) == [4]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -1.0])
def test_a_gap_that_is_no_number_hides_no_other_gap(broken):
    rng, recorded, live = drawn(PLAIN, 27)
    gaps = PLAIN.gaps(rng) | {3: 1e9, 5: broken}
    verdict = verdict_of(PLAIN, recorded, live, gaps=gaps, looks=None)
    assert [finding.sample for finding in verdict.suspects] == [3]
