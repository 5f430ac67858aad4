"""The gap of vLLM and Megatron in each pair of number formats, live, replayed, and of a dense twin.

vLLM samples in bfloat16 and in float32, with six seeds of noise; Megatron scores what either
sampled, in bfloat16 and in float32. Writes a line a cell to experiments/results/precision.jsonl,
its tables into docs/reproduction.md, and a figure of them to docs/assets/precisions.svg.

    python experiments/trained_models.py      # first
    python experiments/precision.py           # what has no line yet
    python experiments/precision.py --table   # the tables alone
"""

from __future__ import annotations

import process_defaults  # noqa: F401

# isort: split

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from commits import commit
from packed import measure_packed
from precision_picture import OUT, picture_of
from reproduction_results import (
    fill_page,
    keep_row,
    numbers,
    percent,
    plain,
    read_rows,
    rounded,
    scientific,
    table,
)
from trained_models import FOLDER, prompts

from moe_replay.checkpoint.facts import read_facts
from moe_replay.diagnose import Measured, Setting, diagnose
from moe_replay.diagnose.diagnosis import Diagnosis, Gap
from moe_replay.diagnose.megatron_trainer import MegatronTrainer, megatron_trainer
from moe_replay.diagnose.statistics import Estimate, resampled_means
from moe_replay.engines.files.format import Manifest, RolloutFile, begin_rollout
from moe_replay.engines.files.writer import RolloutWriter
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.grpo.metrics import gap_of_tokens

