"""A fault of all samples, a layer, a rank or a server is found, even if it moves the median."""

import numpy as np
import pytest

from moe_replay.routing.guard import Guard, Owner, Verdict, judge, summarise
from moe_replay.testing.drawn_steps import DrawnSteps, planted

SHAPES = [(8, 2, 4, 80), (16, 8, 4, 40), (64, 6, 6, 24), (128, 8, 12, 16)]


def source_of(shape, **more) -> DrawnSteps:
    experts, topk, layers, rows = shape
    return DrawnSteps(num_experts=experts, topk=topk, num_layers=layers, num_rows=rows, **more)


def drawn(source: DrawnSteps, seed: int):
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    return rng, *source.draw(rng, source.heat(rng))


def decide(source: DrawnSteps, replayed, live, **more) -> Verdict:
    guard = Guard()
    counts = source.count(replayed, live)
    baseline = guard.baseline([summarise([counts])])
    return guard.decide(baseline, [judge(counts, baseline)], **{"looks": {}, **more})


def spoil(source: DrawnSteps, rng, recorded, cause: str, samples=slice(None)) -> np.ndarray:
    made = planted(recorded, num_experts=source.num_experts, group=source.group, rng=rng)
    replayed = recorded.copy()
    replayed[samples] = made[cause]()[samples]
    return replayed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "cause",
    [
        "one row late",
        "a quarter of the rows late",
        "another prompt",
        "random",
        "second half random",
        "layers rotated",
        "ids + 1",
    ],
)
def test_a_fault_of_all_samples_is_found_in_every_shape(shape, cause):
    source = source_of(shape)
    rng, recorded, live = drawn(source, 1)
    assert not decide(source, spoil(source, rng, recorded, cause), live).is_clean


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_control_the_same_steps_are_clean(shape):
    source = source_of(shape)
    _, recorded, live = drawn(source, 1)
    verdict = decide(source, recorded, live)
    assert verdict.is_clean, verdict.summary()


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.15])
@pytest.mark.parametrize("cause", ["one row late", "another prompt"])
@pytest.mark.parametrize("shape", [(8, 2, 4, 200), (64, 6, 6, 24), (128, 8, 12, 16)], ids=str)
def test_e1_a_few_percent_of_the_samples_are_found_each(shape, cause, share):
    source = source_of(shape, num_samples=64)
    rng, recorded, live = drawn(source, 2)
    wrong = rng.permutation(64)[: max(1, round(share * 64))]
    found = decide(source, spoil(source, rng, recorded, cause, wrong), live)
    assert sorted(f.sample for f in found.misaligned) == sorted(wrong.tolist())


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
@pytest.mark.parametrize("cause", ["a tenth of the rows random", "last quarter one row late"])
def test_what_is_wrong_with_a_part_of_every_sample_is_found(shape, cause):
    source = source_of((*shape[:3], 40))
    rng, recorded, live = drawn(source, 3)
    assert not decide(source, spoil(source, rng, recorded, cause), live).is_clean


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cause", ["one layer one row late", "one layer random"])
def test_one_wrong_layer_is_named(shape, cause):
    source = source_of(shape)
    rng, recorded, live = drawn(source, 4)
    found = decide(source, spoil(source, rng, recorded, cause), live)
    assert {f.name for f in found.faults if f.kind == "layer"} == {str(shape[2] // 2)}


def test_a_far_shift_is_found_when_samples_keep_to_a_topic():
    source = source_of((32, 4, 6, 40), topic=2.0)
    _, recorded, live = drawn(source, 5)
    shifted = np.roll(recorded, 10, axis=1)
    found = decide(source, shifted, live)
    assert {fault.kind for fault in found.faults} == {"step"}
    assert 0.25 < found.agreement.mean() < 0.6
    assert decide(source, recorded, live).is_clean


@pytest.mark.parametrize("experts", [288, 384, 512])
def test_ids_modulo_256_are_found_in_all_samples_and_in_one(experts):
    source = DrawnSteps(num_experts=experts, topk=8, num_layers=6, num_rows=16)
    _, recorded, live = drawn(source, 6)
    everywhere = decide(source, recorded % 256, live)
    assert any("ids modulo 256" in fault.cause for fault in everywhere.faults)
    replayed = recorded.copy()
    replayed[7] = recorded[7] % 256
    [finding] = decide(source, replayed, live).misaligned
    assert (finding.sample, finding.cause) == (
        7,
        "expert-id wrap: ids above 255 were stored in 8 bits",
    )


def zigzag(rows: int, rank: int) -> np.ndarray:
    """Return the rows of one of two context-parallel ranks: chunks 0 and 3, or 1 and 2, of four."""
    chunks = np.arange(rows).reshape(4, -1)
    return np.concatenate([chunks[rank], chunks[3 - rank]])


@pytest.mark.parametrize("wrong_rank", [None, 0, 1])
def test_contiguous_routes_under_zigzag_are_found_and_the_rank_is_named(wrong_rank):
    source = source_of((32, 4, 6, 64))
    _, recorded, live = drawn(source, 7)
    guard, counts = Guard(), []
    for rank in range(2):
        rows = zigzag(64, rank)
        contiguous = np.arange(64).reshape(2, -1)[rank]
        replayed = recorded[:, contiguous if rank == wrong_rank else rows]
        counts.append(source.count(replayed, live[:, rows], positions=rows))
    baseline = guard.baseline([summarise([part]) for part in counts])
    found = guard.decide(baseline, [judge(part, baseline) for part in counts], looks={})
    if wrong_rank is None:
        assert found.is_clean
    else:
        assert not found.is_clean
        ranks = {fault.name for fault in found.faults if fault.kind == "rank"}
        assert ranks == {str(wrong_rank)}


@pytest.mark.parametrize("bad", [None, "server 5"])
def test_one_server_of_eight_is_named(bad):
    source = source_of((8, 2, 4, 16), num_samples=64)
    _, recorded, live = drawn(source, 8)
    owners = {s: Owner(server=f"server {s % 8}", prompt=s // 4) for s in range(64)}
    replayed = recorded.copy()
    if bad:
        replayed[5::8] = np.roll(recorded[5::8], 2, axis=1)
    found = decide(source, replayed, live, owners=owners)
    assert {f.name for f in found.faults if f.kind == "server"} == ({bad} if bad else set())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_e13_a_collapsed_router_is_accepted(shape):
    source = source_of(shape)
    rng, recorded, live = drawn(source, 9)
    for ids in (recorded, live):
        ids[:, :, 1] = np.arange(shape[1])
    drifted = rng.random(live.shape[:2]) < 0.1
    live[drifted, 1, 0] = shape[0] - 1
    found = decide(source, recorded, live)
    assert found.is_clean, found.summary()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_e13_a_layer_that_nobody_wrote_is_refused(shape):
    source = source_of(shape)
    _, recorded, live = drawn(source, 9)
    replayed = recorded.copy()
    replayed[:, :, 1] = np.arange(shape[1])
    found = decide(source, replayed, live)
    assert "1" in {fault.name for fault in found.faults if fault.kind == "layer"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_e13_a_collapsed_router_with_a_near_tie_is_accepted(shape):
    """Engine and trainer choose the same experts for all tokens except one."""
    source = source_of(shape)
    _, recorded, live = drawn(source, 10)
    recorded[:, :, 1] = np.arange(shape[1])
    live[:, :, 1] = np.arange(1, shape[1] + 1)
    found = decide(source, recorded, live)
    assert found.is_clean, found.summary()
