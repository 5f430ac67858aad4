"""Controls of the reproduction: wrong routes, some of the routes, and Megatron's own, replayed.

On the rollout of vLLM in bfloat16 that `precision.py` sampled, scored by Megatron in float32. It
writes a line a control to experiments/results/controls.jsonl, and its tables into the page.

    python experiments/controls.py           # after precision.py
    python experiments/controls.py --table   # the tables alone
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from commits import commit
from packed import PACKED, measure_packed, sample, sample_of, score
from precision import DTYPES, SEEDS, k3_sum, rollout_folder
from reproduction_results import (
    fill_page,
    flips_of,
    keep_row,
    numbers,
    percent,
    read_rows,
    rounded,
    scientific,
    table,
)
from trained_models import FOLDER

from moe_replay.diagnose import Measured, Setting, diagnose
from moe_replay.diagnose.megatron_trainer import MegatronTrainer, megatron_trainer
from moe_replay.engines.files.format import RolloutFile
from moe_replay.engines.types import RolloutGroup
from moe_replay.routing import RoutingTrace
from moe_replay.testing.misrouting import of_another, one_layer_late, one_row_late
from moe_replay.testing.samples import random_routes

ENGINE_DTYPE, TRAINER_DTYPE = "bfloat16", "float32"
LAYER = 4
ONE_OF = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A sequence, and what a control may need of others."""

    measured: Measured
    """As engine and trainer saw it."""
    num_prompt: int
    """Tokens of its prompt."""
    others: Sequence[np.ndarray]
    """Routes of some other sequences."""

    @property
    def trace(self) -> RoutingTrace:
        """The engine's routes."""
        assert self.measured.recorded is not None
        return self.measured.recorded


Control = Callable[[Case, np.random.Generator], RoutingTrace]


def planted(plant: Callable[..., np.ndarray]) -> Control:
    """Return a control that changes the ids of rows with routes."""

    def control(case: Case, rng: np.random.Generator) -> RoutingTrace:
        ids = case.trace.expert_ids.copy()
        ids[case.trace.valid] = plant(ids[case.trace.valid], case.others)
        return replace(case.trace, expert_ids=ids)

    return control


def at_random(case: Case, rng: np.random.Generator) -> RoutingTrace:
    """Return random experts in every row."""
    ids = random_routes(rng, case.trace.expert_ids, case.trace.num_experts)
    return replace(case.trace, expert_ids=ids.astype(case.trace.expert_ids.dtype))


def half_of_the_rows(case: Case, rng: np.random.Generator) -> RoutingTrace:
    """Return the routes of half of the rows, drawn at random."""
    return replace(case.trace, valid=case.trace.valid & (rng.random(len(case.trace)) < 0.5))


def prompt_live(case: Case, rng: np.random.Generator) -> RoutingTrace:
    """Return the routes of the completion alone."""
    return replace(
        case.trace, valid=case.trace.valid & (np.arange(len(case.trace)) >= case.num_prompt)
    )


def completion_live(case: Case, rng: np.random.Generator) -> RoutingTrace:
    """Return the routes of the prompt alone."""
    return replace(
        case.trace, valid=case.trace.valid & (np.arange(len(case.trace)) < case.num_prompt)
    )


CONTROLS: Mapping[str, Control] = {
    "every row replayed": lambda case, rng: case.trace,
    "prompts live": prompt_live,
    "half of the rows, at random": half_of_the_rows,
    "completions live": completion_live,
    "one layer a token late": planted(one_layer_late(LAYER)),
    "a token late": planted(one_row_late),
    "layers rotated by one": planted(lambda ids, others: np.roll(ids, 1, axis=1)),
    "routes of another sample": planted(of_another),
    "random experts": at_random,
}
PARTIAL = f"one of {ONE_OF} samples a token late"
SETTING = Setting(
    engine="vllm", engine_dtype=ENGINE_DTYPE, trainer="megatron", trainer_dtype=TRAINER_DTYPE
)


def cases(folder: Path, trainer: MegatronTrainer, seeds: Sequence[int]) -> list[Case]:
    """Score every sequence live and replayed."""
    found = []
    for seed in seeds:
        for each in measure_packed(rollout_groups(folder, seed), trainer):
            found.append(replace(each, name=f"{seed}/{each.name}"))
    routes = [each.recorded.expert_ids[each.recorded.valid] for each in found]
    return [
        Case(
            measured=each,
            num_prompt=len(each.token_ids) - len(each.rollout_logprobs),
            others=[routes[(number + 7) % len(routes)]],
        )
        for number, each in enumerate(found)
    ]


def rollout_groups(folder: Path, seed: int) -> Iterator[RolloutGroup]:
    """Yield what vLLM sampled."""
    rollout = RolloutFile(rollout_folder(folder, "moe", ENGINE_DTYPE, seed))
    return (rollout.group(number) for number in rollout.request_ids)


def under(control: Control, every: Sequence[Case], trainer: MegatronTrainer) -> Iterator[Measured]:
    """Yield the sequences as the trainer sees them under the routes of a control."""
    rng = np.random.default_rng(0)
    for start in range(0, len(every), PACKED):
        some = every[start : start + PACKED]
        traces = [control(case, rng) for case in some]
        samples = [
            sample(case.measured.token_ids, case.num_prompt, n) for n, case in enumerate(some)
        ]
        for case, trace, scored in zip(some, traces, score(trainer, samples, traces), strict=True):
            yield replace(case.measured, recorded=trace, replayed_logprobs=scored.logprobs)


