"""Peaks of the phases of a step, from a meter that counts by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_replay.grpo.memory import DevicePeaks, Meter


@dataclass
class Allocator:
    """Counts as torch's allocator does."""

    held: int = 0
    peak: int = 0

    def take(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)

    def reset(self) -> None:
        self.peak = self.held


def test_each_phase_has_a_peak_of_its_own() -> None:
    allocator = Allocator()
    peaks = DevicePeaks(Meter(peak_bytes=lambda: allocator.peak, reset=allocator.reset))
    for _ in range(2):
        # The trainer gives back 60 of 100, the engine takes 30 and returns them.
        allocator.take(100 - allocator.held)
        allocator.take(-60)
        peaks.enter("rollout", held_bytes=40)
        allocator.take(30)
        allocator.take(-30)
        peaks.enter("update")
        allocator.take(80)
        allocator.take(-20)
        assert peaks.take() == {
            "update_peak_bytes": 120,
            "rollout_held_bytes": 40,
            "rollout_peak_bytes": 70,
        }


def test_a_cpu_measures_nothing() -> None:
    peaks = DevicePeaks.of(torch.device("cpu"))
    peaks.enter("rollout", held_bytes=7)
    assert not peaks.measures
    assert peaks.take() == {}
