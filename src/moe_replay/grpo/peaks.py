"""DevicePeaks: the highest memory that each phase of a step has taken on this rank's GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

Phase = Literal["rollout", "update"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """Something that knows the highest memory since it was last reset."""

    peak_bytes: Callable[[], int]
    """Highest bytes since the last reset."""
    reset: Callable[[], None]
    """Begins again at what is held now."""


class DevicePeaks:
    """Peaks of the phases of a step; a step spends its time in one phase or the other.

    Nothing is measured where there is no meter: on a CPU torch counts no peak.
    """

    def __init__(self, meter: Meter | None) -> None:
        """Begin in the phase ``update``, with loading and the start of the engine."""
        self._meter = meter
        self._phase: Phase = "update"
        self._bytes: dict[str, int] = {}

    @property
    def measures(self) -> bool:
        """Whether anything is measured on this device."""
        return self._meter is not None

    @classmethod
    def of(cls, device: torch.device) -> DevicePeaks:
        """Return peaks of torch's allocator on a CUDA device, and silent ones elsewhere."""
        if device.type != "cuda":
            return cls(None)
        return cls(
            Meter(
                peak_bytes=partial(torch.cuda.max_memory_allocated, device),
                reset=partial(torch.cuda.reset_peak_memory_stats, device),
            )
        )

    def enter(self, phase: Phase, *, held_bytes: int = 0) -> None:
        """Begin ``phase``; the trainer itself holds ``held_bytes`` in a rollout."""
        if self._meter is None:
            return
        self._note(f"{self._phase}_peak_bytes", self._meter.peak_bytes())
        self._meter.reset()
        self._phase = phase
        if phase == "rollout":
            self._note("rollout_held_bytes", held_bytes)

    def take(self) -> Mapping[str, int]:
        """Return what was measured since the last call, and begin again."""
        if self._meter is None:
            return {}
        self.enter(self._phase)
        taken, self._bytes = self._bytes, {}
        return taken

    def _note(self, name: str, size: int) -> None:
        self._bytes[name] = max(size, self._bytes.get(name, 0))
