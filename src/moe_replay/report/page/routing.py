"""Figures of replay: flips by layer and step, coverage, and the agreement of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_replay.grpo.records import StepRecord
from moe_replay.report.columns import percent
from moe_replay.report.page.figure import (
    Figure,
    Table,
    Trace,
    label,
    line,
    table_of,
    thinning_note,
)
from moe_replay.report.page.runs import RunView
from moe_replay.report.page.thinning import (
    MAX_COLUMNS,
    MAX_POINTS,
    Series,
    bins,
    rounded,
    series_of,
)
from moe_replay.report.page.verdict import dropped_samples, sample_name

_LIVE_ROWS = "replay/rows_live_"
_LOWEST = "replay/agreement_min_sample"
_NUM_WORST = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipMap:
    """Flips of a run by layer and step."""

    layers: Sequence[int]
    """Global decoder indices."""
    steps: Sequence[int]
    """Last step of each column."""
    flip_frac: Sequence[Sequence[float | None]]
    """``[layers][columns]``, share of rows that flip."""
    steps_a_column: int
    """Neighbouring steps of which a column is the mean."""


def flip_map(steps: Sequence[StepRecord]) -> FlipMap | None:
    """Return the flips of a run by layer and step; None where no step has them."""
    held = [
        (r.step, r.details["replay/flip_frac"]) for r in steps if "replay/flip_frac" in r.details
    ]
    if not held:
        return None
    layers = sorted({layer for _, found in held for layer in found["layers"]})
    column = {layer: at for at, layer in enumerate(layers)}
    table = np.full((len(held), len(layers)), np.nan)
    for at, (_, found) in enumerate(held):
        table[at, [column[layer] for layer in found["layers"]]] = found["flip_frac"]
    parts = bins(len(held), MAX_COLUMNS)
    starts = [part[0] for part in parts]
    counts = np.add.reduceat(~np.isnan(table), starts, axis=0, dtype=np.int64)
    sums = np.add.reduceat(np.nan_to_num(table), starts, axis=0)
    means = np.round(sums / np.maximum(counts, 1), 6)
    cells = np.where(counts > 0, means, np.nan).T.tolist()
    return FlipMap(
        layers=layers,
        steps=[held[part[-1]][0] for part in parts],
        flip_frac=[[None if math.isnan(cell) else cell for cell in row] for row in cells],
        steps_a_column=len(parts[0]),
    )


def flip_figures(runs: Sequence[RunView]) -> list[Figure]:
    """Show the flips of each run by layer and step, all on one scale of colours."""
    maps = [(run, found) for run in runs if (found := flip_map(run.steps)) is not None]
    top = max((v or 0 for _, m in maps for row in m.flip_frac for v in row), default=0) or 1.0
    return [_flip_figure(run, found, top) for run, found in maps]


def _flip_figure(run: RunView, found: FlipMap, top: float) -> Figure:
    means = [_mean([v for v in row if v is not None]) for row in found.flip_frac]
    worst = max(range(len(means)), key=means.__getitem__)
    rows = [
        [str(layer), percent(mean), percent(max(v for v in row if v is not None))]
        for layer, mean, row in zip(found.layers, means, found.flip_frac, strict=True)
    ]
    note = ""
    if found.steps_a_column > 1:
        note = (
            f"Long run: each column is the mean of up to {found.steps_a_column} neighbouring steps."
        )
    return Figure(
        key=f"flips-{run.number}",
        title=f"Flips by layer and step: {run.name}",
        reading="Share of rows whose live expert set is not the replayed one. One dark layer: that "
        "layer is hard to route or misaligned; one dark step: look at its samples.",
        says=f"Flips of {run.name}: layer {found.layers[worst]} flips most, {percent(means[worst])} "
        f"of its rows on average; layers have {percent(min(means))} to {percent(max(means))}.",
        traces=[
            {
                "type": "heatmap",
                "x": list(found.steps),
                "y": list(found.layers),
                "z": [list(row) for row in found.flip_frac],
                "zmin": 0,
                "zmax": top,
                "colorscale": "@sequential",
                "colorbar": {"tickformat": ".4~p", "thickness": 12, "title": {"text": "flips"}},
                "hovertemplate": "step %{x}, layer %{y}: %{z:.2%}<extra></extra>",
                "meta": {"run": run.number},
            }
        ],
        layout={
            "xaxis": {"title": {"text": "step"}},
            "yaxis": {"title": {"text": "layer"}, "dtick": max(1, len(rows) // 12)},
            "hovermode": "closest",
        },
        is_wide=True,
        height=min(560, 180 + 14 * max(8, len(rows))),
        table=Table(headings=["layer", "mean flips", "largest"], rows=rows),
        note=note,
    )


def coverage_figure(runs: Sequence[RunView]) -> Figure:
    """Show which share of rows was replayed."""
    traces: list[Trace] = []
    columns: list[tuple[str, Series]] = []
    for run in runs:
        if series := series_of(run.steps, "replay/coverage"):
            columns.append((run.name, series))
            traces += line(run, series)
    bottom = min((value for _, series in columns for value in series.low), default=1.0)
    lowest = [f"{name}: at least {percent(min(series.low))}" for name, series in columns]
    return Figure(
        key="coverage",
        title="Coverage",
        reading="Replayed rows over rows that could be replayed. Below replay.min_coverage a run stops.",
        says=f"Coverage. {'; '.join(lowest)}." if lowest else "No run replays.",
        traces=traces,
        layout={
            "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
            "yaxis": {
                "title": {"text": "coverage"},
                "tickformat": ".4~p",
                "range": [min(0.9, bottom) - 0.01, 1.01],
            },
        },
        height=260,
        table=table_of(columns, percent),
        note=thinning_note(series for _, series in columns),
    )


def live_rows_figure(runs: Sequence[RunView]) -> Figure:
    """Show how many rows were routed live, by reason."""
    reasons = sorted(
        {
            name
            for run in runs
            for record in run.steps
            for name, count in record.metrics.items()
            if name.startswith(_LIVE_ROWS) and count
        }
    )
    shown = [(run, _live_rows(run, reasons)) for run in runs]
    shown = [(run, counts) for run, counts in shown if counts is not None]
    names = [reason.removeprefix(_LIVE_ROWS).replace("_", " ") for reason in reasons]
    spoken = [
        f"{run.name}: "
        + ", ".join(f"{c:,.0f} {n}" for c, n in zip(counts, names, strict=True) if c)
        for run, counts in shown
    ]
    return Figure(
        key="live-rows",
        title="Rows routed live, by reason",
        reading="Rows a step (mean) that have no route to replay. The last token of a completion "
        "never has one; what the engine gave none for is a loss of coverage.",
        says=f"Live rows a step. {'; '.join(spoken)}." if spoken else "No run replays.",
        traces=[
            {
                "type": "bar",
                "orientation": "h",
                "name": label(run.name),
                "y": names,
                "x": [rounded(count) for count in counts],
                "marker": {"color": f"@run{run.number}"},
                "meta": {"run": run.number},
            }
            for run, counts in shown
        ],
        layout={
            "barmode": "group",
            "bargap": 0.5,
            "xaxis": {"title": {"text": "rows a step"}},
            "yaxis": {"automargin": True},
            "hovermode": "closest",
        },
        height=260,
        table=Table(
            headings=["run", *names],
            rows=[[run.name, *(f"{count:,.1f}" for count in counts)] for run, counts in shown],
        ),
    )


def _live_rows(run: RunView, reasons: Sequence[str]) -> list[float] | None:
    held = [record for record in run.steps if any(reason in record.metrics for reason in reasons)]
    if not held:
        return None
    return [_mean([record.metrics.get(reason, 0.0) for record in held]) for reason in reasons]


def agreement_figure(runs: Sequence[RunView]) -> Figure:
    """Show the lowest agreement of a sample in each step, the median, and the dropped samples."""
    traces: list[Trace] = []
    columns: list[tuple[str, Series]] = []
    spoken = []
    for run in runs:
        held = [record for record in run.steps if _LOWEST in record.metrics]
        if not held:
            continue
        lowest, median = _lowest(held), _median(held)
        columns.append((f"{run.name}: lowest sample", lowest))
        traces += line(run, lowest, name="lowest sample", mode="lines")
        if median is not None:
            columns.append((f"{run.name}: median sample", median))
            traces += line(
                run, median, name="median", mode="lines", line={"dash": "dot", "width": 1.5}
            )
        if marked := _dropped_trace(run):
            traces.append(marked)
        spoken.append(f"{run.name}: at least {percent(min(lowest.low))}")
    return Figure(
        key="agreement",
        title="Agreement by sample",
        reading="Share of expert slots on which live and replayed routes agree, in the sample of "
        "each step with the lowest. Healthy samples stay together near the median; one with routes "
        "of other tokens falls far below. A ringed cross is a sample that the guard dropped.",
        says=f"Lowest agreement of a sample. {'; '.join(spoken)}."
        if spoken
        else "No run replays, so there is nothing that could agree.",
        traces=traces,
        layout={
            "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "agreement"}, "tickformat": ".4~p"},
            "hovermode": "closest",
        },
        height=380,
        is_wide=True,
        table=worst_table(runs),
        note="The table lists the samples with the lowest agreement, at most "
        f"{_NUM_WORST} of each run. {_lowest_note(columns)}".strip(),
    )


def _lowest(held: Sequence[StepRecord]) -> Series:
    """Return the lowest agreement of each point: a mean would hide the one that matters."""
    values = [(record.step, rounded(record.metrics[_LOWEST])) for record in held]
    parts = bins(len(values), MAX_POINTS)
    points = [min((values[at] for at in part), key=lambda v: v[1]) for part in parts]
    lows = tuple(value for _, value in points)
    return Series(
        steps=tuple(step for step, _ in points),
        mean=lows,
        low=lows,
        high=lows,
        steps_a_point=len(parts[0]),
    )


def _median(held: Sequence[StepRecord]) -> Series | None:
    values = [
        StepRecord(step=r.step, metrics={"median": spread["percentiles"]["50"]}, seconds={})
        for r in held
        if (spread := r.details.get("replay/agreement"))
    ]
    return series_of(values, "median")


def _lowest_note(columns: Sequence[tuple[str, Series]]) -> str:
    most = max((series.steps_a_point for _, series in columns), default=1)
    if most == 1:
        return ""
    return (
        f"Long runs: each point is the lowest of up to {most} neighbouring steps; of medians their "
        "mean, with a band from their lowest to their highest."
    )


def _dropped_trace(run: RunView) -> Trace | None:
    agreement = {
        (record.step, lowest["sample"]): lowest["agreement"]
        for record in run.steps
        for lowest in record.details.get("replay/agreement", {}).get("lowest", ())
    }
    found = [
        (step, agreement[step, detail["sample"]], sample_name(detail))
        for step, detail in dropped_samples(run)
        if (step, detail["sample"]) in agreement
    ]
    if not found:
        return None
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label(f"{run.name} dropped"),
        "x": [step for step, _, _ in found],
        "y": [value for _, value, _ in found],
        "text": [label(f"step {step}, {name}: dropped") for step, _, name in found],
        "hovertemplate": "%{text}, %{y:.2%}<extra></extra>",
        "marker": {
            "size": 15,
            "symbol": "circle-x-open",
            "color": "@bad",
            "line": {"width": 2.5},
        },
        "meta": {"run": run.number},
    }


def worst_table(runs: Sequence[RunView]) -> Table:
    """Return the samples with the lowest agreement, over all runs."""
    rows = []
    for run in runs:
        dropped = {(step, detail["sample"]) for step, detail in dropped_samples(run)}
        found = sorted(_named(run), key=lambda entry: (entry[1]["agreement"], entry[0]))
        for step, detail in found[:_NUM_WORST]:
            why = "dropped" if (step, detail["sample"]) in dropped else ""
            rows.append((detail["agreement"], run.name, step, detail, why))
    rows.sort(key=lambda row: (row[0], row[1], row[2]))
    return Table(
        headings=["run", "step", "sample", "dataset item", "server", "agreement", ""],
        rows=[
            [
                name,
                str(step),
                str(detail["sample"]),
                str(detail["item"]),
                detail.get("server") or "–",
                percent(value),
                why,
            ]
            for value, name, step, detail, why in rows
        ],
    )


def _named(run: RunView) -> list[tuple[int, dict[str, Any]]]:
    """Return (step, sample with its agreement) of what steps name."""
    found = []
    for record in run.steps:
        spread = record.details.get("replay/agreement")
        if spread is not None:
            found += [(record.step, lowest) for lowest in spread["lowest"]]
        elif _LOWEST in record.details:
            value = {"agreement": record.metrics[_LOWEST]}
            found.append((record.step, {**record.details[_LOWEST], **value}))
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
