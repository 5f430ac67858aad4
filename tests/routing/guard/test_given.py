"""`check_routes` refuses impossible arguments with a message, and accepts possible ones."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from moe_replay.errors import TraceError
from moe_replay.routing.guard import Owner
from moe_replay.routing.guard import check_routes as checked_routes
from moe_replay.testing.drawn_steps import DrawnSteps

# As callers have it: without the annotations being checked, which in tests would refuse some of
# this first.
check_routes = inspect.unwrap(checked_routes)
SOURCE = DrawnSteps(num_experts=16, topk=2, num_layers=3, num_rows=12, num_samples=8)
COUNT = SOURCE.num_samples * SOURCE.num_rows


def step() -> dict[str, Any]:
    """Return the arguments of a call that is right in all of them."""
    rng = np.random.default_rng(3)
    recorded, live = SOURCE.draw(rng, SOURCE.heat(rng))
    return {
        "expert_ids": recorded.reshape(-1, 3, 2),
        "live_ids": live.reshape(-1, 3, 2),
        "sample": np.repeat(np.arange(8), 12),
        "num_experts": 16,
        "position": np.tile(np.arange(12), 8),
        "valid": np.ones(COUNT, bool),
        "layers": (1, 2, 3),
    }


STEP = step()


def with_one(name: str, index: Any, value: Any) -> np.ndarray:
    changed = STEP[name].copy()
    changed[index] = value
    return changed


def ragged() -> list[Any]:
    rows = STEP["expert_ids"].tolist()
    return [*rows[:-1], rows[-1][:2]]


def nothing_for_one() -> np.ndarray:
    found = STEP["sample"].astype(object)
    found[4] = None
    return found


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "layer above": ({"layers": (1, 2, 32_768)}, r"layers holds 32768, expected .* 0 to 32767"),
    "layer below": ({"layers": (-1, 0, 1)}, r"layers holds -1, expected .* 0 to 32767"),
    "layer twice": ({"layers": (0, 1, 0)}, r"layers names \[0\] more than once.* each once"),
    "layer names": ({"layers": ("a", "b", "c")}, r"layers holds 'a', expected integers"),
    "half a layer": ({"layers": (0, 0.5, 1)}, r"layers holds 0\.5, expected integers"),
    "one layer": ({"layers": 3}, r"layers is 3, expected integers"),
    "too few layers": ({"layers": (1, 2)}, r"and 2 layers, expected \[rows, layers, topk\]"),
    "no experts": ({"num_experts": 0}, r"num_experts is 0, expected an integer above 0"),
    "half an expert": ({"num_experts": 16.0}, r"num_experts is 16\.0, expected an integer"),
    "scores": ({"expert_ids": STEP["expert_ids"] / 16}, r"expert_ids is float64.* scores or"),
    "live scores": ({"live_ids": STEP["live_ids"] / 16}, r"live_ids is float64.* scores or"),
    "a mask of experts": (
        {"live_ids": np.ones((COUNT, 3, 16), bool), "expert_ids": np.ones((COUNT, 3, 16), bool)},
        r"expert_ids is bool, expected integers",
    ),
    "objects": ({"expert_ids": STEP["expert_ids"].astype(object)}, r"expert_ids is object"),
    "ragged lists": ({"expert_ids": ragged()}, r"expert_ids is list and cannot become an array"),
    "negative live id": ({"live_ids": with_one("live_ids", 5, -1)}, r"outside 0\.\.15"),
    "live id above": ({"live_ids": with_one("live_ids", (5, 0, 0), 16)}, r"outside 0\.\.15"),
    "sample of floats": ({"sample": STEP["sample"] * 1.0}, r"sample is float64, expected integers"),
    "sample of nothing": ({"sample": nothing_for_one()}, r"sample is object, expected integers"),
    "sample too short": ({"sample": STEP["sample"][:-1]}, r"sample \(95,\).* \[rows\] for"),
    "sample of two dims": ({"sample": STEP["sample"][:, None]}, r"sample \(96, 1\).* \[rows\] for"),
    "unsigned sample": (
        {"sample": with_one("sample", 0, -1).astype(np.uint64)},
        r"sample holds 18446744073709551615.* signed",
    ),
    "position of floats": ({"position": STEP["position"] + 0.5}, r"position is float64, expected"),
    "position too short": ({"position": STEP["position"][:-1]}, r"position \(95,\).* \[rows\] for"),
    "position below 0": ({"position": STEP["position"] - 1}, r"position runs from -1 to 10"),
    "position above": ({"position": STEP["position"] + 2**31}, r"position runs from 2147483648"),
    "position twice": ({"position": STEP["position"] * 0}, r"same sample and position"),
    "valid too short": ({"valid": STEP["valid"][:-1]}, r"valid \(95,\).* \[rows\] for"),
    "lengths for valid": ({"valid": np.full(COUNT, 12)}, r"valid is int64 and holds \['12'\]"),
    "words for valid": ({"valid": np.full(COUNT, "no")}, r"valid is <U2 and holds \['no'\]"),
    "weights for valid": ({"valid": np.full(COUNT, 0.5)}, r"valid is float64 and holds \['0\.5'\]"),
    "list of gaps": ({"gaps": [0.1] * 8}, r"gaps is a list, expected a mapping"),
    "no gap": ({"gaps": {0: 0.1, 1: None}}, r"gaps\[1\] is None, expected a number"),
    "name of an owner": (
        {"owners": {2: "http://a"}},
        r"owners\[2\] is 'http://a', expected an Owner",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_right_is_refused_in_words(wrong):
    changed, words = WRONG[wrong]
    with pytest.raises(TraceError, match=f"(check_routes|guard): .*{words}"):
        check_routes(**STEP | changed)


RIGHT: dict[str, dict[str, Any]] = {
    "as it is": {},
    "largest layer": {"layers": (32_765, 32_766, 32_767)},
    "layers of numpy": {"layers": np.array([4, 5, 6])},
    "layers from an iterator": {"layers": iter([4, 5, 6])},
    "layers in another order": {"layers": (3, 1, 2)},
    "experts of numpy": {"num_experts": np.int64(16)},
    "narrow ids": {"expert_ids": STEP["expert_ids"].astype(np.int8)},
    "lists": {name: STEP[name].tolist() for name in ("expert_ids", "live_ids", "sample", "valid")},
    "unsigned sample": {"sample": STEP["sample"].astype(np.uint8)},
    "a mask of ones": {"valid": np.ones(COUNT, np.int32)},
    "gaps and owners": {
        "gaps": {number: 0.01 * number for number in range(8)},
        "owners": {2: Owner(server="http://a")},
    },
}


@pytest.mark.parametrize("right", RIGHT)
def test_what_can_be_right_is_taken(right):
    report = check_routes(**STEP | RIGHT[right])
    assert report.is_clean and len(report.agreement) == 8


def test_positions_of_padding_are_not_read():
    sample = with_one("sample", slice(0, 12), -1)
    position = with_one("position", slice(0, 12), -7)
    report = check_routes(**STEP | {"sample": sample, "position": position})
    assert report.is_clean and len(report.agreement) == 7


@pytest.mark.parametrize("value", [-1, 16, 250])
def test_replayed_ids_that_no_router_chooses_are_findings_and_no_errors(value):
    report = check_routes(**STEP | {"expert_ids": with_one("expert_ids", (30, 1, 0), value)})
    assert [(finding.sample, finding.test) for finding in report.misaligned] == [(2, "structure")]


def test_a_step_without_rows_is_clean():
    empty = {name: STEP[name][:0] for name in ("expert_ids", "live_ids", "sample")}
    report = check_routes(**STEP | empty | {"position": None, "valid": None})
    assert report.is_clean and "nothing to compare" in report.summary()
    assert check_routes(**STEP | empty | {"position": [], "valid": [], "sample": []}).is_clean


def test_tensors_are_taken_and_those_that_hold_no_ids_refused():
    torch = pytest.importorskip("torch")
    names = ("expert_ids", "live_ids", "sample", "position", "valid")
    tensors = {name: torch.from_numpy(STEP[name].copy()) for name in names}
    assert check_routes(**STEP | tensors).is_clean
    for kind, words in (
        (tensors["expert_ids"].to(torch.bfloat16), "expert_ids is torch.bfloat16 and cannot"),
        (tensors["expert_ids"].to("meta"), "expert_ids is torch.int64 and cannot become"),
        (tensors["expert_ids"].to_sparse(), "expert_ids is torch.int64 and cannot become"),
        (tensors["expert_ids"].float(), "expert_ids is float32, expected integers"),
    ):
        with pytest.raises(TraceError, match=words):
            check_routes(**STEP | tensors | {"expert_ids": kind})