def row_of(name: str, measured: Sequence[Measured]) -> dict[str, object]:
    """Return what the table needs of a control."""
    found = diagnose(measured, SETTING)
    assert found.replayed is not None and found.removed is not None and found.flips is not None
    assert found.routes is not None
    return {
        "row": name,
        "commit": commit(),
        "sequences": found.num_sequences,
        "tokens": found.num_tokens,
        "k3_live": numbers(found.live.k3),
        "k3": numbers(found.replayed.k3),
        "f_2": numbers(found.replayed.beyond[2.0]),
        "removed": numbers(found.removed),
        "coverage": rounded(found.flips.num_tokens / sum(len(m.token_ids) - 1 for m in measured)),
        "slots_in_common": rounded(found.flips.slot_overlap),
        "verdict": found.conclusion.cause,
        "named": len({finding.sample for finding in found.routes.misaligned}),
        "causes": [cause[:160] for cause in found.conclusion.causes[:2]],
    }


def measure_controls(folder: Path, seeds: Sequence[int]) -> Iterator[dict[str, object]]:
    """Yield a line a control."""
    with megatron_trainer(folder / "moe", dtype=TRAINER_DTYPE) as trainer:
        every = cases(folder, trainer, seeds)
        late: list[Measured] = []
        for name, control in CONTROLS.items():
            measured = list(under(control, every, trainer))
            late = measured if name == "a token late" else late
            yield row_of(name, measured)
        yield row_of(
            PARTIAL,
            [late[n] if n % ONE_OF == 0 else case.measured for n, case in enumerate(every)],
        )


def measure_own(folder: Path, dtype: str, seed: int) -> Iterator[dict[str, object]]:
    """Yield lines of Megatron beside itself: its own routes replayed, and packed beside alone."""
    tokens = different = 0
    largest, gap, pairs = 0.0, 0.0, []
    groups = list(rollout_groups(folder, seed))
    with megatron_trainer(folder / "moe", dtype=dtype) as trainer:
        for start in range(0, len(groups), PACKED):
            samples = [sample_of(g, n) for n, g in enumerate(groups[start : start + PACKED])]
            own = score(trainer, samples)
            again = score(trainer, samples, [each.live for each in own])
            for each, first, second in zip(samples, own, again, strict=True):
                tokens += len(first.logprobs)
                different += int((first.logprobs != second.logprobs).sum())
                (alone,) = score(trainer, [replace(each, sample_id=0)])
                largest = max(largest, float(np.abs(first.logprobs - alone.logprobs).max()))
                gap += k3_sum(first.logprobs, alone.logprobs)
                pairs.append((alone.live, first.live))
    yield {
        "row": f"own routes replayed, {dtype}",
        "commit": commit(),
        "tokens": tokens,
        "different": different,
    }
    yield {
        "row": f"packed beside alone, {dtype}",
        "commit": commit(),
        "tokens": tokens,
        "k3": rounded(gap / tokens),
        "largest_difference": rounded(largest),
        **flips_of(pairs),
    }


def tables() -> dict[str, str]:
    """Return the tables of the page by the names of their marks, of what was measured."""
    rows = read_rows("controls")
    return {"controls": controls_table(rows), "own": own_table(rows)}


Rows = Mapping[str, Mapping[str, Any]]


def controls_table(rows: Rows) -> str:
    """Return what wrong and partial routes do, and what `diagnose` says to them."""
    heads = ("routes replayed", "k3", "of live", "F(2)", "rows", "slots", "samples", "verdict")
    lines = []
    for name in (*CONTROLS, PARTIAL):
        if (row := rows.get(name)) is None:
            continue
        if not lines:
            lines.append(("none: live", scientific(row["k3_live"]), "1", "", "0 %", "", "", ""))
        lines.append(
            (
                name,
                scientific(row["k3"]),
                f"{float(format(row['k3'][0] / row['k3_live'][0], '.3g')):,.4g}",
                percent(row["f_2"], num_tokens=row["tokens"]),
                f"{100 * row['coverage']:.3g} %",
                f"{100 * row['slots_in_common']:.3g} %",
                f"{row['named']:,}",
                ": ".join((row["verdict"], *map(first_words, row["causes"][:1]))),
            )
        )
    return table(heads, lines)


def first_words(cause: str) -> str:
    """Return what a finding says before its details."""
    return cause.split(";")[0].split(" (prompt")[0]


def own_table(rows: Rows) -> str:
    """Return how Megatron compares with itself."""
    heads = (
        "Megatron",
        "own routes replayed: tokens that differ",
        "packed beside alone: flips",
        "k3",
        "largest difference",
    )
    lines = []
    for dtype in DTYPES:
        exact = rows.get(f"own routes replayed, {dtype}")
        packed = rows.get(f"packed beside alone, {dtype}")
        if exact is not None and packed is not None:
            lines.append(
                (
                    dtype,
                    f"{exact['different']:,} of {exact['tokens']:,}",
                    f"{packed['flips']:,} of {packed['pairs']:,}",
                    f"{packed['k3']:.1e}",
                    f"{packed['largest_difference']:.1e}",
                )
            )
    return table(heads, lines)


def main() -> None:
    """Measure all controls, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="only write the tables")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="models and rollouts")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of sampling")
    options = parser.parse_args()
    if not options.table:
        for row in measure_controls(options.folder, options.seeds):
            keep_row("controls", row)
            print(json.dumps(row), flush=True)
        for dtype in DTYPES:
            for row in measure_own(options.folder, dtype, options.seeds[0]):
                keep_row("controls", row)
                print(json.dumps(row), flush=True)
    fill_page(tables())


if __name__ == "__main__":
    main()
