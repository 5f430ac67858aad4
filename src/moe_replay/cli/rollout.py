"""`moe-replay rollout`: sample by a recipe's engine, and keep the completions with their routes for training from files.

In: a recipe path, overrides, a folder. Out: an exit code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_replay.cli.environment import set_defaults
from moe_replay.cli.stages import Progress, quiet_transformers, say
from moe_replay.cli.train import with_values
from moe_replay.errors import RecipeError
from moe_replay.grpo.config import Recipe
from moe_replay.grpo.recipe_file import load_recipe
from moe_replay.rollout.types import Engine, RolloutGroup

if TYPE_CHECKING:
    from moe_replay.grpo.inputs import Inputs


def run_rollout(
    recipe_path: str,
    overrides: Sequence[tuple[str, str | None]],
    output: str,
    *,
    num_prompts: int | None,
) -> int:
    """Sample the first ``num_prompts`` training prompts, those of a step by default, exactly as the trainer would.

    Raises:
        MoeReplayError: of the kind that names what went wrong; nothing is left in the folder then.
    """
    set_defaults(os.environ)
    recipe = load_recipe(recipe_path, with_values(overrides))
    count = recipe.prompts_per_step if num_prompts is None else num_prompts
    if recipe.rollout.engine == "files":
        raise RecipeError("rollout.engine is 'files', which samples nothing; choose another engine")
    if count < 1:
        raise RecipeError(f"--num-prompts is {count}, expected at least 1")
    say("loading tokenizer, data and rewards ...")
    from moe_replay.grpo.inputs import open_inputs

    inputs = open_inputs(recipe, Progress())
    for note in inputs.notes:
        say(note)
    # Nothing is scored here.
    inputs.close()
    say(f"starting the {recipe.rollout.engine} engine ...")
    import torch
    from rich.console import Console

    from moe_replay.grpo.engines import recipe_engine, recipe_sampling
    from moe_replay.report.progress import showing_progress
    from moe_replay.rollout.rollout_files import write_rollout

    quiet_transformers()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = recipe_engine(recipe, device)
    completions = count * recipe.rollout.num_generations
    done = _Done()
    try:
        with showing_progress(
            Console(stderr=True, highlight=False),
            engine,
            num_total=completions,
            done=lambda: (done.num_completions, done.num_tokens),
        ):
            manifest = write_rollout(
                Path(output),
                done.counted(_groups(recipe, inputs, engine, count)),
                description=engine.description,
                policy_version=engine.policy_version,
                sampling=recipe_sampling(recipe),
            )
    finally:
        engine.close()
    print(f"wrote {completions} completions of {count} prompts: {manifest}", file=sys.stderr)
    return 0


def _groups(recipe: Recipe, inputs: Inputs, engine: Engine, count: int) -> Iterator[RolloutGroup]:
    """Yield the groups of ``count`` prompts, sampled a step's worth at a time."""
    from moe_replay.grpo.engines import recipe_sampling, training_request

    for start in range(0, count, recipe.prompts_per_step):
        prompts = inputs.train.at(start, min(recipe.prompts_per_step, count - start))
        requests = [training_request(recipe, start + n, p) for n, p in enumerate(prompts)]
        yield from engine.generate(requests, recipe_sampling(recipe))


class _Done:
    """Counts what the calls of an engine have returned."""

    def __init__(self) -> None:
        self.num_completions = self.num_tokens = 0

    def counted(self, groups: Iterator[RolloutGroup]) -> Iterator[RolloutGroup]:
        for group in groups:
            self.num_completions += len(group.completions)
            self.num_tokens += sum(len(c.token_ids) for c in group.completions)
            yield group
