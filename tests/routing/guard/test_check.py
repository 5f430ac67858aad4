"""One call on plain arrays finds the misaligned samples and names what is wrong with them."""

import numpy as np
import pytest

from moe_replay.errors import MisalignmentError, TraceError
from moe_replay.routing.guard import Guard, Owner, check_routes
from moe_replay.testing.drawn_steps import DrawnSteps, planted

SOURCE = DrawnSteps(num_experts=64, topk=6, num_layers=6, num_rows=40)


def drawn(seed: int, source: DrawnSteps = SOURCE):
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    return rng, *source.draw(rng, source.heat(rng))


def flat(ids: np.ndarray) -> np.ndarray:
    return ids.reshape(-1, *ids.shape[2:])


def numbers(ids: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(ids)), ids.shape[1])


def check(replayed, live, source: DrawnSteps = SOURCE, **more):
    return check_routes(
        flat(replayed), flat(live), numbers(live), num_experts=source.num_experts, **more
    )


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ("one row late", "token shift +1"),
        ("one row early", "token shift -1"),
        ("two rows late", "token shift +2"),
        ("a quarter of the rows late", "token shift +10"),
        ("another sample of the prompt", "hold the routes of sample 12"),
        ("another prompt", "hold the routes of sample 9"),
        ("random", "fit no place that was searched"),
        ("second half random", "(positions 20..39) fit no place"),
        ("last quarter one row late", "token shift +1"),
        ("one layer one row late", "token shift +1"),
        ("layers rotated", "layers rotated by +1"),
        ("ids + 1", "expert-id offset +1"),
    ],
)
def test_one_sample_of_32_is_found_and_its_cause_named(cause, words):
    rng, recorded, live = drawn(1)
    replayed = recorded.copy()
    made = planted(recorded, num_experts=64, group=4, rng=rng)
    replayed[13] = made[cause]()[13]
    report = check(replayed, live)
    assert [finding.sample for finding in report.misaligned] == [13]
    assert words in report.misaligned[0].cause
    with pytest.raises(MisalignmentError, match=r"step 3: .*1 of 32 samples"):
        report.raise_if_misaligned("step 3")


def test_control_recorded_routes_are_clean():
    _, recorded, live = drawn(1)
    report = check(recorded, live)
    assert report.is_clean and not report.misaligned
    assert min(report.agreement.values()) > 0.8
    assert "32 samples, none misaligned" in report.summary()
    report.raise_if_misaligned()


def test_swapped_samples_are_both_found():
    _, recorded, live = drawn(2)
    replayed = recorded.copy()
    replayed[[3, 21]] = recorded[[21, 3]]
    found = {finding.sample: finding.cause for finding in check(replayed, live).misaligned}
    assert sorted(found) == [3, 21]
    assert "in sample 21" in found[3] and "in sample 3" in found[21]


def test_half_of_the_rows_random_is_not_called_a_token_shift():
    rng, recorded, live = drawn(3)
    replayed = recorded.copy()
    anything = planted(recorded, num_experts=64, group=4, rng=rng)["random"]()
    replayed[5, ::2] = anything[5, ::2]
    [finding] = check(replayed, live).misaligned
    assert finding.sample == 5
    assert "20 of 40 rows" in finding.cause and "shift" not in finding.cause


def test_rows_of_zeros_are_named_for_what_they_are():
    _, recorded, live = drawn(4)
    replayed = recorded.copy()
    replayed[6, 30:] = 0
    [finding] = check(replayed, live).misaligned
    assert (finding.sample, finding.first, finding.last) == (6, 30, 39)
    assert finding.cause == "10 rows hold 0 in every slot: they were never written"


def test_a_constant_fill_is_named_with_its_layers():
    _, recorded, live = drawn(5)
    replayed = recorded.copy()
    replayed[6] = np.arange(6)
    [finding] = check(replayed, live, layers=range(1, 7)).misaligned
    assert "constant fill: layers [1, 2, 3, 4, 5, 6] hold the same experts" in finding.cause