DTYPES = ("bfloat16", "float32")
SEEDS = (0, 1, 2, 3, 4, 5)
NUM_PROMPTS, PROMPT_LENGTH, MAX_COMPLETION = 360, 8, 192
NUM_RESAMPLES = 2000
# What Megatron loads of each model; see `trained_models.write_for_megatron`.
FOR_MEGATRON = {"moe": "moe", "twin": "twin-megatron"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """k3 of each sequence, summed over its tokens, to compare cells of different models."""

    live: list[float] = field(default_factory=list)
    """With the trainer's own routes."""
    replayed: list[float] = field(default_factory=list)
    """Under the engine's routes; empty for a dense model."""
    tokens: list[int] = field(default_factory=list)
    """Sampled tokens."""
    largest: list[float] = field(default_factory=list)
    """Largest difference of a log-probability with live routes, in nats."""

    def watch(self, measured: Iterator[Measured]) -> Iterator[Measured]:
        """Yield what comes, and add it up."""
        for each in measured:
            assert each.rollout_logprobs is not None and each.live_logprobs is not None
            self.live.append(k3_sum(each.live_logprobs, each.rollout_logprobs))
            self.largest.append(float(np.abs(each.live_logprobs - each.rollout_logprobs).max()))
            self.tokens.append(len(each.rollout_logprobs))
            if each.replayed_logprobs is not None:
                self.replayed.append(k3_sum(each.replayed_logprobs, each.rollout_logprobs))
            yield each


def k3_sum(logprobs: np.ndarray, rollout_logprobs: np.ndarray) -> float:
    """Return the sum over tokens of r - 1 - log r."""
    ratio = logprobs.astype(np.float64) - rollout_logprobs.astype(np.float64)
    return float(gap_of_tokens(ratio)["k3_kl"].sum())


def rollout_folder(folder: Path, model: str, dtype: str, seed: int) -> Path:
    """Return where a rollout goes."""
    return folder / "rollouts" / f"{model}-{dtype}-{seed}"


def sample(folder: Path, model: str, dtype: str) -> None:
    """Sample all seeds with one vLLM, unless they are there."""
    from moe_replay.engines.vllm.engine import VllmEngine

    missing = [
        seed
        for seed in SEEDS
        if not (rollout_folder(folder, model, dtype, seed) / "complete").exists()
    ]
    if not missing:
        return
    requests = [
        Request(request_id=number, prompt_ids=np.array(ids, dtype=np.int32), num_generations=1)
        for number, ids in enumerate(prompts(folder, NUM_PROMPTS, length=PROMPT_LENGTH))
    ]
    engine = VllmEngine(
        folder / model,
        dtype=dtype,
        max_context_length=PROMPT_LENGTH + MAX_COMPLETION,
        record_routes=read_facts(folder / model).routed is not None,
    )
    try:
        for seed in missing:
            sampling = SamplingParams(max_completion_length=MAX_COMPLETION, seed=seed)
            where = rollout_folder(folder, model, dtype, seed)
            manifest = Manifest(
                engine=engine.description,
                policy_version=0,
                sampling=sampling,
                first_request=0,
                num_requests=len(requests),
            )
            with RolloutWriter(begin_rollout(where, manifest)) as writer:
                groups = engine.generate(requests, sampling)
                for group in groups:
                    writer.write(group)
                writer.finish()
            (where / "complete").touch()
            count = sum(len(group.completions[0].token_ids) for group in groups)
            print(f"sampled {model} {dtype} seed {seed}: {count} tokens", flush=True)
    finally:
        engine.close()


def measured_seeds(
    folder: Path, model: str, dtype: str, trainer: MegatronTrainer
) -> Iterator[Measured]:
    """Yield the sequences of all seeds as engine and trainer saw them."""
    for seed in SEEDS:
        rollout = RolloutFile(rollout_folder(folder, model, dtype, seed))
        groups = (rollout.group(number) for number in rollout.request_ids)
        for each in measure_packed(groups, trainer):
            yield replace(each, name=f"{seed}/{each.name}")


def measure(folder: Path, trainer_dtype: str) -> None:
    """Score every rollout in one number format, the twin's first, and keep a line each."""
    floors: dict[str, Sums] = {}
    for model in ("twin", "moe"):
        with megatron_trainer(folder / FOR_MEGATRON[model], dtype=trainer_dtype) as trainer:
            for engine_dtype in DTYPES:
                sums = Sums()
                setting = Setting(
                    engine="vllm",
                    engine_dtype=engine_dtype,
                    trainer="megatron",
                    trainer_dtype=trainer_dtype,
                )
                found = diagnose(
                    sums.watch(measured_seeds(folder, model, engine_dtype, trainer)),
                    setting,
                    num_resamples=NUM_RESAMPLES,
                )
                row = row_of(model, found, sums, floors.get(engine_dtype))
                floors.setdefault(engine_dtype, sums)
                keep_row("precision", row)
                print(json.dumps(row), flush=True)


def row_of(model: str, found: Diagnosis, sums: Sums, floor: Sums | None) -> dict[str, object]:
    """Return what the tables need of a cell."""
    setting = found.setting
    row: dict[str, object] = {
        "row": f"{model} {setting.engine_dtype} {setting.trainer_dtype}",
        "commit": commit(),
        "sequences": found.num_sequences,
        "tokens": found.num_tokens,
        "verdict": found.conclusion.cause,
        "largest_difference": rounded(max(sums.largest)),
        "live": gap_numbers(found.live),
        "k3_by_seed": by_seed(sums.live, sums.tokens),
    }
    if found.flips is None:
        return row
    flips = found.flips
    assert found.removed is not None and floor is not None
    return row | {
        "replayed": gap_numbers(found.replayed),
        "replayed_k3_by_seed": by_seed(sums.replayed, sums.tokens),
        "removed": numbers(found.removed),
        "flips": round(flips.flip_frac * flips.num_tokens * len(flips.layers)),
        "pairs": flips.num_tokens * len(flips.layers),
        "flips_by_layer": [rounded(each) for each in flips.flip_frac_by_layer],
        "tokens_with_flip": rounded(flips.tokens_with_flip_frac),
        "slots_in_common": rounded(flips.slot_overlap),
        "margins": None if found.margins is None else margin_numbers(found),
        "live_over_twin": numbers(ratio(sums.live, sums.tokens, floor)),
        "replayed_over_twin": numbers(ratio(sums.replayed, sums.tokens, floor)),
    }


def margin_numbers(found: Diagnosis) -> dict[str, float | None]:
    """Return how close the routers' choices were."""
    assert found.margins is not None
    return {name: rounded(value) for name, value in dataclasses.asdict(found.margins).items()}


def gap_numbers(gap: Gap | None) -> dict[str, list[float | None]]:
    """Return a gap as JSON holds it."""
    assert gap is not None
    beyond = {f"f_{tau:g}": numbers(estimate) for tau, estimate in gap.beyond.items()}
    return {"k1": numbers(gap.k1), "k3": numbers(gap.k3), **beyond}


def by_seed(sums: Sequence[float], tokens: Sequence[int]) -> list[float | None]:
    """Return the mean of each sampling seed; every one has equally many sequences."""
    totals = np.array(sums).reshape(len(SEEDS), -1).sum(axis=1)
    return [rounded(each) for each in totals / np.array(tokens).reshape(len(SEEDS), -1).sum(axis=1)]


def ratio(sums: Sequence[float], tokens: Sequence[int], floor: Sums, *, seed: int = 0) -> Estimate:
    """Return mean k3 over that of the twin, with the 95 % interval over sequences of both.

    The models sampled different texts, so their sequences are drawn independently.
    """
    above = _drawn(sums, tokens, seed=seed)
    below = _drawn(floor.live, floor.tokens, seed=seed + 1)
    value = (sum(sums) / sum(tokens)) / (sum(floor.live) / sum(floor.tokens))
    low, high = np.quantile(above / below, [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high))


def _drawn(sums: Sequence[float], tokens: Sequence[int], *, seed: int) -> np.ndarray:
    counts = np.array(tokens, dtype=np.float64)
    return resampled_means(np.array(sums)[:, None], counts, seed=seed, num_resamples=NUM_RESAMPLES)[
        :, 0
    ]


def judged(interval: Sequence[float]) -> str:
    """Say whether a ratio is within 2, by its interval."""
    _, low, high = interval
    return "confirmed" if high < 2 else "refuted" if low > 2 else "undecided"


def tables() -> dict[str, str]:
    """Return the tables of the page by the names of their marks."""
    rows = read_rows("precision")
    return {
        "parity": parity_table(rows),
        "gaps": gaps_table(rows),
        "routes": routes_table(rows),
        "statement": statement_table(rows),
    }


Rows = Mapping[str, Mapping[str, Any]]
CELLS = [(engine, trainer) for engine in DTYPES for trainer in DTYPES]


def parity_table(rows: Rows) -> str:
    """Return what differs with float32 on both sides."""
    heads = ("model", "tokens", "k3", "largest difference of a log-probability", "flips")
    lines = []
    for name, model in (("MoE", "moe"), ("twin", "twin")):
        row = rows[f"{model} float32 float32"]
        flips = f"{row['flips']:,} of {row['pairs']:,}" if "flips" in row else "–"
        lines.append(
            (
                name,
                f"{row['tokens']:,}",
                scientific(row["live"]["k3"]),
                f"{row['largest_difference']:.1e}",
                flips,
            )
        )
    return table(heads, lines)


def gaps_table(rows: Rows) -> str:
    """Return the gap of each cell: twin, live and replayed."""
    heads = ("vLLM", "Megatron", "model", "tokens", "k1", "k3", "F(1.1)", "F(1.5)", "F(2)")
    lines = []
    for engine, trainer in CELLS:
        moe, twin = rows[f"moe {engine} {trainer}"], rows[f"twin {engine} {trainer}"]
        for name, row, key in (
            ("twin", twin, "live"),
            ("MoE, live", moe, "live"),
            ("MoE, replayed", moe, "replayed"),
        ):
            gap, count = row[key], row["tokens"]
            beyond = (percent(gap[f"f_{tau}"], num_tokens=count) for tau in ("1.1", "1.5", "2"))
            cell = (engine, trainer) if name == "twin" else ("", "")
            k1, k3 = scientific(gap["k1"]), scientific(gap["k3"])
            lines.append((*cell, name, f"{count:,}", k1, k3, *beyond))
    return table(heads, lines)


def routes_table(rows: Rows) -> str:
    """Return flips, what replay removes, and the verdict of each cell."""
    heads = (
        *("vLLM", "Megatron", "flips", "share", "tokens with a flip"),
        *("k3 that replay removes", "by seed", "`diagnose` says"),
    )
    lines = []
    for engine, trainer in CELLS:
        row = rows[f"moe {engine} {trainer}"]
        seeds = zip(row["k3_by_seed"], row["replayed_k3_by_seed"], strict=True)
        shares = ", ".join(f"{100 * (1 - after / before):.0f}" for before, after in seeds)
        has_gap = "bfloat16" in (engine, trainer)
        lines.append(
            (
                engine,
                trainer,
                f"{row['flips']:,} of {row['pairs']:,}",
                f"{100 * row['flips'] / row['pairs']:.2g} %",
                f"{100 * row['tokens_with_flip']:.2g} %",
                percent(row["removed"]) if has_gap else "–",
                f"{shares} %" if has_gap else "–",
                row["verdict"],
            )
        )
    return table(heads, lines)


def statement_table(rows: Rows) -> str:
    """Return how near each cell with a bfloat16 side comes to the twin."""
    heads = ("vLLM", "Megatron", "MoE live / twin", "MoE replayed / twin", "within 2x")
    lines = []
    for engine, trainer in CELLS:
        row = rows[f"moe {engine} {trainer}"]
        if "bfloat16" in (engine, trainer):
            interval = row["replayed_over_twin"]
            shown = plain(row["live_over_twin"]), plain(interval), f"**{judged(interval)}**"
            lines.append((engine, trainer, *shown))
    return table(heads, lines)


def main() -> None:
    """Sample and measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="only write the tables")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="models and rollouts")
    options = parser.parse_args()
    if not options.table:
        for model in FOR_MEGATRON:
            for dtype in DTYPES:
                sample(options.folder, model, dtype)
        done = read_rows("precision")
        for dtype in DTYPES:
            if any(f"{m} {e} {dtype}" not in done for m in FOR_MEGATRON for e in DTYPES):
                measure(options.folder, dtype)
    fill_page(tables())
    OUT.write_text(picture_of(read_rows("precision")))


if __name__ == "__main__":
    main()
