"""What is replayed, what runs live and why: modes, reasons, and the coverage of every run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import CoverageError, TraceError

if TYPE_CHECKING:
    from jaxtyping import Bool


class Routing(Enum):
    """How the routers of a pass choose experts."""

    LIVE = "live"
    """By the current weights."""
    RECORD = "record"
    """By the current weights, and the choice is kept."""
    REPLAY = "replay"
    """As the recorded routes say; rows without a route by the current weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """What the routers of each pass of a step do under one mode."""

    engine: Routing
    """While completions are sampled."""
    old: Routing
    """While the trainer computes old log-probabilities in a pass of their own, see
    `Recipe.why_old_pass`."""
    update: Routing
    """In the forward pass of the update; recomputation always repeats its own forward pass."""
    reference: Routing
    """In the pass of the reference model, with ``reference_routes = "replay"``; else it is live."""
    recorded_by: str
    """Where the routes come from, in the words of the README's table."""
    replayed_in: str
    """Where they are replayed, likewise."""


class ReplayMode(StrEnum):
    """Where the routes of a training step come from; the values of ``router_replay_mode``.

    Source: R2, GSPO, arXiv 2507.18071; R3, arXiv 2510.11370.
    """

    DISABLED = "disabled"
    """Every pass routes by its own weights."""
    R2 = "R2"
    """Routes are recorded in the trainer's old-logprob pass and replayed in the update."""
    R3 = "R3"
    """Routes are recorded by the engine while it samples and replayed in every trainer pass."""

    @property
    def passes(self) -> Passes:
        """The mode's row of `PASSES`."""
        return PASSES[self]

    @property
    def replays(self) -> bool:
        """Whether any pass of the trainer replays routes."""
        return self.passes.update is Routing.REPLAY


PASSES: Mapping[ReplayMode, Passes] = {
    ReplayMode.DISABLED: Passes(
        engine=Routing.LIVE,
        old=Routing.LIVE,
        update=Routing.LIVE,
        reference=Routing.LIVE,
        recorded_by="nowhere",
        replayed_in="nothing: every pass routes by its own weights",
    ),
    ReplayMode.R2: Passes(
        engine=Routing.LIVE,
        old=Routing.RECORD,
        update=Routing.REPLAY,
        reference=Routing.REPLAY,
        recorded_by="the trainer's old-logprob pass",
        replayed_in="the update",
    ),
    ReplayMode.R3: Passes(
        engine=Routing.RECORD,
        old=Routing.REPLAY,
        update=Routing.REPLAY,
        reference=Routing.REPLAY,
        recorded_by="the engine, while it samples",
        replayed_in="update, recomputation, and old-logprobs where they take a pass",
    ),
}
"""What a mode means; every station, `doctor` and the README's table read it here alone."""


class LiveReason(StrEnum):
    """Why a row is routed by the current weights although replay is on."""

    LAST_TOKEN = "last_token"
    """The token sampled last was never fed to the engine; nothing is predicted from its row."""
    PADDING = "padding"
    """The row holds no token."""
    PROMPT_OMITTED = "prompt_omitted"
    """The engine omitted the routes of prompt rows."""
    ENVIRONMENT_OMITTED = "environment_omitted"
    """The engine omitted the routes of tokens that an environment gave it between turns."""
    ENGINE_GAVE_NONE = "engine_gave_none"
    """The engine returned no route for a sampled token that it must have run."""


UNREPLAYABLE = frozenset({LiveReason.LAST_TOKEN, LiveReason.PADDING})
"""Reasons that no engine can avoid; rows with them do not count against coverage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Rows replayed, and rows live by reason. Sum coverages with `Coverage.total`."""

    num_replayed: int = 0
    """Rows whose experts were forced."""
    num_live: Mapping[LiveReason, int] = field(default_factory=dict)
    """Rows routed by the current weights, by reason; a reason that did not occur may be absent."""

    @property
    def fraction(self) -> float:
        """Replayed rows over rows that could have been; 1.0 when there were none."""
        missed = sum(n for reason, n in self.num_live.items() if reason not in UNREPLAYABLE)
        could = self.num_replayed + missed
        return self.num_replayed / could if could else 1.0

    @staticmethod
    def total(parts: Iterable[Coverage]) -> Coverage:
        """Add up coverages."""
        replayed = 0
        live = dict.fromkeys(LiveReason, 0)
        for part in parts:
            replayed += part.num_replayed
            for reason, count in part.num_live.items():
                live[reason] += count
        return Coverage(num_replayed=replayed, num_live=live)

    @classmethod
    def of_rows(
        cls,
        valid: Bool[np.ndarray, " tokens"],
        *,
        prompt_length: int,
        is_sampled: Bool[np.ndarray, " flags"] | None = None,
    ) -> Coverage:
        """Count the rows of one sample: those with a route, and the others by reason.

        ``is_sampled`` is False at tokens of an environment; None says that all after the prompt
        were sampled. Of a prompt of 2 and 3 sampled tokens with ``valid=[F, T, T, F, F]`` 2 rows
        are replayed, and one each is live for ``prompt_omitted``, ``engine_gave_none`` and
        ``last_token``.

        Raises:
            TraceError: when there are fewer rows than prompt tokens, or none, or flags and rows
                differ in count.
        """
        if not 0 <= prompt_length <= len(valid) > 0 or len(valid) != len(
            valid if is_sampled is None else is_sampled
        ):
            flags = "" if is_sampled is None else f" and {len(is_sampled)} is_sampled flags"
            raise TraceError(
                f"a prompt of {prompt_length} tokens in {len(valid)} rows{flags}; expected at least one row, a prompt no "
                "longer than the rows, and one flag a row"
            )
        missing = ~valid
        last = int(missing[-1])
        missing[-1] = False
        after = missing[prompt_length:]
        environment = 0 if is_sampled is None else int((after & ~is_sampled[prompt_length:]).sum())
        return cls(
            num_replayed=int(valid.sum()),
            num_live={
                LiveReason.LAST_TOKEN: last,
                LiveReason.PROMPT_OMITTED: int(missing[:prompt_length].sum()),
                LiveReason.ENVIRONMENT_OMITTED: environment,
                LiveReason.ENGINE_GAVE_NONE: int(after.sum()) - environment,
            },
        )

    def require(self, min_coverage: float) -> None:
        """Raise `CoverageError` when the share of replayed rows is below ``min_coverage``."""
        if self.fraction >= min_coverage:
            return
        reasons = ", ".join(f"{reason}: {n}" for reason, n in self.num_live.items() if n)
        raise CoverageError(
            f"coverage is {self.fraction:.4f} ({self.num_replayed} rows replayed; live rows {reasons}), "
            f"min_coverage is {min_coverage}; the engine did not return the routes of every row: make it return "
            "prompt and completion routes, or lower replay.min_coverage if live rows are acceptable"
        )
