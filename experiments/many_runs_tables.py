"""Tables of many_runs.py: what runs differ in, with intervals over seeds.

In: lines of experiments/results/many_runs.jsonl. Out: sections of docs/reproduction-training.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]
MODES = ("disabled", "R2", "R3")
WINDOW = 5
"""Steps over which rewards of an attempt at a collapse are averaged."""
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""Degrees of freedom -> quantile of Student's t at 0.975."""


def write(page: Path, lines: Sequence[Line]) -> None:
    """Put each table between its markers of the page."""
    text = page.read_text()
    for name, table in sections(lines).items():
        text = put(text, name, table)
    page.write_text(text)


def put(text: str, name: str, table: str) -> str:
    """Return a page with a table between the markers of its name."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    assert text.count(begin) == text.count(end) == 1, f"the page has no section {name}"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n\n{end}{rest.split(end)[1]}"


def sections(lines: Sequence[Line]) -> dict[str, str]:
    """Return the tables by the name of their section."""
    swept = [line for line in lines if line["group"] == "sweep"]
    return {
        "many-runs": table(HEADINGS, (row(swept, *cell) for cell in cells(swept))),
        "many-runs-flips": flips_table(swept),
        "many-runs-paired": table(PAIRED_HEADINGS, paired_rows(swept)),
        "many-runs-collapse": table(
            COLLAPSE_HEADINGS,
            (collapse_row(line) for line in lines if line["group"] == "collapse"),
        ),
    }


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    parts = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(part)} |" for part in parts)


def cells(lines: Sequence[Line]) -> list[tuple[int, str]]:
    """Return the (updates, mode) that some line is of, in order."""
    found = {(line["updates"], line["mode"]) for line in lines}
    return sorted(found, key=lambda cell: (cell[0], MODES.index(cell[1])))


def of_cell(lines: Sequence[Line], updates: int, mode: str) -> list[Line]:
    """Return the lines of a cell, by seed."""
    found = [line for line in lines if (line["updates"], line["mode"]) == (updates, mode)]
    return sorted(found, key=lambda line: line["seed"])


# What is read off one run; None of a run that has none.


def over_steps(name: str) -> Callable[[Line], float | None]:
    """Return what gives the mean of a series over the steps that have a value."""

    def read(line: Line) -> float | None:
        found = [value for value in line.get(name, ()) if value is not None]
        return statistics.fmean(found) if found else None

    return read


def gap(line: Line) -> float:
    """Return k3, the mean over steps."""
    return statistics.fmean(line["k3"])


def reward_first(line: Line) -> float:
    """Return the mean training reward of the first third of the steps."""
    return statistics.fmean(line["reward"][: max(1, len(line["reward"]) // 3)])


def reward_last(line: Line) -> float:
    """Return the mean training reward of the last third of the steps."""
    return statistics.fmean(line["reward"][-max(1, len(line["reward"]) // 3) :])


def held_out_final(line: Line) -> float:
    """Return the held-out accuracy after the last step."""
    return line["held_out"][max(line["held_out"], key=int)]


def held_out_best(line: Line) -> float:
    """Return the best held-out accuracy of a trained model: that before the first step is out."""
    return max(value for step, value in line["held_out"].items() if int(step))


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and half width of the 95 % t interval; None of a single value."""
    middle = statistics.fmean(values)
    if len(values) < 2:
        return middle, None
    wide = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return middle, wide


def spoken(values: Iterable[float | None], scale: float, form: str) -> str:
    """Return mean ± half width, or a dash where no run has the figure."""
    found = [value * scale for value in values if value is not None]
    if not found:
        return "–"
    middle, wide = interval(found)
    return format(middle, form) if wide is None else f"{middle:{form}} ± {wide:{form}}"


HEADINGS = (
    "N", "mode", "seeds", "k3 / 1e-3", "F(1.1) / %", "outside / %", "reward, first",
    "reward, last", "held-out, final / %", "held-out, best / %",
)  # fmt: skip


