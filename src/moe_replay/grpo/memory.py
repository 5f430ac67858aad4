"""The device that trainer and engine may share: what is given back, and what each phase takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from moe_replay.errors import UpdateError
from moe_replay.megatron.ranks.messages import HostGroup
from moe_replay.megatron.scorer import MegatronScorer

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

    Nothing is measured on a CPU, where torch counts no peak.
    """

    def __init__(self, meter: Meter | None) -> None:
        """Begin in the phase ``update``, with loading and the start of the engine."""
        self._meter = meter
        self._phase: Phase = "update"
        self._bytes: dict[str, int] = {}

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

    @property
    def measures(self) -> bool:
        """Whether anything is measured on this device."""
        return self._meter is not None

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


class SharedDevice:
    """This rank's device, on which the trainer's models make room while the engine samples."""

    def __init__(
        self,
        models: Sequence[MegatronScorer],
        *,
        ranks: HostGroup,
        makes_room: bool,
        overlaps: bool,
    ) -> None:
        """Share the device of ``models``, of which the policy is the first, on all ``ranks``.

        ``makes_room`` says whether they give anything back, ``overlaps`` that they compute while
        the engine samples: nothing is then given back, and a step has no phases.
        """
        self._models, self._ranks = models, ranks
        self._makes_room = makes_room and not overlaps
        self._overlaps = overlaps
        self._peaks = DevicePeaks.of(models[0].device)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Give the engine the trainer's memory for the time of the block; collective at its start.

        What was given back stays away after it, until a pass, a checkpoint or an export needs it.
        """
        if self._overlaps:
            yield
            return
        self.make_room()
        # The sum walks all parameters.
        measured = self._models if self._peaks.measures else ()
        held = sum(model.memory.held_bytes() for model in measured)
        self._peaks.enter("rollout", held_bytes=held)
        try:
            yield
        finally:
            self._peaks.enter("update")

    def make_room(self, *, for_push: bool = False) -> None:
        """Give back what ``megatron.offload_during_rollout`` names; collective.

        ``for_push`` keeps the weights of the policy, which are about to be read.

        Raises:
            UpdateError: on every rank, when the host of one has no memory for a copy.
        """
        if not self._makes_room:
            return
        failure = None
        try:
            for number, model in enumerate(self._models):
                model.memory.give_back(but=("weights",) if for_push and number == 0 else ())
        except UpdateError as error:
            failure = error
        self._ranks.raise_together(failure)

    def metrics(self) -> dict[str, float]:
        """Return the peaks since the last call, of the rank with the highest; collective.

        Empty on a CPU, and where rollouts overlap updates.
        """
        if self._overlaps or not self._peaks.measures:
            return {}
        parts = self._ranks.gather(dict(self._peaks.take()))
        names = sorted({name for part in parts for name in part})
        return {f"memory/{name}": float(max(p.get(name, 0) for p in parts)) for name in names}
