"""The diagnosis: everything measured about a rollout, and what it says.

Sequences stream by: of each, sums and counts are kept, and its routes in a temporary file.

In: Measured sequences. Out: Diagnosis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from moe_replay.diagnose.belonging import BelongingTests, Misplaced
from moe_replay.diagnose.measured import Measured, Setting
from moe_replay.diagnose.routes import RouteJudge, RowsSeen
from moe_replay.diagnose.statistics import NUM_RESAMPLES, Estimate, Margins, TokenSums
from moe_replay.diagnose.verdict import Conclusion, Evidence, conclude
from moe_replay.grpo.metrics import EXTREME_TAUS, gap_of_tokens
from moe_replay.routing import RoutingTrace, TraceComparison, compare_traces, flipped
from moe_replay.routing.guard import Verdict, with_names

_KEPT = ("kl", "k3_kl", *(f"extreme_frac_tau_{tau:g}" for tau in EXTREME_TAUS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """How far a trainer's probabilities of the sampled tokens are from the engine's."""

    num_tokens: int
    """Sampled tokens that it is a mean over."""
    k1: Estimate
    """Mean of log(engine / trainer), in nats: KL(engine || trainer) without bias, but noisy."""
    k3: Estimate
    """Mean of r - 1 - log r with r = trainer / engine: the same with less noise."""
    beyond: Mapping[float, Estimate]
    """tau -> F(tau), share of the tokens with max(r, 1/r) > tau."""
    kl: Estimate | None
    """Mean KL(engine || trainer) over all words; None where the engine gives no distributions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginSummary:
    """How close the trainer's runners-up were."""

    median_flipped: float
    """Median margin of flips, in the router's own scores; nan without flips."""
    median_kept: float
    """Median margin where both chose the same experts."""
    near_ties_frac: float
    """Share of the flips whose margin is among the smallest tenth of all."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Diagnosis:
    """What `diagnose` found."""

    setting: Setting
    """What was compared."""
    num_sequences: int
    """Sequences measured."""
    num_tokens: int
    """Sampled tokens with a log-probability on both sides."""
    seed: int
    """Seed of the bootstrap."""
    live: Gap | None
    """The gap with the trainer's own routes; None without the engine's log-probabilities."""
    replayed: Gap | None
    """The gap under the engine's routes, over the sequences that have some."""
    removed: Estimate | None
    """Share of the gap (k3) that replay removes, over the same tokens; None without replay."""
    removed_kl: Estimate | None
    """Share of the exact KL that replay removes."""
    engine_again: Estimate | None
    """Mean k3 between decoding and one pass of the engine's own model: the noise of the exact KL's
    engine side. None without exact KL."""
    flips: TraceComparison | None
    """The engine's routes beside the trainer's own choice; None without routes."""
    margins: MarginSummary | None
    """Margins of the trainer's choice; None where they are not known."""
    rows: RowsSeen
    """How many rows the verdict on routes is about."""
    names: tuple[str, ...]
    """Names of the sequences, in order; a finding's sample is an index of these."""
    compared: tuple[str, ...]
    """Names of those in ``flips``, in its order."""
    routes: Verdict | None
    """The guard's verdict on the routes; None where no row could be compared."""
    everywhere: str
    """What explains the routes of many samples together, in words; empty where nothing does."""
    misplaced: tuple[Misplaced, ...]
    """Log-probabilities that belong to other tokens or another temperature."""
    largest: tuple[tuple[str, float], ...]
    """Sequences with the largest mean k3 with live routes, and that."""
    twin: Diagnosis | None
    """The same of a dense model at the same number formats: the floor without routing; None where
    none was given."""
    conclusion: Conclusion
    """What it means, and what to do next."""


class _Tally:
    """Sums over the sequences seen so far."""

    def __init__(self, judge: RouteJudge) -> None:
        self.live, self.paired = TokenSums(), TokenSums()
        self.live_kl, self.paired_kl = TokenSums(), TokenSums()
        self.again = TokenSums()
        self.margins, self.has_margins = Margins(), False
        self.judge, self.belonging = judge, BelongingTests()
        self.compared: list[str] = []
        self.k3: dict[str, float] = {}
        self.gaps: dict[int, float] = {}
        self.rhos: dict[int, float] = {}

    def routes(self, measured: Iterable[Measured]) -> Iterator[tuple[RoutingTrace, RoutingTrace]]:
        """Take each sequence, and yield the engine's and the trainer's routes where both exist."""
        for each in measured:
            self._add_gap(each)
            self.belonging.add(each)
            self.judge.add(each)
            if each.recorded is None or each.live is None:
                continue
            if each.margins is not None:
                flips, held = flipped(each.recorded, each.live)
                self.margins.add(each.margins[held], flips[held])
                self.has_margins = True
            self.compared.append(each.name)
            yield each.recorded, each.live

    def _add_gap(self, each: Measured) -> None:
        if each.rollout_logprobs is None or each.live_logprobs is None:
            return
        live = _gap(each.live_logprobs, each.rollout_logprobs)
        self.live.add(live)
        if len(each.live_logprobs):
            self.k3[each.name] = float(live["k3_kl"].mean())
        if each.live_kl is not None:
            self.live_kl.add({"kl": each.live_kl})
        if each.engine_again is not None:
            k3 = gap_of_tokens(each.engine_again.astype(np.float64))["k3_kl"]
            self.again.add({"k3": k3})
        if each.replayed_logprobs is None:
            return
        replayed = _gap(each.replayed_logprobs, each.rollout_logprobs)
        names = {f"replayed/{name}": values for name, values in replayed.items()}
        self.paired.add({"live/k3_kl": live["k3_kl"], **names})
        if each.live_kl is not None and each.replayed_kl is not None:
            self.paired_kl.add({"live": each.live_kl, "replayed": each.replayed_kl})
        if len(each.live_logprobs):
            number, floor = len(self.judge.names), 1e-12
            after, before = float(replayed["k3_kl"].mean()), float(live["k3_kl"].mean())
            self.gaps[number] = max(after, 0.0)
            self.rhos[number] = math.log(max(after, floor) / max(before, floor))


