"""Figures of what a run costs: seconds of each station, and memory."""

from __future__ import annotations

from collections.abc import Sequence

from moe_replay.report.columns import number
from moe_replay.report.page.figure import (
    DASHES,
    Figure,
    Table,
    Trace,
    label,
    line,
    table_of,
    thinning_note,
)
from moe_replay.report.page.runs import RunView
from moe_replay.report.page.thinning import Series, rounded, series_of
from moe_replay.report.summary import seconds_per_step

_GIB = 2**30


def stations_figure(runs: Sequence[RunView]) -> Figure:
    """Show how many seconds of a step each station takes."""
    timed = [(run, seconds_per_step(run.steps)) for run in runs if run.steps]
    stations = list(dict.fromkeys(name for _, seconds in timed for name in seconds))
    traces: list[Trace] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": station,
            "y": [label(run.name) for run, _ in timed],
            "x": [rounded(seconds.get(station, 0.0)) for _, seconds in timed],
            "marker": {"color": f"@part{place}", "line": {"width": 1, "color": "@paper"}},
            "hovertemplate": "%{fullData.name}: %{x:.3~g} s<extra></extra>",
        }
        for place, station in enumerate(stations)
    ]
    totals = [f"{run.name}: {number(sum(seconds.values()))} s" for run, seconds in timed]
    return Figure(
        key="stations",
        title="Seconds a step, by station",
        reading="Mean wall seconds of each station of the loop. With overlap, rollout is what the "
        "trainer waited.",
        says=f"Seconds a step. {'; '.join(totals)}." if totals else "No step has finished.",
        traces=traces,
        layout={
            "barmode": "stack",
            "bargap": 0.35,
            "legend": {"traceorder": "normal"},
            "xaxis": {"title": {"text": "seconds a step"}},
            # A name such as "2" would make it an axis of numbers.
            "yaxis": {"type": "category", "automargin": True, "autorange": "reversed"},
            "hovermode": "closest",
        },
        height=180 + 44 * len(timed),
        table=Table(
            headings=["run", *stations, "total"],
            rows=[
                [
                    run.name,
                    *(number(seconds.get(station, 0.0)) for station in stations),
                    number(sum(seconds.values())),
                ]
                for run, seconds in timed
            ],
        ),
    )


def memory_figure(runs: Sequence[RunView]) -> Figure:
    """Show the memory that a GPU holds in each phase."""
    names = sorted(
        {n for run in runs for r in run.steps for n in r.metrics if n.startswith("memory/")}
    )
    traces: list[Trace] = []
    columns: list[tuple[str, Series]] = []
    for run in runs:
        for place, name in enumerate(names):
            series = series_of(run.steps, name)
            if series is None:
                continue
            series = _scaled(series)
            short = name.removeprefix("memory/").removesuffix("_bytes").replace("_", " ")
            columns.append((f"{run.name}: {short}", series))
            traces += line(run, series, name=short, line={"dash": DASHES[place % len(DASHES)]})
    highest = [f"{name}: at most {number(max(series.high))} GiB" for name, series in columns]
    return Figure(
        key="memory",
        title="Memory",
        reading="GiB on the GPU of the rank with most: peaks while the engine samples and in the "
        "rest of the step, and what the trainer holds during the rollout.",
        says=f"Memory. {'; '.join(highest)}."
        if highest
        else "These runs recorded no memory: it is measured on GPUs only.",
        traces=traces,
        layout={
            "xaxis": {"title": {"text": "step"}},
            "yaxis": {"title": {"text": "GiB"}, "rangemode": "tozero"},
        },
        table=table_of(columns, number),
        note=thinning_note(series for _, series in columns),
    )


def _scaled(series: Series) -> Series:
    mean, low, high = (
        tuple(rounded(value / _GIB) for value in values)
        for values in (series.mean, series.low, series.high)
    )
    return Series(
        steps=series.steps, mean=mean, low=low, high=high, steps_a_point=series.steps_a_point
    )
