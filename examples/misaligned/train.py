"""Train the demo three times: with R3, without replay, and with R3 where one sample of 32 is wrong.

    OMP_NUM_THREADS=1 python examples/misaligned/train.py --output runs/three
    moe-replay report runs/three/R3 runs/three/disabled runs/three/planted --out three.html

In step 20 of the third run the engine gives one completion the routes of its tokens one row late.
`replay.on_misaligned = "drop"` keeps that sample out of training; with `--on-misaligned stop`, as
by default, the guard stops the run there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from moe_replay.engines.types import Engine, RolloutGroup
from moe_replay.errors import MisalignmentError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.loop import train
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.misrouting import MisroutingEngine, one_row_late

DEMO = Path(__file__).resolve().parents[2] / "recipes" / "demo" / "recipe.toml"
PLANTED = (78, 1)
"""Prompt 78 is the third of step 20 (4 a step): its second completion of 8 is sample 17 there."""


def is_planted(group: RolloutGroup, number: int) -> bool:
    """Whether a completion gets wrong routes."""
    return (group.request.request_id, number) == PLANTED


def misrouting_engine(recipe: Recipe, device: torch.device) -> Engine:
    """Return the recipe's engine with one wrong completion."""
    return MisroutingEngine(recipe_engine(recipe, device), one_row_late, is_planted)


def main() -> None:
    """Train the three runs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/three"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--on-misaligned", choices=("drop", "stop"), default="drop")
    parser.add_argument("--only", choices=("R3", "disabled", "planted"), help="of the three")
    options = parser.parse_args()
    for name, mode, make_engine in (
        ("R3", "R3", recipe_engine),
        ("disabled", "disabled", recipe_engine),
        ("planted", "R3", misrouting_engine),
    ):
        if options.only not in (None, name):
            continue
        keys = {
            "run.output_dir": str((options.output / name).absolute()),
            "run.max_steps": options.steps,
            "replay.router_replay_mode": mode,
            "batch.global_batch_size": 32,
            "rollout.max_batch_size": 32,
            "data.eval_size": 128,
        }
        if mode == "R3":
            keys["replay.on_misaligned"] = options.on_misaligned
        else:
            keys["replay.live_gap_every"] = 0
        recipe = load_recipe(DEMO, keys)
        directory = RunDirectory(recipe.run.output_dir)
        try:
            with build_reporter(recipe, rank=0, run_directory=directory) as reporter:
                train(recipe, process=ProcessSpec(), reporter=reporter, make_engine=make_engine)
        except MisalignmentError as error:
            print(f"{name} was stopped: {error}")


if __name__ == "__main__":
    main()