def row(lines: Sequence[Line], updates: int, mode: str) -> list[str]:
    """Return a cell as a row of the first table."""
    found = of_cell(lines, updates, mode)
    ran = [line for line in found if "stopped" not in line]
    gone = len(found) - len(ran)
    return [
        str(updates),
        mode,
        str(len(ran)) + (f", {gone} stopped" if gone else ""),
        spoken(map(over_steps("k3"), ran), 1e3, ".2f"),
        spoken(map(over_steps("f_1.1"), ran), 100, ".2f"),
        spoken(map(over_steps("clipped"), ran), 100, ".2f"),
        spoken(map(reward_first, ran), 1, ".3f"),
        spoken(map(reward_last, ran), 1, ".3f"),
        spoken(map(held_out_final, ran), 100, ".1f"),
        spoken(map(held_out_best, ran), 100, ".1f"),
    ]


def flips_table(lines: Sequence[Line]) -> str:
    """Return flips by mini-batch: the first is passed before any update, the n-th after n - 1."""
    most = max((line["updates"] for line in lines), default=1)
    rows = []
    for updates, mode in cells(lines):
        found = of_cell(lines, updates, mode)
        by = [line["by_update"]["flip_frac"] for line in found if "by_update" in line]
        if updates == 1 or not any(value is not None for run in by for value in run):
            continue
        shown = [spoken([run[n] for run in by], 100, ".2f") for n in range(updates)]
        rows.append([str(updates), mode, *shown, *[""] * (most - updates)])
    return table(("N", "mode", *(f"{n} before" for n in range(most))), rows)


PAIRED_HEADINGS = (
    "N", "mode - disabled", "seeds", "k3, factor", "outside / points", "reward, last",
    "held-out, final / points", "held-out, best / points",
)  # fmt: skip


def paired_rows(lines: Sequence[Line]) -> Iterable[list[str]]:
    """Yield the differences from `disabled` of the same seed, which draws the same prompts."""
    for updates, mode in cells(lines):
        if mode == "disabled":
            continue
        base = {line["seed"]: line for line in of_cell(lines, updates, "disabled")}
        pairs = [
            (line, base[line["seed"]])
            for line in of_cell(lines, updates, mode)
            if line["seed"] in base and "stopped" not in {**line, **base[line["seed"]]}
        ]
        if not pairs or (updates, mode) == (1, "R2"):
            continue

        def differing(
            read: Callable[[Line], float | None], pairs: Sequence[tuple[Line, Line]] = pairs
        ) -> list[float | None]:
            both = [(read(one), read(other)) for one, other in pairs]
            return [None if a is None or b is None else a - b for a, b in both]

        factors = [math.log(gap(one) / gap(other)) for one, other in pairs]
        middle, wide = interval(factors)
        between = ""
        if wide is not None:
            between = f" ({math.exp(middle - wide):.2f} to {math.exp(middle + wide):.2f})"
        yield [
            str(updates),
            mode,
            str(len(pairs)),
            f"{math.exp(middle):.2f}{between}",
            spoken(differing(over_steps("clipped")), 100, "+.2f").replace("± +", "± "),
            spoken(differing(reward_last), 1, "+.3f").replace("± +", "± "),
            spoken(differing(held_out_final), 100, "+.1f").replace("± +", "± "),
            spoken(differing(held_out_best), 100, "+.1f").replace("± +", "± "),
        ]


COLLAPSE_HEADINGS = (
    "setting", "N", "mode", "steps", "reward, first 5", "best 5", "last 5", "k3, first 5", "k3, last 5",
    "held-out / %", "stopped",
)  # fmt: skip


def collapse_row(line: Line) -> list[str]:
    """Return an attempt at a collapse as a row."""
    reward, k3 = line.get("reward", ()), line.get("k3", ())
    if len(reward) < WINDOW:
        why = line.get("stopped", "")
        return [line["name"], str(line["updates"]), line["mode"], str(len(reward)), *["–"] * 6, why]
    windows = [statistics.fmean(reward[at : at + WINDOW]) for at in range(len(reward) - WINDOW + 1)]
    held_out = " → ".join(f"{100 * value:.1f}" for value in line["held_out"].values())
    return [
        line["name"],
        str(line["updates"]),
        line["mode"],
        str(len(reward)),
        f"{windows[0]:.3f}",
        f"{max(windows):.3f}",
        f"{windows[-1]:.3f}",
        f"{statistics.fmean(k3[:WINDOW]):.1e}",
        f"{statistics.fmean(k3[-WINDOW:]):.1e}",
        held_out,
        line.get("stopped", "").partition(":")[0],
    ]
