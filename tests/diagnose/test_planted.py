"""A diagnosis names each kind of misalignment, in all samples and in one of 32."""

from __future__ import annotations

import re

import numpy as np
import pytest

from moe_replay.cli.diagnose_report import plain_report
from moe_replay.diagnose import Cause

from .conftest import NUM_GENERATIONS, Ids

ONE = 17
NAME = f"{ONE // NUM_GENERATIONS}/{ONE % NUM_GENERATIONS}"


def one_row_late(every: list[Ids]) -> list[Ids]:
    return [np.concatenate([ids[:1], ids[:-1]]) for ids in every]


def read_sequence_first(every: list[Ids], size: int = 4) -> list[Ids]:
    """Flatten padded microbatches sample by sample, and read them as sequence first."""
    found = []
    for first in range(0, len(every), size):
        batch = every[first : first + size]
        longest = max(map(len, batch))
        padded = [
            np.pad(ids, ((0, longest - len(ids)), (0, 0), (0, 0)), constant_values=-1)
            for ids in batch
        ]
        flat = np.concatenate(padded)
        read = flat.reshape(longest, size, *flat.shape[1:])
        found += [read[: len(ids), number] for number, ids in enumerate(batch)]
    return found


def cut_contiguously(every: list[Ids]) -> list[Ids]:
    """Give tokens that two context-parallel ranks hold in zigzag order routes cut in one piece."""
    found = []
    for ids in every:
        quarter = -(-len(ids) // 4)
        rows = np.arange(4 * quarter).reshape(4, quarter)
        zigzag = rows[[0, 3, 1, 2]].ravel()
        padded = np.pad(ids, ((0, 4 * quarter - len(ids)), (0, 0), (0, 0)), constant_values=-1)
        arrived = np.full_like(padded, -1)
        arrived[zigzag] = padded
        found.append(arrived[: len(ids)])
    return found


def dense_layer_counted(every: list[Ids]) -> list[Ids]:
    return [np.roll(ids, 1, axis=1) for ids in every]


def virtual_stages_in_one_range(every: list[Ids]) -> list[Ids]:
    """Two stages of two chunks hold layers 0 and 2, 1 and 3, and take 0 and 1, 2 and 3."""
    return [ids[:, [0, 2, 1, 3]] for ids in every]


def in_eight_bits(every: list[Ids]) -> list[Ids]:
    return [np.where(ids < 0, ids, ids % 256) for ids in every]


PLANTS = {
    "A1": (one_row_late, "token shift +1"),
    "A2": (
        read_sequence_first,
        "microbatch of 4 padded samples: routes were flattened sample by sample",
    ),
    "A9": (cut_contiguously, "context-parallel order of 2 ranks: routes were cut contiguously"),
    "B1": (dense_layer_counted, "layer"),
    "B4": (virtual_stages_in_one_range, "layers hold each other's routes"),
    "C1": (in_eight_bits, "expert-id wrap"),
}


@pytest.mark.parametrize("defect", PLANTS)
def test_a_planted_misalignment_of_every_sample_is_named(rollout, defect):
    plant, words = PLANTS[defect]
    found = rollout.judged(rollout.with_routes(plant)).conclusion
    assert found.cause is Cause.MISALIGNMENT
    assert defect in found.defects
    assert words in " ".join(found.causes)


@pytest.mark.parametrize("defect", ["A1", "A9", "B4", "C1"])
def test_a_planted_misalignment_of_one_sample_of_32_names_it(rollout, defect):
    plant, words = PLANTS[defect]
    found = rollout.diagnosed(rollout.with_routes(plant, only=ONE)).conclusion
    assert found.cause is Cause.MISALIGNMENT
    assert [line for line in found.causes if not line.startswith(f"sample {NAME} ")] == []
    assert defect in found.defects
    assert words in found.causes[0]


def test_swapped_samples_are_called_by_their_names_on_both_ends(rollout):
    """Of 32, samples 5 and 9, which are the completions 1/1 and 2/1, hold each other's routes."""

    def swapped(every: list[Ids]) -> list[Ids]:
        changed = list(every)
        changed[5], changed[9] = every[9], every[5]
        return changed

    found = rollout.judged(rollout.with_routes(swapped))
    said = sorted(found.conclusion.causes)
    assert [line.split(" (")[0] for line in said] == ["sample 1/1", "sample 2/1"]
    assert "swapped samples: its routes are in sample 2/1;" in said[0]
    assert "swapped samples: its routes are in sample 1/1;" in said[1]
    causes = {each["sample"]: each["cause"] for each in plain_report(found)["routes"]["misaligned"]}
    assert "in sample 2/1;" in causes[5]
    assert "in sample 1/1;" in causes[9]


def test_a_clean_summary_and_a_fault_of_all_samples_name_their_sample(rollout):
    clean = rollout.diagnosed()
    closest = clean.names[clean.routes.margin_sample]
    assert f"; sample {closest} came closest, " in clean.routes.summary(clean.names)
    late = rollout.judged(rollout.with_routes(one_row_late)).conclusion
    said = re.findall(r"in sample (\S+):", " ".join(late.causes))
    assert said
    assert set(said) <= set(clean.names)


def test_f8_log_probabilities_one_token_late_are_named_in_all_and_in_one(rollout):
    def late(logprobs: np.ndarray) -> np.ndarray:
        return np.roll(logprobs, 1)

    found = rollout.diagnosed(rollout.with_logprobs(late)).conclusion
    assert (found.cause, found.defects) == (Cause.MISALIGNMENT, ("F8",))
    assert "token shift +1 of log-probabilities" in found.causes[0]
    found = rollout.diagnosed(rollout.with_logprobs(late, only=ONE)).conclusion
    assert (found.cause, found.defects) == (Cause.MISALIGNMENT, ("F8",))
    assert len(found.causes) == 1
    assert found.causes[0].startswith(f"sample {NAME}: token shift +1")


def test_clean_float32_on_both_sides_is_no_gap(rollout):
    found = rollout.diagnosed(fine=True)
    assert found.conclusion.cause is Cause.NONE
    assert found.flips.flip_frac == 0
    assert found.rows.coverage == 1


def test_clean_float32_engine_and_bfloat16_trainer_is_routing(rollout):
    found = rollout.diagnosed()
    assert found.conclusion.cause is Cause.ROUTING
    assert 0.5 < found.removed.low < found.removed.value < found.removed.high <= 1
    assert 0 < found.flips.flip_frac < 0.2
    assert found.conclusion.causes == ()


def test_other_weights_are_not_taken_for_misaligned_routes(rollout, rollout_of_other_weights):
    found = rollout.diagnosed(rollout_of_other_weights)
    assert found.conclusion.cause is Cause.WEIGHTS


def test_rows_without_routes_are_said_and_limit_the_verdict(rollout):
    def second_half_lost(every: list[Ids]) -> list[Ids]:
        return [np.where(np.arange(len(i))[:, None, None] < len(i) // 2, i, -1) for i in every]

    found = rollout.diagnosed(rollout.with_routes(second_half_lost))
    lost, total = found.rows.unrecorded, found.rows.compared + found.rows.unrecorded
    assert 0.4 < lost / total < 0.6
    assert f"{lost} of {total} rows came without a route" in found.conclusion.limits[0]
    assert found.conclusion.cause is not Cause.MISALIGNMENT


def test_without_routes_the_cause_of_a_gap_is_unknown(rollout):
    def none(every: list[Ids]) -> list[Ids]:
        return [np.full_like(ids, -1) for ids in every]

    found = rollout.diagnosed(rollout.with_routes(none))
    assert found.conclusion.cause is Cause.UNKNOWN
    assert found.conclusion.limits == ("No row came with a route: nothing is said about routes.",)
