"""What a person wants to know of a run first: how it ended, and whether its routes were its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_replay.report.columns import number, percent, steps_of, tiny
from moe_replay.report.page.runs import RunView
from moe_replay.report.summary import eval_changes, live_comparison, metric_figures

Level = Literal["good", "plain", "warning", "bad"]
_MISALIGNED = "MisalignmentError"
_LOWEST = "replay/agreement_min_sample"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The head of a run on the page."""

    level: Level
    """How much it should worry."""
    headline: str
    """In a few words."""
    text: str
    """In a sentence or two."""
    message: str
    """The error that ended the run, in full; empty without one."""
    facts: Sequence[tuple[str, str]]
    """Name and value of what else is asked first."""


def verdict_of(run: RunView) -> Verdict:
    """Return the head of a run."""
    level, headline, text = _judgement(run)
    return Verdict(
        level=level,
        headline=headline,
        text=text,
        message="" if run.failure is None else run.failure.message,
        facts=_facts(run),
    )


def sample_name(detail: dict[str, Any]) -> str:
    """Name a sample of a step as records do: its index, dataset item and server."""
    server = f", server {detail['server']}" if detail.get("server") else ""
    return f"sample {detail['sample']} (dataset item {detail['item']}{server})"


def dropped_samples(run: RunView) -> list[tuple[int, dict[str, Any]]]:
    """Return (step, sample) of those that the guard kept out of training as misaligned."""
    return [
        (record.step, detail)
        for record in run.steps
        for detail in record.details.get("replay/dropped_samples", ())
    ]


def _judgement(run: RunView) -> tuple[Level, str, str]:
    failure = run.failure
    if failure is not None and failure.kind == _MISALIGNED:
        return (
            "bad",
            f"Misaligned: the guard stopped it in step {failure.step}",
            f"{_first_sentence(failure.message)} Nothing was learned from that step.",
        )
    if failure is not None:
        where = f"in step {failure.step}" if failure.step else "before its first step"
        return "bad", f"Stopped by an error {where}", _first_sentence(failure.message)
    if not run.steps:
        return (
            "warning",
            "No step has finished",
            "It has just begun, or was killed before its first step; there is nothing to show yet.",
        )
    dropped = dropped_samples(run)
    if dropped:
        named = [f"step {step}, {sample_name(detail)}" for step, detail in dropped]
        more = f", and {len(named) - 3} more" if len(named) > 3 else ""
        samples = "sample" if len(named) == 1 else "samples"
        return (
            "bad",
            f"Misaligned: {len(named)} {samples} had routes of other tokens",
            f"The guard kept {'it' if len(named) == 1 else 'them'} out of training: "
            f"{'; '.join(named[:3])}{more}.",
        )
    return _without_misalignment(run)


def _without_misalignment(run: RunView) -> tuple[Level, str, str]:
    seen = f"in {steps_of(len(run.steps))}"
    lost = sum(record.metrics.get("replay/lost_samples", 0) for record in run.steps)
    if lost:
        return (
            "warning",
            f"{lost:g} samples lost their routes to drift",
            "Drift has left too little of their routes, so they did not train. No misaligned sample "
            f"was found {seen}.",
        )
    if run.mode == "disabled":
        return (
            "plain",
            "No replay: there are no routes to check",
            "Every pass routes by its own weights, so the engine gap holds all differences of routing.",
        )
    if run.recipe.get("replay.guard") is False:
        return (
            "warning",
            "Routes were replayed and not checked",
            "replay.guard is false: look at the agreement by sample below.",
        )
    return _of_compared(run)


def _of_compared(run: RunView) -> tuple[Level, str, str]:
    """Say how much the guard compared; a step without a replayed row compares nothing."""
    compared = [record for record in run.steps if _LOWEST in record.metrics]
    if not compared:
        return (
            "warning",
            "No route was compared",
            f"No row was replayed in {steps_of(len(run.steps))}, so the guard had nothing to judge: "
            "look at the coverage and the rows routed live below.",
        )
    lowest = min(
        (r.metrics["replay/coverage"] for r in compared if "replay/coverage" in r.metrics),
        default=None,
    )
    rows = "" if lowest is None else f", at least {percent(lowest)} of those that could be replayed"
    if len(compared) < len(run.steps):
        return (
            "warning",
            f"Routes were compared in {len(compared)} of {steps_of(len(run.steps))}",
            f"The guard compared every replayed row there{rows}, and found no misaligned sample. The "
            "other steps replayed nothing, so it had nothing to judge in them.",
        )
    text = f"The guard compared every replayed row in {steps_of(len(compared))}{rows}."
    return "good", "No misaligned sample", text


def _first_sentence(message: str) -> str:
    first = message.strip().splitlines()[0] if message.strip() else ""
    return (
        f"{first[:277]}..." if len(first) > 280 else first if first.endswith(".") else f"{first}."
    )


def _ending(run: RunView) -> str:
    done = run.steps[-1].step if run.steps else 0
    of = f"{done} of {run.max_steps}" if run.max_steps else str(done)
    if run.failure is not None:
        return f"{of} steps, then {run.failure.kind}"
    if run.end is None:
        return f"{of} steps; still running, or killed"
    if run.end.stopped_by is not None:
        return f"{of} steps, stopped by {run.end.stopped_by}; the same command continues"
    return f"{of} steps, finished"


def _facts(run: RunView) -> list[tuple[str, str]]:
    recipe = run.recipe
    model = str(recipe.get("model.path", "unknown"))
    facts = [
        ("Mode", run.mode),
        ("Model", "/".join(model.split("/")[-2:])),
        ("Engine", f"{recipe.get('rollout.engine', 'unknown')}, {recipe.get('rollout.dtype', '')}"),
        ("Steps", _ending(run)),
    ]
    if figures := metric_figures(run.steps, "reward"):
        change = f"{number(figures['first 10 %'])} → {number(figures['last 10 %'])}"
        facts.append(("Training reward", f"{change} (first and last 10 % of steps)"))
    for name, (first, last) in eval_changes(run.evaluations).items():
        key = f"eval/{name}/reward" if name else "eval/reward"
        title = f"Held-out {name}".strip()
        change = f"{number(first.metrics[key])} → {number(last.metrics[key])}"
        facts.append((title, f"{change} (after steps {first.step} and {last.step})"))
    if figures := metric_figures(run.steps, "rollout_correction/k3_kl"):
        text = tiny(figures["mean"])
        if comparison := live_comparison(run.steps):
            steps, replayed, live = comparison
            text += f"; {tiny(live)} live, {tiny(replayed)} replayed over {steps_of(steps)}"
        facts.append(("Engine gap, k3", text))
    worst = _worst(run)
    if worst is not None:
        step, value, detail = worst
        named = f", {sample_name(detail)}" if detail else ""
        facts.append(("Lowest agreement", f"{percent(value)}: step {step}{named}"))
    return facts


def _worst(run: RunView) -> tuple[int, float, dict[str, Any] | None] | None:
    held = [record for record in run.steps if _LOWEST in record.metrics]
    if not held:
        return None
    record = min(held, key=lambda record: record.metrics[_LOWEST])
    return record.step, record.metrics[_LOWEST], record.details.get(_LOWEST)
