"""Figures of what a run learns, and how far engine, trainer and policy are from one another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from moe_replay.grpo.metrics import EXTREME_TAUS
from moe_replay.grpo.records import StepRecord
from moe_replay.report.columns import WINDOW, number, percent, steps_of, tiny
from moe_replay.report.page.figure import (
    DASHES,
    SYMBOLS,
    Figure,
    Table,
    Trace,
    label,
    line,
    table_of,
    thinning_note,
)
from moe_replay.report.page.runs import RunView
from moe_replay.report.page.thinning import Series, rounded, series_of, thinned
from moe_replay.report.summary import eval_changes

_STEP = {"title": {"text": "step"}, "rangemode": "tozero"}
_GAP, _LIVE = "rollout_correction", "live_gap"


def changes(columns: Sequence[tuple[str, Series]], show: Callable[[float], str]) -> str:
    """Say where lines begin and end."""
    return "; ".join(
        f"{name}: {show(series.mean[0])} at step {series.steps[0]}, "
        f"{show(series.mean[-1])} at step {series.steps[-1]}"
        for name, series in columns
    )


def reward_figure(runs: Sequence[RunView]) -> Figure:
    """Show the training reward of each step, and its running mean."""
    traces: list[Trace] = []
    columns: list[tuple[str, Series]] = []
    for run in runs:
        series = series_of(run.steps, "reward")
        if series is None:
            continue
        columns.append((run.name, series))
        smooth = _running_mean(run)
        faint: dict[str, Any] = {"opacity": 0.35, "showlegend": False, "mode": "lines"}
        traces += line(run, series, **(faint if smooth else {}))
        if smooth:
            traces += line(run, smooth, mode="lines", line={"width": 3})
    return Figure(
        key="reward",
        title="Training reward",
        reading=f"Mean reward of each step's completions; the thick line is the mean of {WINDOW} steps.",
        says=f"Reward. {changes(columns, number)}." if columns else "No step has a reward.",
        traces=traces,
        layout={"xaxis": _STEP, "yaxis": {"title": {"text": "reward"}}},
        table=table_of(columns, number),
        note=thinning_note(series for _, series in columns),
    )


def _running_mean(run: RunView) -> Series | None:
    held = [(r.step, r.metrics["reward"]) for r in run.steps if "reward" in r.metrics]
    if len(held) < 2 * WINDOW:
        return None
    values = [value for _, value in held]
    means = [
        (step, sum(values[at + 1 - WINDOW : at + 1]) / WINDOW)
        for at, (step, _) in enumerate(held)
        if at + 1 >= WINDOW
    ]
    thin = thinned(means)
    return Series(steps=thin.steps, mean=thin.mean, low=thin.low, high=thin.high, steps_a_point=1)


def held_out_figure(runs: Sequence[RunView]) -> Figure:
    """Show the held-out reward after each evaluation, set by set."""
    traces: list[Trace] = []
    columns: list[tuple[str, Series]] = []
    for run in runs:
        for place, name in enumerate(eval_changes(run.evaluations)):
            key = f"eval/{name}/reward" if name else "eval/reward"
            held = [(e.step, e.metrics[key]) for e in run.evaluations if key in e.metrics]
            series = thinned(held)
            columns.append((f"{run.name} {name}".strip(), series))
            dash = DASHES[place % len(DASHES)]
            traces += line(run, series, name=name, mode="lines+markers", line={"dash": dash})
    return Figure(
        key="held-out",
        title="Held-out reward",
        reading="Mean reward of held-out prompts, which no step trains on: the accuracy, where a "
        "reward is 0 or 1.",
        says=f"Held-out reward. {changes(columns, number)}."
        if columns
        else "No run was evaluated.",
        traces=traces,
        layout={"xaxis": _STEP, "yaxis": {"title": {"text": "held-out reward"}}},
        table=table_of(columns, number),
    )


def gap_figure(runs: Sequence[RunView]) -> Figure:
    """Show the engine gap above the policy drift, each on an axis of its own."""
    traces: list[Trace] = []
    gaps: list[tuple[str, Series]] = []
    below: list[Trace] = []
    drifts: list[tuple[str, Series]] = []
    moved = False
    for run in runs:
        gap = series_of(run.steps, f"{_GAP}/k3_kl")
        live = series_of(run.steps, f"{_LIVE}/k3_kl")
        drift = series_of(run.steps, "clip_ratio/region_mean") or series_of(
            run.steps, "cispo_clip_ratio"
        )
        if gap is not None:
            gaps.append((f"{run.name}: gap", gap))
            traces += line(run, gap, yaxis="y")
        if live is not None and gap is not None:
            gaps.append((f"{run.name}: gap with live routing", live))
            traces += line(
                run,
                live,
                name="with live routing",
                mode="markers",
                yaxis="y",
                marker={
                    "size": 9,
                    "symbol": f"{SYMBOLS[run.number % len(SYMBOLS)]}-open",
                    "color": f"@run{run.number}",
                },
            )
        if drift is not None:
            drifts.append((f"{run.name}: clipped", drift))
            moved = moved or any(drift.high)
            below += line(run, drift, yaxis="y2", showlegend=False)
    words = f"Engine gap. {changes(gaps, tiny)}. Policy drift. {changes(drifts, percent)}."
    return Figure(
        key="gap",
        title="Engine gap and policy drift",
        reading="Above: how far the trainer's probabilities of sampled tokens are from the engine's "
        "before anything is learned (k3, log scale); open markers are the same with live routing. "
        "Below: tokens that the loss clips because the policy has moved within the step. Replay "
        "lowers the first; learning causes the second.",
        says=words if gaps else "No step has an engine gap.",
        traces=[*traces, *(below if moved else [])] if gaps else [],
        layout=_gap_layout([series for _, series in gaps], with_drift=moved),
        height=440 if moved else 320,
        table=table_of([*gaps, *drifts], tiny),
        note=" ".join(
            [
                "No token was clipped in any step, so the drift is not drawn. With one update a step "
                "it is always so: the policy has not moved yet." * (bool(drifts) and not moved),
                thinning_note(series for _, series in [*gaps, *drifts]),
            ]
        ).strip(),
        is_wide=True,
    )


def _gap_layout(gaps: Sequence[Series], *, with_drift: bool) -> dict[str, Any]:
    values = [value for series in gaps for value in series.mean if value > 0] or [1.0]
    decades = math.log10(max(values) / min(values))
    axis = {
        "title": {"text": "k3, nats"},
        "type": "log",
        # 1, 2 and 5 of each decade, or single decades where these would overlap.
        "dtick": "D2" if decades < 2.5 else math.ceil(decades / 6),
        "tickformat": ".0e",
    }
    if not with_drift:
        return {"xaxis": _STEP, "yaxis": axis}
    return {
        "xaxis": {**_STEP, "anchor": "y2"},
        "yaxis": {**axis, "domain": [0.42, 1]},
        "yaxis2": {
            "title": {"text": "clipped"},
            "domain": [0, 0.28],
            "tickformat": ".2~p",
            "rangemode": "tozero",
        },
    }


def tail_figure(runs: Sequence[RunView]) -> Figure:
    """Show F(tau), the share of tokens off by more than tau, over tau.

    Where a run also measured it with live routing, both lines are means over the steps that have
    both.
    """
    traces: list[Trace] = []
    rows = []
    notes = []
    for run in runs:
        steps = _with_tail(run.steps, _GAP)
        both = _with_tail(steps, _LIVE)
        if both and len(both) < len(steps):
            notes.append(
                f"{run.name}: {len(both)} of {steps_of(len(steps))} measured live routing too; its "
                "lines are means over these."
            )
        for prefix, name, dash in ((_GAP, "", "solid"), (_LIVE, "with live routing", "dot")):
            held = both or steps
            if not _with_tail(held, prefix):
                continue
            values = [
                rounded(math.fsum(r.metrics[metric] for r in held) / len(held))
                for metric in _tail_metrics(prefix)
            ]
            rows.append([f"{run.name} {name}".strip(), str(len(held)), *map(percent, values)])
            traces.append(_tail_trace(run, values, name=name, dash=dash))
    spoken = "; ".join(f"{row[0]}: {', '.join(row[2:])}" for row in rows)
    return Figure(
        key="tail",
        title="F(τ): tokens off by more than τ",
        reading="Share of sampled tokens whose probabilities by engine and trainer differ by more "
        "than a factor of τ, mean over steps (log scale; a share of 0 has no point). Wrong routes "
        "lift the right end first.",
        says=f"Tokens off by more than 1.1, 1.5 and 2. {spoken}." if rows else "No step has it.",
        traces=traces,
        layout={
            "xaxis": {"title": {"text": "τ"}, "tickvals": list(EXTREME_TAUS)},
            "yaxis": {"title": {"text": "F(τ)"}, "type": "log", "tickformat": ".2~p"},
            "hovermode": "closest",
        },
        table=Table(
            headings=["run", "steps", *(f"τ = {tau:g}" for tau in EXTREME_TAUS)], rows=rows
        ),
        note=" ".join(notes),
    )


def _tail_metrics(prefix: str) -> list[str]:
    return [f"{prefix}/extreme_frac_tau_{tau:g}" for tau in EXTREME_TAUS]


def _with_tail(steps: Sequence[StepRecord], prefix: str) -> list[StepRecord]:
    wanted = set(_tail_metrics(prefix))
    return [record for record in steps if wanted <= record.metrics.keys()]


def _tail_trace(run: RunView, values: Sequence[float], *, name: str, dash: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label(f"{run.name} {name}".strip()),
        "x": list(EXTREME_TAUS),
        # A logarithm has no place for 0.
        "y": [value or None for value in values],
        "line": {"color": f"@run{run.number}", "width": 2, "dash": dash},
        "marker": {
            "size": 8,
            "symbol": SYMBOLS[run.number % len(SYMBOLS)] + "-open" * bool(name),
            "color": f"@run{run.number}",
        },
        "meta": {"run": run.number},
    }


def tail_over_steps_figure(runs: Sequence[RunView]) -> Figure:
    """Show F(1.1) of each step."""
    traces: list[Trace] = []
    columns: list[tuple[str, Any]] = []
    for run in runs:
        if series := series_of(run.steps, f"{_GAP}/extreme_frac_tau_1.1"):
            columns.append((run.name, series))
            traces += line(run, series)
    return Figure(
        key="tail-steps",
        title="F(1.1) by step",
        reading="The share of tokens off by more than 1.1 times, step by step.",
        says=f"F(1.1). {changes(columns, percent)}." if columns else "No step has it.",
        traces=traces,
        layout={
            "xaxis": _STEP,
            "yaxis": {"title": {"text": "F(1.1)"}, "tickformat": ".2~p", "rangemode": "tozero"},
        },
        table=table_of(columns, percent),
        note=thinning_note(series for _, series in columns),
    )
