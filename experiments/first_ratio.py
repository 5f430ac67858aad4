"""What the importance ratio starts at: with right routes in each mode, and with each planted fault.

Samples once with the demo's model, plants a fault, and lets the trainer score the same tokens under
its unchanged weights; then trains one step with the guard on, which says whether the fault stops a
run. Writes experiments/results/first_ratio.jsonl and the table of docs/reproduction-training.md.

    python experiments/first_ratio.py            # some minutes
    python experiments/first_ratio.py --table    # the table alone
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commits import commit
from float8_engine import Float8Engine
from many_runs import PAGE
from many_runs_tables import put, table
from picture import requests

from moe_replay.diagnose.statistics import TokenSums
from moe_replay.engines.embedded import entry
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Completion, Request, RolloutGroup, SamplingParams
from moe_replay.errors import MoeReplayError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.loop import train
from moe_replay.grpo.metrics import gap_of_tokens
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.routing import Routing
from moe_replay.testing.misrouting import (
    ChangedEngine,
    Ids,
    MisroutingEngine,
    Plant,
    of_another,
    one_row_late,
)
from moe_replay.testing.policies import pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import RoutedSample

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "first_ratio.jsonl"
DEMO = HERE.parent / "recipes" / "demo"
ENGINES = {"bfloat16": EmbeddedEngine, "float8": Float8Engine}
NUM_PROMPTS = 64
"""Of 8 completions each."""
NUM_EXPERTS = 32

Groups = list[RolloutGroup]


# Faults of routes. A plant gets the rows of a completion that have a route.


def one_row_early(ids: Ids, others: Sequence[Ids]) -> Ids:
    """Give every row the route of the row after it; the last keeps its own."""
    return np.concatenate([ids[1:], ids[-1:]])


def layers_rotated(ids: Ids, others: Sequence[Ids]) -> Ids:
    """Give every layer the routes of the layer before it; the first those of the last."""
    return np.roll(ids, 1, axis=1)


def random_experts(ids: Ids, others: Sequence[Ids]) -> Ids:
    """Give every row random experts."""
    noise = np.random.default_rng(ids.astype(int).sum()).random((*ids.shape[:2], NUM_EXPERTS))
    return noise.argsort(axis=2)[..., : ids.shape[2]].astype(ids.dtype)


def first_experts(ids: Ids, others: Sequence[Ids]) -> Ids:
    """Give every row the experts 0 to K - 1, as a buffer filled with a range holds them."""
    return np.broadcast_to(np.arange(ids.shape[2], dtype=ids.dtype), ids.shape).copy()


def expert_zero(ids: Ids, others: Sequence[Ids]) -> Ids:
    """Give every row expert 0, K times, as a buffer filled with zeros holds it."""
    return np.zeros_like(ids)


def wrapped(ids: Ids, others: Sequence[Ids]) -> Ids:
    """Return ids modulo half the experts; a repeated one moves on to the next free expert."""
    found = np.sort(ids % (NUM_EXPERTS // 2), axis=2)
    for slot in range(1, found.shape[2]):
        found[..., slot] = np.maximum(found[..., slot], found[..., slot - 1] + 1)
    return found


def routed(plant: Plant, *, one_of_32: bool = False) -> Callable[[Groups], Groups]:
    """Return what plants wrong routes into all completions, or into one of 32."""

    def chosen(group: RolloutGroup, number: int) -> bool:
        return not one_of_32 or is_one_in_32(group, number)

    return lambda groups: MisroutingEngine(Sampled(groups), plant, chosen).generate(
        [], SamplingParams(max_completion_length=1)
    )


def is_one_in_32(group: RolloutGroup, number: int) -> bool:
    """Choose one of the 32 completions of four prompts."""
    return number == 0 and group.request.request_id % 4 == 0


def each(change: Callable[[Completion], Completion]) -> Callable[[Groups], Groups]:
    """Return what changes every completion."""
    return lambda groups: [
        replace(group, completions=tuple(map(change, group.completions))) for group in groups
    ]


def of_one_in_32(change: Callable[[Completion], Completion]) -> Callable[[Groups], Groups]:
    """Return what changes one completion of 32."""
    return lambda groups: [
        replace(
            group,
            completions=tuple(
                change(completion) if is_one_in_32(group, number) else completion
                for number, completion in enumerate(group.completions)
            ),
        )
        for group in groups
    ]


def half_covered(completion: Completion) -> Completion:
    """Omit the route of every second row."""
    assert completion.trace is not None
    valid = completion.trace.valid & (np.arange(len(completion.trace)) % 2 == 0)
    return replace(completion, trace=replace(completion.trace, valid=valid))


def logprobs_late(completion: Completion) -> Completion:
    """Give every token the log-probability of the token before it."""
    found = completion.rollout_logprobs
    return replace(completion, rollout_logprobs=np.concatenate([found[:1], found[:-1]]))


def logprobs_early(completion: Completion) -> Completion:
    """Give every token the log-probability of the token after it."""
    found = completion.rollout_logprobs
    return replace(completion, rollout_logprobs=np.concatenate([found[1:], found[-1:]]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the table: what is planted, and how the trainer scores."""

    name: str
    """What the table calls it."""
    change: Callable[[Groups], Groups] = lambda groups: groups
    """Plants a fault into what was sampled."""
    routing: Routing = Routing.REPLAY
    """How the trainer routes."""
    sampled_at: float = 1.0
    """Temperature of sampling."""
    top_p: float = 1.0
    """Limit of sampling; the engine's log-probabilities are then those among what is left."""
    scored_at: float = 1.0
    """Temperature of the trainer's log-probabilities."""
    is_raw: bool = False
    """Whether the engine reports log-probabilities before the temperature."""
    is_tried: bool = True
    """Whether a step of training is tried with the guard on."""


