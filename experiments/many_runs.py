"""What replay does to training: 1, 2, 4 and 8 updates a rollout in each mode, on five seeds.

Writes a line a run to experiments/results/many_runs.jsonl, and the tables of
docs/reproduction-training.md from all lines. Runs go seed by seed, so an interrupted experiment has
whole seeds.

    python experiments/many_runs.py                            # what has no line yet
    python experiments/many_runs.py --group sweep --seeds 0 1  # of these alone
    python experiments/many_runs.py --table                    # the tables alone
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import many_runs_tables
from commits import commit

from moe_replay.report import RunDirectory

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "many_runs.jsonl"
PAGE = HERE.parent / "docs" / "reproduction-training.md"
MODES = ("disabled", "R2", "R3")
SEEDS = (0, 1, 2, 3, 4)
UPDATES = (1, 2, 4, 8)
SAMPLES = 128
"""Completions a step, which N updates share."""

COMMON = (
    "--optimizer.lr_scheduler constant --data.eval_size 256 --checkpoint.export false "
    "--checkpoint.save_steps 1000 --logging.completions 0"
)
SWEEP = f"--run.max_steps 8 --eval.every_steps 4 {COMMON}"
HARSH = f"--run.max_steps 24 --eval.every_steps 12 --grpo.epsilon 0.999 --grpo.epsilon_high 1000 {COMMON}"
"""Longer, and without clipping."""
FLOAT8 = "experiments/float8_engine.py"
SERIES = {
    "reward": "reward",
    "k3": "rollout_correction/k3_kl",
    "f_1.1": "rollout_correction/extreme_frac_tau_1.1",
    "clipped": "clip_ratio/region_mean",
    "grad_norm": "grad_norm",
    "flips": "replay/flip_frac",
    "live_k3": "live_gap/k3_kl",
}
"""Name in a line -> metric, whose value in each step is kept; null where a step has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One run."""

    group: str
    """The table that it belongs to."""
    name: str
    """What distinguishes it in its group, beside the seed and the mode."""
    updates: int
    """Optimizer steps a rollout."""
    mode: str
    """``router_replay_mode``."""
    seed: int
    """``run.seed``: prompts, their noise and what is sampled."""
    keys: str = SWEEP
    """Its other keys, as on a command line."""
    program: str = "-m moe_replay.cli.main"
    """What Python runs."""

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        """What its line is found by."""
        return (self.group, self.name, self.updates, self.mode, self.seed)

    @property
    def command(self) -> str:
        """The command, without its output directory."""
        # A second forward pass, where the mode's own gap is not the live one already.
        live = 4 if self.mode == "R3" else 0
        return (
            f"python {self.program} train recipes/demo/recipe.toml {self.keys} "
            f"--batch.global_batch_size {SAMPLES // self.updates} "
            f"--batch.steps_per_generation {self.updates} --replay.live_gap_every {live} "
            f"--replay.router_replay_mode {self.mode} --run.seed {self.seed}"
        )


def sweep(seeds: Sequence[int]) -> Iterator[Setting]:
    """Yield the runs of the sweep, seed by seed.

    With one update R2 repeats `disabled`, which one seed has to show.
    """
    for seed in seeds:
        for updates in UPDATES:
            for mode in MODES:
                if (updates, mode) != (1, "R2") or seed == SEEDS[0]:
                    yield Setting(group="sweep", name="demo", updates=updates, mode=mode, seed=seed)


def collapse(seeds: Sequence[int]) -> Iterator[Setting]:
    """Yield attempts at a setting in which `disabled` collapses and R3 does not, of one seed."""
    tried = (
        ("float8, lr 1e-4", 8, "1e-4", FLOAT8),
        ("float8, lr 3e-4", 8, "3e-4", FLOAT8),
        ("float8, lr 5e-5", 8, "5e-5", FLOAT8),
        ("float8, lr 3e-4", 1, "3e-4", FLOAT8),
        ("bfloat16, lr 1e-4", 8, "1e-4", "-m moe_replay.cli.main"),
    )
    for name, updates, rate, program in tried:
        for mode in MODES:
            if (updates, mode) != (1, "R2"):
                yield Setting(
                    group="collapse",
                    name=name,
                    updates=updates,
                    mode=mode,
                    seed=seeds[0],
                    keys=f"{HARSH} --optimizer.lr {rate}",
                    program=program,
                )


GROUPS = {"sweep": sweep, "collapse": collapse}


def run(setting: Setting, runs: Path) -> dict[str, object]:
    """Train one setting, and return its line."""
    where = runs / "-".join(map(str, setting.key)).replace(" ", "_").replace(",", "")
    words = ["env", "OMP_NUM_THREADS=1", sys.executable, *shlex.split(setting.command)[1:]]
    ended = subprocess.run(
        [*words, "--restart", "--run.output_dir", str(where)],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    names = ("group", "name", "updates", "mode", "seed")
    line: dict[str, object] = dict(zip(names, setting.key, strict=True)) | {"commit": commit()}
    if ended.returncode:
        # A run that stops is a result too.
        said = [text for text in ended.stderr.splitlines() if "Error" in text]
        line["stopped"] = (said or ended.stderr.strip().splitlines() or ["?"])[-1][:300]
    directory = RunDirectory(where)
    if not (where / "metrics.jsonl").exists():
        return line
    steps = [record.metrics for record in directory.read_steps()]
    line |= {name: [digits(step.get(of)) for step in steps] for name, of in SERIES.items()}
    line["by_update"] = {
        name: [
            mean([step.get(f"replay/{name}/update_{number}") for step in steps])
            for number in range(1, setting.updates + 1)
        ]
        for name in ("flip_frac", "agreement")
    }
    held_out = [(record.step, record.metrics) for record in directory.read_evaluations()]
    line["held_out"] = {str(step): digits(metrics["eval/reward"]) for step, metrics in held_out}
    line["digest"] = digest([*steps, *(metrics for _, metrics in held_out)])
    return line


def digest(records: Sequence[Mapping[str, float]]) -> str:
    """Return a digest of every metric, to the last bit, but for those that only a replay has."""
    kept = [
        sorted((name, value.hex()) for name, value in record.items() if plain(name))
        for record in records
    ]
    return hashlib.blake2b(json.dumps(kept).encode(), digest_size=8).hexdigest()


def plain(name: str) -> bool:
    """Whether a metric has the same meaning in every mode."""
    return not name.startswith(("replay/", "live_gap/", "memory/"))


def digits(value: float | None) -> float | None:
    """Return a figure to four digits."""
    return None if value is None else float(f"{value:.4g}")


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that are there, to four digits."""
    found = [value for value in values if value is not None]
    return digits(sum(found) / len(found)) if found else None


