"""Short runs of the demo, one a loss, correction or form of training, in each replay mode.

Writes a line a run to experiments/results/short_runs.jsonl, and docs/short-runs.md from all lines.

    python experiments/short_runs.py                  # what has no line yet; about 25 s a run
    python experiments/short_runs.py --only dapo      # these again
    python experiments/short_runs.py --table          # the page alone
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from commits import commit

from moe_replay.report import RunDirectory

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "short_runs.jsonl"
PAGE = HERE.parent / "docs" / "short-runs.md"
MODES = ("disabled", "R2", "R3")

DEMO = "recipes/demo/recipe.toml"
# Four updates a step, so that there is drift to clip.
SHORT = (
    "--run.max_steps 15 --batch.global_batch_size 32 --batch.steps_per_generation 4 "
    "--optimizer.lr_scheduler constant --replay.live_gap_every 0 --data.eval_size 256"
)
ONE_UPDATE = "--batch.global_batch_size 128 --batch.steps_per_generation 1"
CORRECTION = "--grpo.rollout_importance_sampling_mode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row of the table, in three modes."""

    name: str
    """Its name in the table, in results and for ``--only``."""
    keys: str = ""
    """Its keys, as on a command line."""
    recipe: str = DEMO
    """Its recipe."""
    common: str = SHORT
    """Keys that all variants of its table share."""
    program: str = "-m moe_replay.cli.main"
    """What Python runs."""
    modes: tuple[str, ...] = MODES
    """Modes in which its keys have an effect."""

    def command(self, mode: str) -> str:
        """Return the command of a mode, without its output directory."""
        words = f"python {self.program} train {self.recipe} {self.common} {self.keys}"
        return " ".join(f"{words} --replay.router_replay_mode {mode}".split())


LOSSES = (
    Variant(name="grpo"),
    Variant(name="dapo", keys="--grpo.loss_type dapo"),
    Variant(name="dr_grpo", keys="--grpo.loss_type dr_grpo"),
    Variant(name="cispo", keys="--grpo.loss_type cispo --grpo.epsilon_high 5.0"),
    Variant(name="sapo", keys="--grpo.loss_type sapo"),
    Variant(
        name="sapo, one update a step",
        keys=f"--grpo.loss_type sapo {ONE_UPDATE}",
        modes=("R3",),
    ),
    Variant(name="dppo", keys="--grpo.loss_type dppo"),
    Variant(
        name="sequence (GSPO)",
        keys="--grpo.importance_sampling_level sequence --grpo.epsilon 3e-4 --grpo.epsilon_high 4e-4",
    ),
    Variant(
        name="sequence_token",
        keys="--grpo.importance_sampling_level sequence_token --grpo.epsilon 3e-4 --grpo.epsilon_high 4e-4",
    ),
    Variant(name="delta", keys="--grpo.delta 3.0"),
    Variant(name="clip higher", keys="--grpo.epsilon_high 0.28"),
    Variant(name="entropy bonus", keys="--grpo.entropy_coef 0.01"),
    Variant(name="top entropy", keys="--grpo.top_entropy_quantile 0.2"),
    Variant(name="KL k3", keys="--grpo.beta 0.04"),
    Variant(
        name="KL k3, live reference",
        keys="--grpo.beta 0.04 --replay.reference_routes live",
        modes=("R2", "R3"),
    ),
    Variant(name="KL k3, unbiased", keys="--grpo.beta 0.04 --grpo.use_bias_correction_kl true"),
    Variant(name="KL k2", keys="--grpo.beta 0.04 --grpo.kl_estimator k2"),
    Variant(name="KL in reward", keys="--grpo.beta 0.04 --grpo.kl_in_reward true"),
    Variant(name="rloo", keys="--grpo.advantage_estimator rloo"),
    Variant(name="reinforce_plus_plus", keys="--grpo.advantage_estimator reinforce_plus_plus"),
    Variant(name="no scaling", keys="--grpo.scale_rewards none"),
)
CORRECTIONS = (
    Variant(name="no correction"),
    Variant(name="token_truncate", keys=f"{CORRECTION} token_truncate"),
    Variant(
        name="token_mask",
        keys=f"{CORRECTION} token_mask --grpo.rollout_importance_sampling_min 0.5",
    ),
    Variant(name="sequence_truncate", keys=f"{CORRECTION} sequence_truncate"),
    Variant(name="sequence_mask", keys=f"{CORRECTION} sequence_mask"),
    Variant(
        name="geometric_mask",
        keys=f"{CORRECTION} geometric_mask --grpo.rollout_importance_sampling_threshold 1.01 "
        "--grpo.rollout_importance_sampling_min 0.99",
    ),
    Variant(name="off-policy sequences", keys="--grpo.off_policy_sequence_mask_delta 0.02"),
)
TRUNCATED = (
    Variant(name="top_p", keys="--rollout.top_p 0.9"),
    Variant(name="top_k", keys="--rollout.top_k 5"),
    Variant(name="min_p", keys="--rollout.min_p 0.05"),
)
FORMS = (
    Variant(name="LoRA", keys="--lora.rank 8 --optimizer.lr 4e-4"),
    Variant(
        name="calculator, several turns",
        recipe="examples/calculator/recipe.toml",
        common="",
    ),
)


