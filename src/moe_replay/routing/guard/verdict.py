"""What the guard says: which samples, servers, ranks and layers are misaligned, and how sure that is.

In: nothing. Out: `Owner`, `SecondLook`, `Finding`, `Fault`, `Verdict`, and their words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64
    from numpy import ndarray

_SHOWN = 4  # findings of a kind that a message spells out


class Status(StrEnum):
    """What becomes of a sample."""

    MISALIGNED = "misaligned"
    """Its routes do not belong to its tokens."""
    SUSPECT = "suspect"
    """It looks wrong, and drift could still be why: look again."""
    LOST = "lost"
    """Its routes carry no information about its live ones, and nothing is wrong with them: drift. Drop it, and count it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Where a sample came from."""

    server: str | None = None
    """The server, or engine, that sampled it; None when there is one."""
    policy_version: int | None = None
    """Weight pushes before it was sampled."""
    prompt: int | None = None
    """Number of its prompt, for the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondLook:
    """What a closer look at a suspect found."""

    place: str | None = None
    """Where its right routes lie, in words; None when no place was found."""
    cause: str | None = None
    """What is wrong, in words, where no place was found; None when nothing is to be said."""
    nats: float = 0.0
    """How surely they lie there, less what the number of places that were tried makes likely."""
    rho: float | None = None
    """ln(k3 under replay / k3 with live routing); None when it was not scored. Wrong routes raise the first only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One sample that does not look right."""

    sample: int
    """Its number."""
    status: Status
    """What becomes of it."""
    test: str
    """The test that speaks most clearly, such as ``paired window``."""
    nats: float
    """Its strength: minus the logarithm of the chance that a healthy sample shows as much."""
    threshold: float
    """Nats at which the test alone suffices."""
    cause: str
    """What is wrong, in words."""
    layer: int | None
    """The layer that the sign was found in; None for all."""
    first: int
    """Position of the first row of the sign."""
    last: int
    """Position of its last row."""
    agreement: float
    """Share of the sample's slots on which live and replayed routes agree."""
    owner: Owner
    """Where it came from."""
    gap_nats: float = 0.0
    """How unusual its gap to the engine's log-probabilities is; 0 when usual or not given."""
    rho: float | None = None
    """ln(k3 under replay / k3 with live routing), if it was scored twice."""

    def __str__(self) -> str:
        """Return one line with everything that helps to find the cause."""
        owner = self.owner
        of = [f"prompt {owner.prompt}"] * (owner.prompt is not None)
        of += [f"server {owner.server}"] * (owner.server is not None)
        of += [f"policy version {owner.policy_version}"] * (owner.policy_version is not None)
        layer = f"layer {self.layer}, " if self.layer is not None else ""
        rho = f", rho {self.rho:.1f}" if self.rho is not None else ""
        gap = f", engine gap {self.gap_nats:.0f} nats" if self.gap_nats > 3 else ""
        return (
            f"sample {self.sample}{' (' + ', '.join(of) + ')' if of else ''}, {layer}positions {self.first}..{self.last}: "
            f"{self.cause} ({self.test} {self.nats:.0f} nats of {self.threshold:.0f}{gap}{rho}; the sample agrees on "
            f"{self.agreement:.0%} of its slots)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A group of samples, or all of them, that does not look right."""

    kind: str
    """``step``, ``layer``, ``rank`` or ``server``."""
    name: str
    """Which one; empty for the step."""
    cause: str
    """What is wrong, in words."""
    nats: float
    """Strength of the sign."""
    threshold: float
    """Nats at which it suffices."""
    samples: tuple[int, ...] = ()
    """Its samples; empty for those of the whole step."""
    may_be_drift: bool = False
    """Whether drift could be why: the routes have lost their information, and nothing says that they belong elsewhere."""

    def __str__(self) -> str:
        """Return one line."""
        name = f" {self.name}" if self.name else ""
        return f"{self.kind}{name}: {self.cause} ({self.nats:.0f} nats of {self.threshold:.0f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What later steps remember of a step that was accepted; plain numbers, so that a checkpoint can hold them."""

    num_samples: int
    """Samples that the medians were taken over."""
    information: float
    """Share of the information that the median sample kept, over all layers."""
    kappa: dict[str, float]
    """The same by layer; keys are global decoder indices as text, as JSON has them."""
    kept: float
    """Information of the sample at the lower decile, over that of the median one."""
    window_kept: float
    """The same of windows of 8 rows."""
    effects: tuple[tuple[float, float], ...]
    """Slots that act as one: of ``own`` and of each place, for all layers together and for a single layer."""
    repeats: tuple[int, int, int]
    """Rows, rows that repeat the row before, and those of them after which the next one repeats."""
    stray: tuple[int, int, float, float]
    """Stray rows and rows of the clean samples; mean and variance of stray rows over samples."""

    def to_plain(self) -> dict[str, Any]:
        """Return the record as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> StepRecord:
        """Return the record that `to_plain` gave, read back from JSON."""
        count, rows, mean, variance = plain["stray"]
        rows_before, equal, again = map(int, plain["repeats"])
        return cls(
            num_samples=int(plain["num_samples"]),
            information=float(plain["information"]),
            kappa={str(layer): float(value) for layer, value in plain["kappa"].items()},
            kept=float(plain["kept"]),
            window_kept=float(plain["window_kept"]),
            effects=tuple((float(a), float(b)) for a, b in plain["effects"]),
            repeats=(rows_before, equal, again),
            stray=(int(count), int(rows), float(mean), float(variance)),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verdict:
    """The guard's answer about one step."""

    findings: tuple[Finding, ...]
    """Samples that do not look right, the surest first."""
    faults: tuple[Fault, ...]
    """Servers, ranks, layers, or the whole step."""
    sample_ids: Int64[ndarray, " samples"]
    """``[samples]``, increasing."""
    agreement: Float64[ndarray, " samples"]
    """``[samples]``, share of the slots on which live and replayed routes agree."""
    margin_nats: float
    """How near the nearest sample came to the threshold of its test; negative in a healthy step."""
    margin_sample: int
    """That sample."""
    record: StepRecord
    """What later steps remember of this one, once it is accepted."""
    sums: dict[str, dict[str, float]]
    """Signs added up over steps, by server."""

    @property
    def misaligned(self) -> tuple[Finding, ...]:
        """The samples whose routes do not belong to them."""
        return self._with(Status.MISALIGNED)

    @property
    def suspects(self) -> tuple[Finding, ...]:
        """The samples that need a second look."""
        return self._with(Status.SUSPECT)

    @property
    def lost(self) -> tuple[Finding, ...]:
        """The samples that lost their routes to drift."""
        return self._with(Status.LOST)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is misaligned, neither a sample nor a group."""
        return not self.misaligned and not self.faults

    def _with(self, status: Status) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.status is status)

    def summary(self) -> str:
        """Return the verdict in words, one line for each group and sample that does not look right."""
        rows = [str(fault) for fault in self.faults]
        for status in Status:
            found = self._with(status)
            rows += _lines(found, status)
        if rows:
            return "\n".join(rows)
        return (
            f"{len(self.sample_ids)} samples, none misaligned: they agree on {self.agreement.mean():.1%} of their slots, the "
            f"least of them on {self.agreement.min():.1%}; sample {self.margin_sample} came nearest, "
            f"{-self.margin_nats:.0f} nats below its threshold"
        )

    def message(self, where: str) -> str:
        """Return what an error says: what was found, in which samples, and what to do."""
        bad = len(self.misaligned)
        what = (
            f"the routes of {bad} of {len(self.sample_ids)} samples do not belong to their tokens"
        )
        if not bad:
            what = f"the routes of {', '.join(f'{f.kind} {f.name}'.strip() for f in self.faults)} are misaligned"
        return (
            f"{where}: {what}; expected routes that fit their own rows best.\n{self.summary()}\nFix where the routes are "
            "captured, transported or laid out in the batch; training through them would train the wrong experts"
        )


def _lines(found: Sequence[Finding], status: Status) -> list[str]:
    lines = [f"{status}: {finding}" for finding in found[:_SHOWN]]
    if len(found) > _SHOWN:
        numbers = ", ".join(str(finding.sample) for finding in found[_SHOWN : _SHOWN + 40])
        more = ", ..." if len(found) > _SHOWN + 40 else ""
        lines.append(f"{status} too: {len(found) - _SHOWN} samples ({numbers}{more})")
    return lines
