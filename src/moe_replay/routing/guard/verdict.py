"""The guard's answer: which samples, servers, ranks and layers are misaligned, how surely."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64
    from numpy import ndarray

_SHOWN = 4  # findings of a kind that a message spells out


class Status(StrEnum):
    """The judgement of a sample."""

    MISALIGNED = "misaligned"
    """Its routes do not belong to its tokens."""
    SUSPECT = "suspect"
    """It looks wrong, but drift could explain it: look again."""
    LOST = "lost"
    """Its routes carry no information about the live ones because of drift. Drop it, and count
    it."""


SERVERS_JOINED_BY = " and "
"""Between the names of servers that sampled turns of one conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Where a sample came from."""

    server: str | None = None
    """The server or engine that sampled it, or all that sampled turns of it; None if there is only
    one."""
    policy_version: int | None = None
    """Weight pushes before it was sampled."""
    prompt: int | None = None
    """Index of its prompt, for messages."""

    @property
    def servers(self) -> tuple[str, ...]:
        """Each server that sampled of it: one with a fault has it in all its conversations."""
        return tuple(self.server.split(SERVERS_JOINED_BY)) if self.server else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondLook:
    """What a closer look at a suspect found."""

    place: str | None = None
    """Where its right routes are, in words; None if no place was found."""
    cause: str | None = None
    """What is wrong, in words, if no place was found; None if nothing is known."""
    nats: float = 0.0
    """Evidence for that place, minus the logarithm of the number of places tried."""
    rho: float | None = None
    """ln(k3 under replay / k3 with live routing); None if not scored.

    Wrong routes raise only the first.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One sample that looks wrong."""

    sample: int
    """Its id."""
    status: Status
    """Its judgement."""
    test: str
    """The test with the strongest sign, such as ``paired window``."""
    nats: float
    """Strength: minus the logarithm of the probability in a healthy sample."""
    threshold: float
    """Nats at which the test alone suffices."""
    cause: str
    """What is wrong, in words."""
    layer: int | None
    """The layer of the sign; None for all layers."""
    first: int
    """Position of the first row of the sign."""
    last: int
    """Position of its last row."""
    agreement: float
    """Share of the sample's slots on which live and replayed routes agree."""
    owner: Owner
    """Where it came from."""
    gap_nats: float = 0.0
    """How unusual its gap to the engine's log-probabilities is; 0 if usual or unknown."""
    rho: float | None = None
    """ln(k3 under replay / k3 with live routing), if it was scored twice."""

    def __str__(self) -> str:
        """Return one line with everything that helps find the cause."""
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
    """A group of samples, or the step, that looks wrong."""

    kind: str
    """``step``, ``layer``, ``rank`` or ``server``."""
    name: str
    """Its name; empty for the step."""
    cause: str
    """What is wrong, in words."""
    nats: float
    """Strength of the sign."""
    threshold: float
    """Nats at which it suffices."""
    samples: tuple[int, ...] = ()
    """Its samples; empty for the step."""
    may_be_drift: bool = False
    """Whether drift could explain it: the routes lost their information, but fit no other place
    better."""

    def __str__(self) -> str:
        """Return one line."""
        name = f" {self.name}" if self.name else ""
        return f"{self.kind}{name}: {self.cause} ({self.nats:.0f} nats of {self.threshold:.0f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What later steps remember of an accepted step; plain numbers, for checkpoints."""

    num_samples: int
    """Number of samples in the medians."""
    information: float
    """Share of the information that the median sample keeps, over all layers."""
    kappa: dict[str, float]
    """The same by layer; keys are global decoder indices as strings, for JSON."""
    kept: float
    """Information of the sample at the lower decile, relative to the median sample."""
    window_kept: float
    """The same for windows of 8 rows."""
    effects: tuple[tuple[float, float], ...]
    """Slots that act as one, for ``own`` and each place: over all layers, and in a single layer."""
    repeats: tuple[int, int, int]
    """Rows, rows that repeat the row before, and those of them after which the next one repeats."""
    stray: tuple[int, int, float, float]
    """Stray rows and rows of the clean samples; mean and variance of stray rows over samples."""

    def to_plain(self) -> dict[str, Any]:
        """Return the record as plain JSON."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> StepRecord:
        """Return the record from `to_plain`, read back from JSON."""
        count, rows, mean, variance = plain["stray"]
        num_rows, equal, again = map(int, plain["repeats"])
        return cls(
            num_samples=int(plain["num_samples"]),
            information=float(plain["information"]),
            kappa={str(layer): float(value) for layer, value in plain["kappa"].items()},
            kept=float(plain["kept"]),
            window_kept=float(plain["window_kept"]),
            effects=tuple((float(a), float(b)) for a, b in plain["effects"]),
            repeats=(num_rows, equal, again),
            stray=(int(count), int(rows), float(mean), float(variance)),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verdict:
    """The guard's answer about one step."""

    findings: tuple[Finding, ...]
    """Samples that look wrong, most certain first."""
    faults: tuple[Fault, ...]
    """Servers, ranks, layers, or the step, that look wrong."""
    sample_ids: Int64[ndarray, " samples"]
    """``[samples]``, increasing."""
    agreement: Float64[ndarray, " samples"]
    """``[samples]``, share of the slots on which live and replayed routes agree."""
    margin_nats: float
    """Distance of the nearest sample above its threshold; negative in a healthy step."""
    margin_sample: int
    """That sample."""
    record: StepRecord
    """What later steps remember of this one once it is accepted."""
    sums: dict[str, dict[str, float]]
    """Signs summed over steps, by server."""

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
        """The samples whose routes were lost to drift."""
        return self._with(Status.LOST)

    @property
    def is_clean(self) -> bool:
        """Whether no sample and no group is misaligned."""
        return not self.misaligned and not self.faults

    def without(self, drifted: Collection[tuple[str, str]]) -> Verdict:
        """Return it without the faults that drift explains, of groups named by kind and name."""
        faults = (f for f in self.faults if not f.may_be_drift or (f.kind, f.name) not in drifted)
        return replace(self, faults=tuple(faults))

    def _with(self, status: Status) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.status is status)

    def summary(self, names: Sequence[str] | None = None) -> str:
        """Describe the verdict, one line for each group and sample that looks wrong.

        ``names`` are those of the samples, by id; without them their ids are said.
        """
        rows = [str(fault) for fault in self.faults]
        for status in Status:
            rows += _lines(self._with(status), status, names)
        text = "\n".join(rows) or (
            f"{len(self.sample_ids)} samples, none misaligned: they agree on {self.agreement.mean():.1%} of their slots, the "
            f"lowest on {self.agreement.min():.1%}; sample {self.margin_sample} came closest, "
            f"{-self.margin_nats:.0f} nats below its threshold"
        )
        return text if names is None else with_names(text, names)

    def message(self, where: str) -> str:
        """Return an error message: what was found, in which samples, and what to do."""
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


def with_names(text: str, names: Sequence[str]) -> str:
    """Return a sentence of the guard with each "sample N" called by its name, ``names[N]``.

    Examples:
        >>> with_names("sample 2: its routes are in sample 0", ["a", "b", "c"])
        'sample c: its routes are in sample a'
    """
    # "paired sample 17 nats" is the strength of a test.
    found = r"\bsample (\d+)\b(?! nats)"
    return re.sub(found, lambda each: f"sample {names[int(each[1])]}", text)


def _lines(found: Sequence[Finding], status: Status, names: Sequence[str] | None) -> list[str]:
    lines = [f"{status}: {finding}" for finding in found[:_SHOWN]]
    if len(found) > _SHOWN:
        others = [finding.sample for finding in found[_SHOWN : _SHOWN + 40]]
        numbers = ", ".join(str(each) if names is None else names[each] for each in others)
        more = ", ..." if len(found) > _SHOWN + 40 else ""
        lines.append(f"{status} too: {len(found) - _SHOWN} samples ({numbers}{more})")
    return lines
