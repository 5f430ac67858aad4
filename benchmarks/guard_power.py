"""Measure the shortest sample, and the smallest share of samples, that the guard finds.

Routes are drawn (`testing.drawn_steps`), a fault is planted in some samples of a step, and the
functions that training runs decide: `count_overlaps`, `summarise`, `Baseline`, `judge`,
`Guard.decide`, and the second look by places. No engine gap is given, which only adds to what is
seen. `--clean N` counts alarms in N steps without any fault. `--strewn ROWS` plants strewn rows in
ever more samples of a step at once, with and without clean steps before it.

Example:
    $ python benchmarks/guard_power.py --quick
    $ python benchmarks/guard_power.py --write docs/guard.md
    $ python benchmarks/guard_power.py --clean 10000 --only 8,2,4 64,6,6
    $ python benchmarks/guard_power.py --strewn 128 --only 64,6,6
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_replay.routing.guard.counts import OverlapCounts
from moe_replay.routing.guard.decision import Guard
from moe_replay.routing.guard.evidence import judge
from moe_replay.routing.guard.places import RouteRows, look_closer
from moe_replay.routing.guard.summary import summarise
from moe_replay.routing.guard.verdict import Verdict
from moe_replay.testing.drawn_steps import DrawnSteps, planted

SHAPES = {
    (8, 2, 4): 1024,
    (16, 8, 4): 1024,
    (32, 4, 6): 512,
    (64, 6, 6): 512,
    (128, 8, 12): 256,
    (256, 8, 12): 256,
    (288, 8, 46): 96,
    (512, 10, 48): 64,
}
"""(experts, topk, MoE layers) -> longest sample that is tried."""
LENGTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SHORT = 16
"""Rows of the samples whose smallest share is told."""
AGREEMENTS = (0.98, 0.92, 0.80)
SAMPLES, PLANTED = 128, 8
"""Samples of a step, and how many of them have the fault at a time: few, so that the medians stay
those of clean ones."""
FEWER = {"a tenth of the rows random": 4, "stale stretch": 4}
"""Faults that go into fewer, because what is usual of strewn and of repeated rows is not a median:
it has to stay that of a step with one or two wrong samples."""
DRAWS = 4
MAX_MISSES = 1
"""Of 512 planted samples, for a cell that says "found": the probability is above 0.99 with 95 %
confidence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What was found out about one cause in one shape."""

    shape: tuple[int, int, int]
    """Experts, topk, MoE layers."""
    agreement: float
    """Of the median sample."""
    cause: str
    """The fault."""
    rows: int | None
    """Shortest sample of which one is found with probability above 0.99; None up to the longest
    that was tried."""
    chances: Mapping[int, float]
    """Rows -> share of the planted samples that one step found, for every length that was tried."""

    def share(self) -> float | None:
        """Return the smallest share of samples of `SHORT` rows found with probability above 0.99.

        Samples are found independently: of m samples, each found with probability p, one is found
        with 1 - (1 - p)^m. At p = 0.3 that takes 13 of 128, a share of 10 %. None above 25 %, where
        the medians begin to move.
        """
        chance = self.chances.get(SHORT, 1.0)
        if self.rows is not None and self.rows <= SHORT:
            return 1 / SAMPLES
        if chance <= 0:
            return None
        number = max(1, math.ceil(math.log(0.01) / math.log(max(1 - chance, 1e-9))))
        return number / SAMPLES if number <= SAMPLES // 4 else None


CAUSES = {
    "one row late": "one token late",
    "one row early": "one token early",
    "two rows late": "two tokens late",
    "a quarter of the rows late": "a quarter of the sample late",
    "another sample of the prompt": "those of another sample of the prompt",
    "another prompt": "those of another prompt",
    "random": "random",
    "second half random": "the second half random",
    "last quarter one row late": "the last quarter one token late",
    "a tenth of the rows random": "a tenth of the rows random",
    "stale stretch": "an eighth of the rows (60 at most) repeat one row",
    "one layer one row late": "one layer one token late",
    "one layer its neighbour's": "one layer has its neighbour's",
    "one layer random": "one layer random",
    "layers rotated": "layers one further",
    "ids + 1": "ids off by one",
    "ids modulo 256": "ids modulo 256",
}
"""Name in `testing.drawn_steps.planted` -> what the table says."""


class Trial:
    """One shape at one agreement: its clean draws, and the faults planted in them."""

    def __init__(
        self, shape: tuple[int, int, int], agreement: float, *, draws: int, longest: int, seed: int
    ) -> None:
        self.shape, self._agreement, self._seed = shape, agreement, seed
        rng = np.random.default_rng([seed, *shape, int(1000 * agreement)])
        self._steps = steps_of(shape, num_rows=longest, num_samples=SAMPLES, agreement=agreement)
        heat = self._steps.heat(rng)
        dtype = np.uint8 if shape[0] <= 256 else np.uint16
        self._draws = [
            tuple(ids.astype(dtype) for ids in self._steps.draw(rng, heat)) for _ in range(draws)
        ]
        self._clean: dict[tuple[int, int], OverlapCounts] = {}

    def cell(self, cause: str, lengths: Sequence[int]) -> Cell:
        """Return the shortest of ``lengths`` at which every draw finds the fault."""
        chances: dict[int, float] = {}
        for length in lengths:
            found = tried = 0
            for number in range(len(self._draws)):
                for hits in self.found(cause, number, length):
                    found, tried = found + int(hits.sum()), tried + len(hits)
                    # The share of short samples needs the chance itself; elsewhere two misses say
                    # enough.
                    if tried - found > MAX_MISSES and length != SHORT:
                        break
                if tried - found > MAX_MISSES:
                    break
            chances[length] = found / tried
            if tried - found <= MAX_MISSES:
                return self._cell(cause, length, chances)
        return self._cell(cause, None, chances)

    def found(self, cause: str, number: int, length: int) -> Iterator[np.ndarray]:
        """Yield which wrong samples were found, until every sample of a draw has had the fault."""
        recorded, live = (ids[:, :length] for ids in self._draws[number])
        spoilt = self._spoilt(cause, recorded, np.random.default_rng([self._seed, number, length]))
        wrong = self._steps.count(spoilt, live)
        if (number, length) not in self._clean:
            self._clean = {(number, length): self._steps.count(recorded, live)}
        clean = self._clean[number, length]
        count = FEWER.get(cause, PLANTED)
        for first in range(0, SAMPLES, count):
            bad = np.arange(first, first + count)
            step = [taken(clean, np.setdiff1d(np.arange(SAMPLES), bad)), taken(wrong, bad)]
            near = np.concatenate([bad, (bad + count) % SAMPLES])
            replayed = np.concatenate([spoilt[bad], recorded[near[count:]]])
            rows = rows_of(replayed, live[near], near, self.shape[0])
            verdict = decided(Guard(), step, rows)
            yield np.isin(bad, [finding.sample for finding in verdict.misaligned])

    def _spoilt(self, cause: str, recorded: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the routes with the fault in every sample; 32 at a time, to limit memory."""
        parts = [
            planted(part, num_experts=self.shape[0], group=self._steps.group, rng=rng)[cause]()
            for part in np.split(recorded.astype(np.int64), SAMPLES // 32)
        ]
        return np.concatenate(parts).astype(recorded.dtype)

    def _cell(self, cause: str, rows: int | None, chances: Mapping[int, float]) -> Cell:
        return Cell(
            shape=self.shape, agreement=self._agreement, cause=cause, rows=rows, chances=chances
        )


def steps_of(shape: tuple[int, int, int], **how: Any) -> DrawnSteps:
    """Return a source of steps of a shape."""
    experts, topk, layers = shape
    return DrawnSteps(num_experts=experts, topk=topk, num_layers=layers, **how)


def taken(counts: OverlapCounts, entries: np.ndarray) -> OverlapCounts:
    """Return the counts of some samples: those of a microbatch that holds no others."""
    rows = np.isin(np.arange(len(counts.num_rows)).repeat(counts.num_rows), entries)
    changed = {}
    for each in fields(OverlapCounts):
        value = getattr(counts, each.name)
        if not isinstance(value, np.ndarray):
            continue
        if each.name in ("position", "own", "others", "flips", "repeats"):
            changed[each.name] = value[rows]
        elif each.name in ("nearer", "farther"):
            changed[each.name] = value[:, rows]
        elif value.ndim == 3:
            changed[each.name] = value[:, entries]
        else:
            changed[each.name] = value[entries]
    return replace(counts, **changed)


def rows_of(
    replayed: np.ndarray, live: np.ndarray, samples: np.ndarray, num_experts: int
) -> RouteRows:
    """Return the rows of a microbatch that holds these samples."""
    _, length, layers, topk = replayed.shape
    return RouteRows(
        expert_ids=replayed.reshape(-1, layers, topk),
        live_ids=live.reshape(-1, layers, topk),
        valid=np.ones(len(samples) * length, bool),
        sample=samples.repeat(length),
        position=np.tile(np.arange(length), len(samples)),
        layers=tuple(range(layers)),
        num_experts=num_experts,
    )


def decided(
    guard: Guard,
    step: Sequence[OverlapCounts],
    rows: RouteRows,
    gaps: Mapping[int, float] | None = None,
) -> Verdict:
    """Decide as training does: once, and once more after a second look at the suspects, by places.

    Without log-probabilities a strong sign suffices, whatever the look finds, so only the others
    are looked at.
    """
    baseline = guard.baseline([summarise(step)])
    evidence = [judge(counts, baseline) for counts in step]
    first = guard.decide(baseline, evidence, gaps=gaps)
    if not first.suspects:
        return first
    unseen = guard.decide(baseline, evidence, gaps=gaps, looks={})
    known = {finding.sample for finding in unseen.misaligned}
    weak = [finding for finding in first.suspects if finding.sample not in known]
    looks = look_closer(rows, weak, usual_information=baseline.record.information)
    return guard.decide(baseline, evidence, gaps=gaps, looks=looks)


def power(options: argparse.Namespace) -> Iterator[Cell]:
    """Yield every cell of the table."""
    for shape in options.only:
        longest = min(SHAPES.get(shape, 256), options.longest)
        lengths = [length for length in LENGTHS if length <= longest]
        for agreement in options.agreement:
            started = time.perf_counter()
            trial = Trial(shape, agreement, draws=options.draws, longest=longest, seed=options.seed)
            for cause in options.causes:
                if cause != "ids modulo 256" or shape[0] > 256:
                    yield trial.cell(cause, lengths)
            say(f"{shape} at {agreement}: {time.perf_counter() - started:.0f} s")


@dataclass(kw_only=True)
class CleanRuns:
    """What steps without a fault have shown."""

    steps: int = 0
    samples: int = 0
    alarms: int = 0
    asked: int = 0
    """Steps of which training asks, by scoring them live, whether it was drift: no alarm if it
    was."""
    lost: int = 0
    nearest: float = -math.inf
    told: list[str] = field(default_factory=list, repr=False)

    def take(self, verdict: Verdict, how: Mapping[str, Any]) -> None:
        """Count a step, and keep what was said of one that is not clean."""
        self.steps += 1
        self.samples += len(verdict.sample_ids)
        is_asked = not verdict.misaligned and all(fault.may_be_drift for fault in verdict.faults)
        self.alarms += not verdict.is_clean and not is_asked
        self.asked += not verdict.is_clean and is_asked
        self.lost += len(verdict.lost)
        self.nearest = max(self.nearest, verdict.margin_nats)
        if not verdict.is_clean:
            self.told.append(f"{how}: {verdict.summary()}")


HARD: tuple[dict[str, Any], ...] = (
    {},
    {"agreement": 0.98},
    {"agreement": 0.80},
    {"agreement": 0.65},
    {"spread": 0.35},
    {"agreement": 0.85, "spread": 0.6},
    {"agreement": 0.85, "memory": (0.9, 0.9)},
    {"topic": 2.1},
    {"popularity": 3.0},
    {"popularity": 8.0},
)
"""Drift as it comes: plain, little, much, eight mini-batches' worth, long-tailed twice; routers
whose tokens resemble one another, that keep to topics, that prefer few experts, that have
collapsed."""


def clean_steps(shape: tuple[int, int, int], steps: int, *, seed: int) -> CleanRuns:
    """Run steps without a fault, 25 in a run with one guard, and count what it says."""
    found = CleanRuns()
    rng = np.random.default_rng([seed, *shape])
    while found.steps < steps:
        how = HARD[(found.steps // 25) % len(HARD)]
        source = steps_of(shape, num_rows=int(rng.choice([16, 24, 40, 80])), **how)
        heat, guard = source.heat(rng), Guard()
        for _ in range(min(25, steps - found.steps)):
            recorded, live = source.draw(rng, heat)
            rows = rows_of(recorded, live, np.arange(len(live)), shape[0])
            verdict = decided(guard, [source.count(recorded, live)], rows, source.gaps(rng))
            found.take(verdict, how)
            if verdict.is_clean:
                guard.accept(verdict)
    return found


SHARES = (0.02, 0.05, 0.10, 0.20, 0.50)
"""Shares of a step's samples that have strewn wrong rows."""
MEMORIES = ("first step", "after 3 clean steps", "after 3 such steps")
"""What the guard has accepted before; such steps only as far as they passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strewn:
    """Results of steps in which some samples have random routes in a tenth of their rows."""

    share: float
    """Of the samples."""
    memory: str
    """One of `MEMORIES`."""
    found: float
    """Share of the wrong samples that were named."""
    passed: float
    """Share of the steps in which nothing was found at all."""
    wrongly: int
    """Samples without a fault that were named, over all steps."""


def strewn_shares(
    shape: tuple[int, int, int], rows: int, *, shares: Sequence[float], steps: int, seed: int
) -> Iterator[Strewn]:
    """Yield what is found of scattered wrong rows, for every share of samples and memory."""
    rng = np.random.default_rng([seed, *shape])
    source = steps_of(shape, num_rows=rows, num_samples=SAMPLES)
    heat = source.heat(rng)

    def step(share: float) -> tuple[OverlapCounts, RouteRows, np.ndarray]:
        recorded, live = source.draw(rng, heat)
        bad = rng.permutation(SAMPLES)[: round(share * SAMPLES)]
        made = planted(recorded, num_experts=shape[0], group=source.group, rng=rng)
        recorded[bad] = made["a tenth of the rows random"]()[bad]
        held = rows_of(recorded, live, np.arange(SAMPLES), shape[0])
        return source.count(recorded, live), held, bad

    for share in shares:
        guards = [Guard() for _ in MEMORIES]
        for guard, earlier in zip(guards, (None, 0.0, share), strict=True):
            for _ in range(0 if earlier is None else 3):
                counts, held, _ = step(earlier)
                verdict = decided(guard, [counts], held)
                if verdict.is_clean:
                    guard.accept(verdict)
        shown = [step(share) for _ in range(steps)]
        for memory, guard in zip(MEMORIES, guards, strict=True):
            found = passed = wrongly = wrong = 0
            for counts, held, bad in shown:
                verdict = decided(guard, [counts], held)
                named = np.array([finding.sample for finding in verdict.misaligned], np.int64)
                hits = int(np.isin(bad, named).sum())
                found, wrong, wrongly = found + hits, wrong + len(bad), wrongly + len(named) - hits
                passed += verdict.is_clean
            yield Strewn(
                share=share,
                memory=memory,
                found=found / wrong,
                passed=passed / steps,
                wrongly=wrongly,
            )


def table(cells: Sequence[Cell]) -> str:
    """Return the table as Markdown, one for each agreement."""
    order = list(SHAPES)
    found = dict.fromkeys(cell.shape for cell in cells)
    shapes = sorted(found, key=lambda s: order.index(s) if s in order else len(order))
    lines: list[str] = []
    for agreement in sorted({cell.agreement for cell in cells}, reverse=True):
        of = {(c.cause, c.shape): c for c in cells if c.agreement == agreement}
        lines += [
            "",
            f"Agreement {agreement:.2f}:",
            "",
            "| what is wrong | "
            + " | ".join("/".join(map(str, s[:2])) + f" x {s[2]}" for s in shapes)
            + " |",
            "|---|" + "---|" * len(shapes),
        ]
        for cause in [cause for cause in CAUSES if any(cause == known for known, _ in of)]:
            shown = [_shown(of.get((cause, shape))) for shape in shapes]
            lines.append(f"| {CAUSES[cause]} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    share = cell.share()
    if cell.rows is not None and cell.rows <= SHORT:
        return f"**{cell.rows}**"
    rows = "not found" if cell.rows is None else f"**{cell.rows}**"
    return f"{rows}, {'-' if share is None else f'{share:.0%}'}"


def loaded(path: Path) -> list[Cell]:
    """Return the cells that ``--cells`` has written, so that shapes can be measured apart."""
    return [
        Cell(
            shape=(told["shape"][0], told["shape"][1], told["shape"][2]),
            agreement=told["agreement"],
            cause=told["cause"],
            rows=told["rows"],
            chances={int(rows): chance for rows, chance in told["chances"].items()},
        )
        for told in json.loads(path.read_text())
    ]


def write_table(page: Path, text: str) -> None:
    """Put the table between the markers of a page."""
    begin, end = "<!-- guard-power: begin -->", "<!-- guard-power: end -->"
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n{text}\n\n{end}{rest.split(end)[1]}")


def say(text: str) -> None:
    """Print a line that is not a figure."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and print one JSON line a figure at the end."""
    options = _options()
    if options.clean:
        for shape in options.only:
            started = time.perf_counter()
            found = clean_steps(shape, options.clean, seed=options.seed)
            name = "-".join(map(str, shape))
            for text in found.told[:5]:
                say(f"{shape}: {text}")
            say(f"{shape}: {found}, {time.perf_counter() - started:.0f} s")
            for metric, value in (
                ("clean_steps", found.steps),
                ("false_alarms", found.alarms),
                ("steps_scored_live", found.asked),
                ("lost_samples", found.lost),
                ("nearest_nats", round(found.nearest, 2)),
            ):
                line = {"metric": f"guard_power.{metric}_{name}", "value": value, "unit": "1"}
                print(json.dumps(line), flush=True)
        return
    if options.strewn:
        for shape in options.only:
            for cell in strewn_shares(
                shape, options.strewn, shares=options.shares, steps=options.draws, seed=options.seed
            ):
                name = "-".join(map(str, shape))
                say(f"{shape}, {options.strewn} rows: {cell}")
                metric = f"guard_power.strewn_{name}_{cell.share}_{cell.memory.replace(' ', '_')}"
                print(json.dumps({"metric": metric, "value": round(cell.found, 3), "unit": "1"}))
        return
    cells = [cell for path in options.load for cell in loaded(path)] or list(power(options))
    if options.cells:
        options.cells.write_text(json.dumps([asdict(cell) for cell in cells]))
    text = table(cells)
    print(text)
    if options.write:
        write_table(options.write, text)
    for cell in cells:
        name = "-".join(map(str, cell.shape))
        cause = cell.cause.replace(" ", "_").replace("'", "").replace("+", "plus")
        metric = f"guard_power.rows_{name}_{cell.agreement:.2f}_{cause}"
        print(json.dumps({"metric": metric, "value": cell.rows, "unit": "tokens"}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two small shapes, one agreement")
    parser.add_argument(
        "--strewn",
        type=int,
        default=0,
        metavar="ROWS",
        help="rows of each sample; --draws steps a figure",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        default=list(SHAPES),
        help="experts,topk,layers",
    )
    parser.add_argument("--agreement", nargs="+", type=float, default=list(AGREEMENTS))
    parser.add_argument("--causes", nargs="+", choices=CAUSES, default=list(CAUSES))
    parser.add_argument("--draws", type=int, default=DRAWS, help="clean steps that faults go into")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest sample")
    parser.add_argument("--clean", type=int, default=0, help="judge so many steps without a fault")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--write", type=Path, help="page that the table is put into")
    parser.add_argument("--cells", type=Path, help="file that the cells are written to, as JSON")
    parser.add_argument(
        "--load", type=Path, nargs="+", default=[], help="such files, instead of measuring"
    )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.quick:
        options.only, options.agreement = [(8, 2, 4), (64, 6, 6)], [0.92]
        options.draws, options.longest = 1, 64
        options.clean = min(options.clean, 60)
    return options


if __name__ == "__main__":
    main()