def renamed(variants: Iterable[Variant], suffix: str, program: str) -> tuple[Variant, ...]:
    """Return variants that another program runs."""
    return tuple(
        Variant(
            name=v.name + suffix, keys=v.keys, recipe=v.recipe, common=v.common, program=program
        )
        for v in variants
    )


GROUPS: Mapping[str, tuple[Variant, ...]] = {
    "Losses, KL and advantages": LOSSES,
    "Corrections, engine in bfloat16": CORRECTIONS[1:],
    "Corrections, engine in float8": renamed(
        CORRECTIONS, ", float8", "experiments/float8_engine.py"
    ),
    "Truncated sampling": TRUNCATED,
    "Forms of training": FORMS,
}


def run(variant: Variant, mode: str, runs: Path, at: str) -> dict[str, object]:
    """Train one variant in one mode, and return what the table needs of it."""
    where = runs / f"{variant.name}-{mode}".replace(" ", "_").replace(",", "")
    words = ["env", "OMP_NUM_THREADS=1", sys.executable, *shlex.split(variant.command(mode))[1:]]
    ended = subprocess.run(
        [*words, "--restart", "--run.output_dir", str(where)],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    line: dict[str, object] = {"variant": variant.name, "mode": mode, "commit": at}
    failed = where / "failed.json"
    if ended.returncode and not failed.exists():
        raise SystemExit(f"{where} did not begin:\n{ended.stderr[-2000:]}")
    if ended.returncode:
        # A run that stops is a result too.
        said = json.loads(failed.read_text())
        stopped = f"step {said['step']}, {said['kind']}: {said['message']}"
        return line | {"stopped": stopped.replace("\n", " ")[:200]}
    return line | measured(where)


def measured(where: Path) -> dict[str, object]:
    """Return what a finished run's directory says."""
    if not (where / "ended.json").exists():
        raise SystemExit(f"{where} has no ended.json: the run was killed")
    directory = RunDirectory(where)
    steps = [record.metrics for record in directory.read_steps()]
    held_out = [record.metrics["eval/reward"] for record in directory.read_evaluations()]
    third = len(steps) // 3
    return {
        "k3": mean(steps, "rollout_correction/k3_kl"),
        "f_1.1": mean(steps, "rollout_correction/extreme_frac_tau_1.1"),
        "outside": mean(steps, "cispo_clip_ratio", "clip_ratio/region_mean"),
        "weight": mean(steps, "rollout_correction/is_weight_mean"),
        "kept_mass": mean(steps, "rollout/kept_mass"),
        "kl": [mean(steps[:1], "kl"), mean(steps, "kl")],
        "ess": mean(steps, "rollout_correction/ess"),
        "rejected": mean(
            steps, "rollout_correction/rejected_frac", "rollout_correction/off_policy_frac"
        ),
        "reward": [mean(steps[:third], "reward"), mean(steps[-third:], "reward")],
        "held_out": [held_out[0], held_out[-1]],
    }


def checked_out() -> str:
    """Return the commit that runs, or raise if what runs is not as it was committed."""
    found = commit()
    if found.endswith("+"):
        raise SystemExit(
            "short_runs: code differs from its commit, which a line of results names; commit it first"
        )
    return found


def mean(steps: Sequence[Mapping[str, float]], *names: str) -> float | None:
    """Return the mean over steps of the first metric that they have, to four digits."""
    for name in names:
        if found := [step[name] for step in steps if name in step]:
            return float(f"{statistics.fmean(found):.4g}")
    return None


def read_results() -> dict[tuple[str, str], dict[str, object]]:
    """Return the last line of each variant and mode."""
    if not RESULTS.exists():
        return {}
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {(line["variant"], line["mode"]): line for line in lines}


def write_results(results: Mapping[tuple[str, str], Mapping[str, object]]) -> None:
    """Write a line a run, in the order of the table."""
    keys = [(v.name, mode) for group in GROUPS.values() for v in group for mode in MODES]
    lines = [json.dumps(results[key]) for key in keys if key in results]
    RESULTS.write_text("".join(line + "\n" for line in lines))


HEAD = """# Short runs

Losses, KL terms and advantages, corrections and forms of training, each with `disabled`, R2 and R3:
that it runs, what it clips and rejects, and what it leaves of the gap. {count} of {planned} runs, on
two shared CPU cores, seed 0; rows that are not here were not run yet. The last column is the commit
that ran. Rows of different commits may come from different kinds of CPU too, whose sums round
differently, so compare rows of one commit. Written by `python experiments/short_runs.py` from
`experiments/results/short_runs.jsonl`.

**One seed and 15 steps say nothing about which row learns better.** Held-out accuracy of the demo
is of 256 items, so two rows differ by chance by some 6 points and more. What the tables do show is
the gap (`k3`, `F(1.1)`) with and without the engine's routes.

The first two tables and LoRA run the demo with

```bash
python -m moe_replay.cli.main train recipes/demo/recipe.toml {short}
```

and the keys of the row, and `--replay.router_replay_mode`. In the table of float8,
`python experiments/float8_engine.py` stands for `python -m moe_replay.cli.main`: it rounds the
engine's copy of the matrices to float8, which is a larger gap than real engines should have.
`python experiments/short_runs.py --only "NAME"` runs one row again.

Columns: `k3` and `F(1.1)` are the engine gap (`rollout_correction/k3_kl`,
`extreme_frac_tau_1.1`); `outside` are tokens beyond the clip range of the ratio, which is policy
drift (`clip_ratio/region_mean`); `W` and `ESS` are the mean weight of a correction and the share
of tokens that counts in effect; `rejected` are tokens that it leaves out; `kept` is the probability
that truncation leaves (`rollout/kept_mass`); `KL` is the metric `kl` of the first step, and the mean
of all. Rewards are means of the first and the last third of the steps; held-out accuracy, that of
the engine, is before and after.
"""


SHOWS: Mapping[str, str] = {
    "Losses, KL and advantages": """R3's gap is two to five times smaller than that of `disabled` and R2, whatever the loss: k3 is 3.8e-4
to 6.0e-4 beside 1.2e-3 to 2.4e-3. R2 leaves it as it is, since it replays the trainer's own routes.
`sequence` and `sequence_token` are the same run, as their gradients are the same; their ranges clip a
third of all tokens, those of the other losses 1 to 2 %. `sapo` in all modes and `cispo` with R2 end
below the accuracy that they began with. With one update a step, where ratios are 1, `sapo` learns
(one run, R3): at this learning rate it does not bear four updates. Why `cispo` falls was not
measured.
""",
    "Corrections, engine in bfloat16": """Under R3 corrections find little or nothing to do. Weights for each token stay within their bounds, so
that `token_truncate` and `token_mask` are the same run, as are `sequence_truncate` and
`sequence_mask`; in `disabled` and R2 the masks reject 0.1 to 0.2 % of the tokens by themselves and
0.5 % by their sequences. The effective share of tokens under weights for a sequence is 0.97 in
`disabled` and R2 and 0.99 in R3. A band of 1 % around 1 for the geometric mean is narrower than the
gap: it rejects 37, 30 and 22 % of the tokens in `disabled`, R2 and R3. `off-policy sequences` looks
at gap and drift together: it rejects 9 to 12 % in every mode.
""",
    "Corrections, engine in float8": """Rounding to float8 makes k3 13 times larger than bfloat16 does (2.3e-2 beside 1.7e-3), and R3 removes
21 to 44 % of it, where it removes some 70 % with bfloat16. The rest is the rounding of the matrices,
which routes do not change. So corrections find nearly as much to do under R3: the effective share of
tokens is 0.97 in `disabled` and R2 and 0.98 in R3 with `token_truncate`, 0.80 and 0.84 with
`sequence_truncate`; `token_mask` rejects 2 % of the tokens in each mode, `sequence_mask` 5 to 6 %. A
correction only weighs what is learned from; k3 stays about as it is. A band of 1 % around 1 for the
geometric mean rejects 78 to 80 % of the tokens in `disabled` and R2, which then hardly learn,
and 73 % in R3.
""",
    "Truncated sampling": """The gap is that of the two engines alone, as without truncation, although 2 % (`top_p`), 0.5 % (`top_k`)
and 1.4 % (`min_p`) of the probability was cut off: the trainer divides by the same candidates. R3
removes 70 to 72 % of it with `top_p` and `top_k`, as much as from plain sampling. With `min_p` it
removes 56 % beside `disabled` and 76 % beside R2, which are about as far apart as runs without
replay are in the tables above.
""",
    "Forms of training": """The calculator is learned in every mode; its one update a step makes R2 the same run as `disabled`,
and R3 makes k3 12 times smaller. With adapters R3 makes it three to four times smaller; 15 steps
teach them nothing yet (60 do, see [adapters](lora.md)).
""",
}
"""What a table shows, in words; written by hand when its rows are there."""


def page(results: Mapping[tuple[str, str], Mapping[str, object]]) -> str:
    """Return the page."""
    parts = [
        HEAD.format(
            count=len(results),
            planned=sum(len(v.modes) for group in GROUPS.values() for v in group),
            short=SHORT.replace(" --", " \\\n    --"),
        )
    ]
    for heading, variants in GROUPS.items():
        ran = [v for v in variants if any((v.name, mode) in results for mode in MODES)]
        if not ran:
            continue
        parts.append(f"\n## {heading}\n\n")
        parts.append(
            "| run | mode | k3 | F(1.1) | outside | W | ESS | rejected | kept | KL | reward | "
            "held-out | commit |\n"
        )
        parts.append("|---|---|---|---|---|---|---|---|---|---|---|---|---|\n")
        for variant in ran:
            modes = [mode for mode in MODES if (variant.name, mode) in results]
            for mode in modes:
                name = variant.name if mode == modes[0] else ""
                parts.append(row(name, mode, results[variant.name, mode]))
        if heading in SHOWS:
            parts.append(f"\n{SHOWS[heading]}")
        parts.append("\n" + "".join(described(v) for v in ran if v.keys or v.recipe != DEMO))
    return "".join(parts)


def described(variant: Variant) -> str:
    """Return the keys of a variant as an item of a list."""
    what = f"`{variant.keys}`" if variant.recipe == DEMO else f"`{variant.command('R3')}`"
    return f"- {variant.name}: {what}\n"


def row(name: str, mode: str, line: Mapping[str, object]) -> str:
    """Return a run as a row of the table."""
    if "stopped" in line:
        return f"| {name} | {mode} | stopped: {line['stopped']} ||||||||||| {line['commit']} |\n"
    first, last = line["reward"]
    before, after = line["held_out"]
    cells = (
        shown(line["k3"], "{:.2e}"),
        shown(line["f_1.1"], "{:.1%}"),
        shown(line["outside"], "{:.1%}"),
        shown(line["weight"], "{:.3f}"),
        shown(line["ess"], "{:.3f}"),
        shown(line["rejected"], "{:.1%}"),
        shown(line.get("kept_mass"), "{:.1%}"),
        " → ".join(shown(kl, "{:.1e}") for kl in line["kl"]) if any(line.get("kl", ())) else "–",
        f"{first:.2f} → {last:.2f}",
        f"{before:.1%} → {after:.1%}",
        str(line["commit"]),
    )
    return f"| {name} | {mode} | {' | '.join(cells)} |\n"


def shown(value: object, form: str) -> str:
    """Return a figure, or a dash where there is none."""
    return "–" if value is None else form.format(value)


def main() -> None:
    """Run what is asked for, and write results and page after each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="names of variants, run again")
    parser.add_argument("--missing", action="store_true", help="of these, those without a line")
    parser.add_argument("--table", action="store_true", help="only write the page")
    parser.add_argument("--runs", type=Path, default=Path("runs/short"), help="where runs go")
    options = parser.parse_args()
    every = {variant.name: variant for group in GROUPS.values() for variant in group}
    if unknown := [name for name in options.only if name not in every]:
        parser.error(f"--only {unknown}: the variants are {list(every)}")
    results = read_results()
    at = "" if options.table else checked_out()
    for variant in every.values():
        for mode in () if options.table else variant.modes:
            has_line = (variant.name, mode) in results
            again = bool(options.only) and not options.missing
            if (variant.name in options.only or not options.only) and (again or not has_line):
                line = run(variant, mode, options.runs.absolute(), at)
                print(json.dumps(line), flush=True)
                # Read again: another process may run other rows.
                write_results(read_results() | {(variant.name, mode): line})
    PAGE.write_text(page(read_results()))


if __name__ == "__main__":
    main()