ROWS = (
    Row(name="nothing; `disabled` and R2", routing=Routing.LIVE, is_tried=False),
    Row(name="nothing; R3"),
    Row(name="routes one token late", change=routed(one_row_late)),
    Row(name="the same, 1 of 32 samples", change=routed(one_row_late, one_of_32=True)),
    Row(name="routes one token early", change=routed(one_row_early)),
    Row(name="layers rotated by one", change=routed(layers_rotated)),
    Row(name="routes of another sample", change=routed(of_another)),
    Row(name="random routes", change=routed(random_experts)),
    Row(name="expert 0, four times", change=routed(expert_zero)),
    Row(name="experts 0 to 3 everywhere", change=routed(first_experts)),
    Row(name="ids modulo 16, repeats moved on", change=routed(wrapped)),
    Row(name="every second row without a route", change=each(half_covered)),
    Row(name="log-probabilities one token late", change=each(logprobs_late)),
    Row(name="log-probabilities one token early", change=each(logprobs_early)),
    Row(
        name="log-probabilities late, 1 of 32 samples",
        change=of_one_in_32(logprobs_late),
    ),
    Row(
        name="log-probabilities late, sampled at 0.7",
        change=each(logprobs_late),
        sampled_at=0.7,
        scored_at=0.7,
        is_tried=False,
    ),
    Row(
        name="log-probabilities late, top-p 0.9",
        change=each(logprobs_late),
        top_p=0.9,
        is_tried=False,
    ),
    Row(
        name="sampled at 0.7, engine reports those at 1",
        sampled_at=0.7,
        scored_at=0.7,
        is_raw=True,
        is_tried=False,
    ),
    Row(name="sampled at 0.7, trainer scores at 1", sampled_at=0.7, is_tried=False),
    Row(name="top-p 0.9, trainer scores the full vocabulary", top_p=0.9, is_tried=False),
)


class Sampled:
    """An engine that has sampled already."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> Groups:
        """Return what it holds."""
        return self._groups


def sample(engine: str, *, temperature: float, top_p: float, num_prompts: int) -> Groups:
    """Return completions of the demo's prompts."""
    made = ENGINES[engine](DEMO / "model", dtype="bfloat16")
    sampling = SamplingParams(
        max_completion_length=24, temperature=temperature, top_p=top_p, keeps_candidates=top_p < 1
    )
    return made.generate(requests(num_prompts), sampling)


def samples_of(groups: Groups) -> list[RoutedSample]:
    """Return completions as the trainer's samples, without what truncation left."""
    return [
        RoutedSample(
            sample_id=number,
            token_ids=np.concatenate([prompt, completion.token_ids]),
            prompt_length=len(prompt),
            rollout_logprobs=completion.rollout_logprobs,
            advantage=1.0,
            trains=True,
            trace=completion.trace,
        )
        for number, (prompt, completion) in enumerate(
            (group.request.prompt_ids, completion)
            for group in groups
            for completion in group.completions
        )
        if completion.trace is not None
    ]


def log_ratios(row: Row, groups: Groups) -> list[np.ndarray]:
    """Return the trainer's minus the engine's log-probability of each token, sample by sample."""
    samples = samples_of(row.change(groups))

    def score() -> list[np.ndarray]:
        actor = start_policy(DEMO / "model", grouped_experts=True)
        packed = pack(samples, max_tokens=2048, scorer=actor)
        found = actor.score(packed, temperature=row.scored_at, routing=row.routing).samples
        engine = [one.rollout_logprobs for one in samples]
        if row.is_raw:
            # What an engine of the trainer's own arithmetic would report, one of no gap.
            raw = actor.score(packed, temperature=1.0, routing=row.routing).samples
            engine = [raw[one.sample_id].token_logprobs for one in samples]
        return [
            found[one.sample_id].token_logprobs.astype(np.float64) - logprobs
            for one, logprobs in zip(samples, engine, strict=True)
        ]

    return run_ranks(score, 1)[0]


