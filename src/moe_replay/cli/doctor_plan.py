"""`moe-replay doctor --plan`: what a recipe needs of a machine that is not this one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_replay.plan.advice import recipe_lines
from moe_replay.plan.machine import read_machine
from moe_replay.plan.memory import TIGHT_FRAC, gb
from moe_replay.plan.plan import Plan, make_plan
from moe_replay.recipe.load import load_recipe


def run_plan(options: argparse.Namespace) -> int:
    """Print the plan of a recipe; return 0 if it fits, else 2.

    Raises:
        MoeReplayError: recipe, machine or layout are wrong, so there is nothing to plan.
    """
    machine = read_machine(options.plan)
    recipe = load_recipe(options.recipe, options.overrides)
    plan = make_plan(recipe, machine)
    if options.json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        show_plan(plan)
    return 0 if plan.memory.fits else 2


def show_plan(plan: Plan) -> None:
    """Print the plan."""
    console = Console(highlight=False)
    memory, time = plan.memory, plan.time
    console.print(f"{plan.machine.describe()}, {plan.layout}: computed, not run on a GPU")
    console.print(_phases(plan))
    logits = max(found.logits for found in memory.trainer)
    notes = [
        f"chunks of logits take {gb(logits)} GB at their own moment of an update",
        f"host memory of a node: {gb(memory.host.total)} GB of {gb(memory.usable_host)}, "
        f"{gb(memory.host.save)} of them while a checkpoint is saved",
    ]
    engine = memory.engine
    if engine is not None:
        length = memory.settings.max_sequence_length
        notes.append(
            f"engine on {engine.num_ranks} GPU(s) each: {gb(engine.weights)} GB of weights, "
            f"{gb(engine.cache)} GB of cache hold {engine.sequences(length)} sequences of "
            f"{length} tokens, {engine.token_bytes / 1e3:.1f} kB a token"
        )
    for note in notes:
        console.print(escape(note))
    console.print(_pairs("seconds of a step", ((n, f"{s:.1f}") for n, s in time.parts.items())))
    beside = "rollouts beside the trainer" if time.overlaps else "one after the other"
    known = "" if "rollout" in time.parts else "; the rollout is unknown: add servers=8x80GB"
    console.print(f"about {time.total:.0f} s a step, {beside}{known}")
    console.print(_pairs("assumption", plan.assumptions().items()))
    if memory.fits:
        peak = memory.peak
        console.print(
            f"[green]this recipe fits[/], with {gb(memory.headroom)} GB to spare in {peak.name}"
        )
        if memory.tight is not None:
            spare = gb(memory.usable - memory.tight.total)
            console.print(
                f"[yellow]little room[/]: {spare} GB in {memory.tight.name} are less than "
                f"{TIGHT_FRAC:.0%} of {gb(memory.usable)}; published peaks lie 6 to 16 % above what "
                "these formulas say, so it may not fit after all"
            )
        return
    console.print("[bold red]this recipe does not fit[/]")
    for text in memory.short:
        console.print(f"  - {escape(text)}")
    if not plan.remedies:
        console.print(
            "no set of changes that was tried makes it fit: more GPUs, or a smaller model"
        )
    for number, remedy in enumerate(plan.remedies, start=1):
        peak = remedy.memory.peak
        console.print(f"it fits with ({number}): {gb(peak.total)} GB in {peak.name}, by")
        for line in recipe_lines(remedy.keys):
            console.print(f"    {escape(line)}")


def _phases(plan: Plan) -> Table:
    phases = plan.memory.phases
    names = dict.fromkeys(name for phase in phases for name in phase.parts)
    table = Table(box=box.SIMPLE)
    table.add_column("GB on the fullest rank", overflow="fold")
    for phase in phases:
        table.add_column(phase.name, justify="right")
    for name in names:
        # What rounds to nothing everywhere is in the sums alone.
        if max(phase.parts.get(name, 0.0) for phase in phases) < 0.05e9:
            continue
        table.add_row(name, *(gb(phase.parts.get(name, 0.0)) for phase in phases))
    limit = plan.memory.usable
    totals = [f"{gb(phase.total)}{' !' if phase.total > limit else ''}" for phase in phases]
    table.add_row(f"all (of {gb(limit)})", *totals)
    if len(plan.memory.stages) > 1:
        table.add_row("on pipeline stage", *(str(phase.stage) for phase in phases))
    return table


def _pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title, "", box=box.SIMPLE)
    for name, text in rows:
        table.add_row(name, escape(text))
    return table