def diagnose(
    measured: Iterable[Measured],
    setting: Setting,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    twin: Diagnosis | None = None,
) -> Diagnosis:
    """Say where the gap between an engine and a trainer comes from.

    One sequence at a time is held. Intervals are bootstrap intervals over sequences, drawn by
    ``seed``. ``twin`` is the diagnosis of a dense model at the same number formats.

    Examples:
        >>> found = diagnose(measured, setting)
        >>> print(found.conclusion.text)

    Raises:
        TraceError: when recorded and live routes are not of one model.
        TokenMismatchError: when they are bound to different tokens.
    """
    with closing(RouteJudge()) as judge:
        found = _measured(_Tally(judge), measured, setting, seed, num_resamples, twin)
    return replace(found, conclusion=conclude(_evidence(found)))


def _measured(
    tally: _Tally,
    measured: Iterable[Measured],
    setting: Setting,
    seed: int,
    num_resamples: int,
    twin: Diagnosis | None,
) -> Diagnosis:
    """Return the figures and findings, without a conclusion yet."""
    pairs = tally.routes(measured)
    first = next(pairs, None)
    flips = None if first is None else compare_traces(chain([first], pairs))
    names = tuple(tally.judge.names)
    routes, everywhere = tally.judge.verdict(gaps=tally.gaps, rhos=tally.rhos), ""
    if routes is not None:
        everywhere, routes = tally.judge.explained(routes)
        everywhere = with_names(everywhere, names)
    margins = None
    if tally.has_margins:
        margins = MarginSummary(
            median_flipped=tally.margins.median_flipped,
            median_kept=tally.margins.median_kept,
            near_ties_frac=tally.margins.near_ties_frac,
        )

    def means(sums: TokenSums) -> dict[str, Estimate]:
        return sums.means(seed=seed, num_resamples=num_resamples)

    def removed(sums: TokenSums, before: str, after: str) -> Estimate | None:
        if not sums.num_tokens:
            return None
        return sums.removed_share(before, after, seed=seed, num_resamples=num_resamples)

    live_kl, paired_kl = means(tally.live_kl), means(tally.paired_kl)
    return Diagnosis(
        setting=setting,
        num_sequences=len(names),
        num_tokens=tally.live.num_tokens,
        seed=seed,
        live=_gap_of(tally.live.num_tokens, means(tally.live), live_kl.get("kl")),
        replayed=_gap_of(
            tally.paired.num_tokens, means(tally.paired), paired_kl.get("replayed"), "replayed/"
        ),
        removed=removed(tally.paired, "live/k3_kl", "replayed/k3_kl"),
        removed_kl=removed(tally.paired_kl, "live", "replayed"),
        engine_again=means(tally.again).get("k3"),
        flips=flips,
        margins=margins,
        rows=tally.judge.rows,
        names=names,
        compared=tuple(tally.compared),
        routes=routes,
        everywhere=everywhere,
        misplaced=tally.belonging.misplaced(),
        largest=tuple(sorted(tally.k3.items(), key=lambda pair: -pair[1])[:5]),
        twin=twin,
        conclusion=Conclusion.pending(),
    )


def _gap(logprobs: np.ndarray, rollout_logprobs: np.ndarray) -> dict[str, np.ndarray]:
    values = gap_of_tokens(logprobs.astype(np.float64) - rollout_logprobs.astype(np.float64))
    return {name: values[name] for name in _KEPT}


def _gap_of(
    num_tokens: int, means: Mapping[str, Estimate], kl: Estimate | None, prefix: str = ""
) -> Gap | None:
    if not means:
        return None
    return Gap(
        num_tokens=num_tokens,
        k1=means[f"{prefix}kl"],
        k3=means[f"{prefix}k3_kl"],
        beyond={tau: means[f"{prefix}extreme_frac_tau_{tau:g}"] for tau in EXTREME_TAUS},
        kl=kl,
    )


def _evidence(found: Diagnosis) -> Evidence:
    """Return what the conclusion is drawn from."""
    verdict, gap = found.routes, found.live
    return Evidence(
        setting=found.setting,
        names=found.names,
        findings=() if verdict is None else verdict.misaligned,
        faults=() if verdict is None else verdict.faults,
        everywhere=found.everywhere,
        lost=() if verdict is None else verdict.lost,
        misplaced=found.misplaced,
        rows=found.rows,
        has_routers=found.flips is not None or found.rows.without_routes > 0,
        k3=None if gap is None else gap.k3.value,
        beyond_smallest=None if gap is None else gap.beyond[min(EXTREME_TAUS)].value,
        beyond_largest=None if gap is None else gap.beyond[max(EXTREME_TAUS)].value,
        # Over all words there is less noise than over the sampled ones.
        removed=found.removed_kl or found.removed,
        removed_of="the exact KL" if found.removed_kl else "the gap (k3)",
        flip_frac=None if found.flips is None else found.flips.flip_frac,
    )