def read_results(path: Path = RESULTS) -> dict[tuple[str, str, int, str, int], dict]:
    """Return the last line of each setting."""
    if not path.exists():
        return {}
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return {
        (line["group"], line["name"], line["updates"], line["mode"], line["seed"]): line
        for line in lines
    }


def write_results(results: Mapping[tuple[str, str, int, str, int], Mapping[str, object]]) -> None:
    """Write a line a run."""
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in results.values()))


def main() -> None:
    """Run what is asked for, and write results after each run and the tables at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", choices=[*GROUPS], help="runs of this table alone")
    parser.add_argument("--modes", nargs="+", default=MODES, help="of these modes alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of these seeds alone")
    parser.add_argument("--again", action="store_true", help="also runs that have a line")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    parser.add_argument("--runs", type=Path, default=Path("runs/many"), help="where runs go")
    options = parser.parse_args()
    results = read_results()
    wanted = [
        setting
        for name, group in GROUPS.items()
        if options.group in (None, name)
        for setting in group(options.seeds)
        if setting.mode in options.modes and (options.again or setting.key not in results)
    ]
    for setting in () if options.table else wanted:
        line = run(setting, options.runs.absolute())
        results[setting.key] = line
        print(json.dumps(line), flush=True)
        write_results(results)
    many_runs_tables.write(PAGE, list(results.values()))


if __name__ == "__main__":
    main()
