"""Real training that drifts as fast as it can, with the guard on: it must never stop a healthy run.

Every step takes eight optimizer steps at a learning rate a thousand times the usual one, so that
the policy of the last mini-batch is far from the one that was sampled from. A run that stops
counts; so does every sample that was dropped or lost.

    python benchmarks/guard_drift.py [--quick] [--lr 1e-3 3e-3] [--steps 100] [--mode R3]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from moe_replay.checkpoint.tokenizer import load_tokenizer
from moe_replay.errors import MisalignmentError
from moe_replay.grpo.loop import train
from moe_replay.recipe.load import recipe_from_table
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import JsonlReporter, RunDirectory
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

UPDATES = 8
REWARD = "def likes_digits(completions, **_):\n    return [sum(map(str.isdigit, c)) / (len(c) + 1) for c in completions]\n"


def main() -> int:
    """Print each run, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="end within 50 s")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--steps", type=int, help="of each run; default 100, quick 6")
    parser.add_argument("--mode", choices=["R2", "R3"], default="R3")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each learning rate")
    arguments = parser.parse_args()
    steps = arguments.steps or (6 if arguments.quick else 100)
    updates = stops = kept_out = 0
    for lr in arguments.lr:
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                recipe = _recipe(Path(folder), lr, steps, arguments.mode, seed)
                started = time.perf_counter()
                stopped = _run(recipe)
                lines = (recipe.run.output_dir / "metrics.jsonl").read_text().splitlines()
                records = [json.loads(line) for line in lines]
            updates += UPDATES * len(records)
            stops += stopped is not None
            lost = sum(r["replay/lost_samples"] + r["replay/dropped_samples"] for r in records)
            kept_out += int(lost)
            print(
                f"lr {lr:g}, seed {seed}: {len(records)} of {steps} steps in {time.perf_counter() - started:.0f} s, agreement "
                f"{min(r['replay/agreement'] for r in records):.3f} to {max(r['replay/agreement'] for r in records):.3f}, "
                f"nearest to a threshold {max(r['replay/guard_margin_nats'] for r in records):.1f} nats, suspects "
                f"{sum(r['replay/suspects'] for r in records):.0f}, kept out {lost:.0f} of {64 * len(records)} samples, mean "
                f"reward of the last steps {sum(r['reward'] for r in records[-5:]) / len(records[-5:]):.2f}"
                f"{f'; STOPPED: {stopped}' if stopped else ''}",
                flush=True,
            )
    for metric, value, unit in (
        ("guard.drift_updates", updates, "updates"),
        ("guard.drift_stops", stops, "runs"),
        ("guard.drift_kept_out", kept_out, "samples"),
    ):
        print(json.dumps({"metric": metric, "value": value, "unit": unit}))
    return 0


def _run(recipe: Recipe) -> str | None:
    """Train in a process of its own; return the message of a stop."""

    def call() -> None:
        torch.set_num_threads(1)
        directory = RunDirectory(recipe.run.output_dir)
        with JsonlReporter(directory, recipe_toml=recipe.resolved_toml()) as reporter:
            train(recipe, process=ProcessSpec(), reporter=reporter)

    try:
        run_ranks(call, 1, timeout_s=3600)
    except MisalignmentError as error:
        return str(error)
    return None


def _recipe(folder: Path, lr: float, steps: int, mode: str, seed: int) -> Recipe:
    model = write_tiny_checkpoint(
        folder / "model", seed=seed, num_hidden_layers=4, num_experts=32, initializer_range=0.1
    )
    load_tokenizer(model)
    prompts = [{"prompt": f"say {number} and {number * 7 % 10}:"} for number in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    (folder / "reward.py").write_text(REWARD)
    return recipe_from_table(
        {
            "run": {"output_dir": str(folder / "out"), "max_steps": steps, "seed": seed},
            "model": {"path": str(model)},
            "data": {"train": str(folder / "train.jsonl"), "max_prompt_length": 32},
            "rewards": [{"function": f"{folder / 'reward.py'}:likes_digits"}],
            "rollout": {"max_completion_length": 32, "num_generations": 8},
            "replay": {"router_replay_mode": mode},
            "batch": {
                "global_batch_size": 64 // UPDATES,
                "steps_per_generation": UPDATES,
                "max_tokens_per_microbatch": 1024,
            },
            "optimizer": {"lr": lr},
            "checkpoint": {"save_steps": steps, "export": False},
        }
    )


if __name__ == "__main__":
    sys.exit(main())