def statistics(found: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return the figures of log ratios, intervals by a bootstrap over samples."""
    sums = TokenSums()
    for one in found:
        gap = gap_of_tokens(one)
        sums.add({name: gap[name] for name in ("ratio_mean", "k3_kl", "extreme_frac_tau_2")})
    ratios = np.exp(np.concatenate(found))
    line: dict[str, Any] = {"samples": len(found), "tokens": len(ratios)}
    means = sums.means(seed=0)
    for name in ("ratio_mean", "k3_kl"):
        estimate = means[name]
        line[name] = [digits(x) for x in (estimate.value, estimate.low, estimate.high)]
    line["f_2"] = digits(float((np.abs(np.log(ratios)) > np.log(2)).mean()))
    names = (1, 50, 99)
    line["percentiles"] = {
        str(name): digits(x) for name, x in zip(names, np.percentile(ratios, names), strict=True)
    }
    line["max"] = digits(float(ratios.max()))
    return line


def digits(value: float) -> float:
    """Return a figure to four digits."""
    return float(f"{value:.4g}")


def tried(engine: str, row: Row) -> dict[str, Any]:
    """Train a step with the fault and the guard on, and return what stopped it.

    If nothing did, ``stopped`` is empty, and ``agreement`` is what the step measured.
    """
    with tempfile.TemporaryDirectory(prefix="first-ratio-") as folder:
        recipe = load_recipe(
            DEMO / "recipe.toml",
            {
                "run.output_dir": folder,
                "run.max_steps": 1,
                "data.eval_size": 8,
                "optimizer.warmup_steps": 0,
                "checkpoint.export": False,
            },
        )
        try:
            run_ranks(lambda: train_once(recipe, engine, row), 1)
        except MoeReplayError as error:
            return {"stopped": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        (step,) = RunDirectory(recipe.run.output_dir).read_steps()
    return {"stopped": "", "agreement": digits(step.metrics["replay/agreement"])}


def train_once(recipe: Recipe, engine: str, row: Row) -> None:
    """Train by a recipe with the fault, without output; in a process of its own."""
    entry.EmbeddedEngine = ENGINES[engine]
    process = ProcessSpec(rank=0, world_size=1)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        build_reporter(
            recipe, rank=0, run_directory=RunDirectory(recipe.run.output_dir)
        ) as reporter,
    ):
        train(
            recipe,
            process=process,
            reporter=reporter,
            make_engine=lambda r, device: ChangedEngine(recipe_engine(r, device), row.change),
        )


def measure(engine: str, row: Row, groups: Groups) -> dict[str, Any]:
    """Return the line of a row."""
    line: dict[str, Any] = {"engine": engine, "planted": row.name, "commit": commit()}
    try:
        line |= statistics(log_ratios(row, groups))
    except MoeReplayError as error:
        return line | {"refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return line | (tried(engine, row) if row.is_tried else {})


def read_results() -> list[dict[str, Any]]:
    """Return the lines of the results."""
    return [json.loads(text) for text in RESULTS.read_text().splitlines()]


HEADINGS = (
    "engine", "planted", "mean ratio", "median", "1 %", "99 %", "max", "k3", "F(2)", "guard",
)  # fmt: skip


def shown(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the table."""
    return table(HEADINGS, map(table_row, lines))


def table_row(line: Mapping[str, Any]) -> list[str]:
    """Return a line as a row of the table."""
    names = [line["engine"], line["planted"]]
    if "refused" in line:
        return [*names, "refused: " + line["refused"].partition(":")[0], *["–"] * 6, "–"]
    value, low, high = line["ratio_mean"]
    percentiles = line["percentiles"]
    guard = "–"
    if "agreement" in line:
        guard = f"goes on, agreement {line['agreement']:.1%}"
    elif "stopped" in line:
        guard = "stops: " + line["stopped"].partition(":")[0]
    return [
        *names,
        f"{plain(value)} ({plain(low)} to {plain(high)})",
        plain(percentiles["50"]),
        f"{percentiles['1']:.2g}",
        plain(percentiles["99"]),
        plain(line["max"]),
        f"{line['k3_kl'][0]:.1e}",
        f"{line['f_2']:.1%}",
        guard,
    ]


def plain(ratio: float) -> str:
    """Return a ratio to three decimals, a large one without any."""
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:,.0f}"


def main() -> None:
    """Measure every row with both engines, and write results and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    lines = read_results() if options.table else []
    torch.set_num_threads(1)
    for engine in () if options.table else ENGINES:
        held: dict[tuple[float, float], Groups] = {}
        for row in ROWS:
            how = (row.sampled_at, row.top_p)
            if how not in held:
                held[how] = sample(
                    engine, temperature=how[0], top_p=how[1], num_prompts=NUM_PROMPTS
                )
            lines.append(measure(engine, row, held[how]))
            print(json.dumps(lines[-1]), flush=True)
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    PAGE.write_text(put(PAGE.read_text(), "first-ratio", shown(lines)))


if __name__ == "__main__":
    main()