def test_one_renaming_of_experts_is_named():
    rng, recorded, live = drawn(
        6, (long := DrawnSteps(num_experts=16, topk=4, num_layers=4, num_rows=150))
    )
    replayed = recorded.copy()
    replayed[2] = rng.permutation(16)[recorded[2]]
    [finding] = check(replayed, live, long).misaligned
    assert "wrong expert-id space: one renaming for all layers" in finding.cause


def test_ids_that_were_wrapped_are_named():
    wide = DrawnSteps(num_experts=384, topk=8, num_layers=3, num_rows=20, num_samples=16)
    rng, recorded, live = drawn(7, wide)
    replayed = recorded.copy()
    made = planted(recorded, num_experts=384, group=4, rng=rng)["ids modulo 256"]()
    ordered = np.sort(made[3], axis=2)
    doubled = (ordered[..., 1:] == ordered[..., :-1]).any(axis=2)
    replayed[3] = np.where(doubled[..., None], recorded[3] % 256, made[3])
    report = check(replayed, live, wide)
    assert {finding.sample for finding in report.misaligned} == {3}


def test_ids_in_a_type_that_cannot_hold_them_are_refused():
    wide = DrawnSteps(num_experts=384, topk=8, num_layers=3, num_rows=20, num_samples=16)
    _, recorded, live = drawn(7, wide)
    with pytest.raises(TraceError, match="routes came as uint8, which ends at 255"):
        check(recorded.astype(np.uint8), live, wide)


def test_padding_and_rows_without_a_route_are_not_read():
    _, recorded, live = drawn(8)
    replayed, sample = flat(recorded).copy(), numbers(live)
    valid = np.tile(np.arange(40) < 39, 32)
    replayed[~valid] = 0
    sample[-40:] = -1
    replayed[-40:] = 63
    report = check_routes(replayed, flat(live), sample, num_experts=64, valid=valid)
    assert report.is_clean
    assert len(report.agreement) == 31


def test_owners_are_named():
    _, recorded, live = drawn(9)
    replayed = recorded.copy()
    replayed[13] = np.roll(recorded[13], 1, axis=0)
    owners = {s: Owner(server=f"http://{s % 2}", policy_version=4) for s in range(32)}
    report = check(replayed, live, owners=owners)
    assert "sample 13 (server http://1, policy version 4)" in report.summary()


def test_a_guard_remembers_what_is_usual():
    guard = Guard()
    _, recorded, live = drawn(10)
    assert check(recorded, live, guard=guard).is_clean
    assert len(guard.to_plain()["history"]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r, v, s: (r[:, 0], v, s), "expected \\[rows, layers, topk\\] twice"),
        (lambda r, v, s: (r[:-1], v, s), "expected \\[rows, layers, topk\\] twice"),
        (lambda r, v, s: (r, v * 2, s), "live_ids has ids outside 0..63"),
        (lambda r, v, s: (r, v * 0, s), "or duplicates in a row"),
        (lambda r, v, s: (r.astype(float), v, s), "expert_ids is float64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, words):
    _, recorded, live = drawn(11)
    with pytest.raises(TraceError, match=words):
        check_routes(*change(flat(recorded), flat(live), numbers(live)), num_experts=64)


def test_nothing_to_compare_is_said():
    _, recorded, live = drawn(12)
    report = check_routes(flat(recorded), flat(live), numbers(live) * 0 - 1, num_experts=64)
    assert report.is_clean and "nothing to compare" in report.summary()


@pytest.mark.parametrize("shape", [(4, 0, 2), (4, 2, 0)], ids=str)
def test_routes_without_a_slot_are_refused(shape):
    with pytest.raises(TraceError, match=r"expected \[rows, layers, topk\]"):
        check_routes(np.zeros(shape, int), np.zeros(shape, int), np.zeros(4, int), num_experts=8)
