"""`moe-replay record`: the routes that another engine, or another number format, takes for tokens that are given.

In: a recipe, a rollout on disk, a folder. Out: a trace file with the same names and tokens, to be compared.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_replay.cli.environment import set_defaults
from moe_replay.cli.stages import quiet_transformers, say
from moe_replay.cli.train import with_values
from moe_replay.errors import RecipeError
from moe_replay.grpo.config import Recipe
from moe_replay.grpo.recipe_file import load_recipe
from moe_replay.rollout.rollout_files import RolloutFile
from moe_replay.rollout.types import Engine
from moe_replay.routing import RoutingTrace, write_trace_file

_MAX_TOKENS = 16384
"""Tokens, padding included, that one call of an engine is given; a longer sample goes alone."""


def run_record(
    recipe_path: str, overrides: Sequence[tuple[str, str | None]], source: str, output: str
) -> int:
    """Run the tokens of a rollout through a recipe's engine, and write the routes that it takes.

    Raises:
        MoeReplayError: of the kind that names what went wrong; no trace file is left then.
    """
    set_defaults(os.environ)
    recipe = load_recipe(recipe_path, with_values(overrides))
    if recipe.rollout.engine == "files":
        raise RecipeError("rollout.engine is 'files', which runs no model; choose another engine")
    if not recipe.replays:
        raise RecipeError(
            "replay.router_replay_mode is 'disabled', so that engines record no routes: add "
            "--replay.router_replay_mode R3"
        )
    rollout = RolloutFile(_manifest_of(Path(source)))
    target = Path(output) / f"{recipe.rollout.engine}-{recipe.rollout.dtype}.traces"
    if target.exists():
        raise RecipeError(f"{target} exists: choose another --output, or remove it")
    say(f"starting the {recipe.rollout.engine} engine ...")
    import torch

    from moe_replay.grpo.engines import recipe_engine

    quiet_transformers()
    engine = recipe_engine(recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        _check_fit(recipe, rollout, engine)
        counted = _Counted()
        target.parent.mkdir(parents=True, exist_ok=True)
        write_trace_file(target, counted.all_of(engine, rollout))
    except OSError as error:
        raise RecipeError(f"{target} cannot be written: {error}") from error
    finally:
        engine.close()
    print(
        f"recorded {counted.num_traces} traces, {counted.num_valid} of {counted.num_rows} rows: {target}\n"
        f"compare them: moe-replay compare {source} {target}",
        file=sys.stderr,
    )
    return 0


def _manifest_of(path: Path) -> Path:
    """Return what a rollout is opened by; its trace file and its lines lead to it as well."""
    beside = path.with_suffix(".json")
    return beside if path.suffix in (".traces", ".jsonl") and beside.is_file() else path


def _check_fit(recipe: Recipe, rollout: RolloutFile, engine: Engine) -> None:
    ours, theirs = engine.description, rollout.manifest.engine
    if not ours.records_routes:
        raise RecipeError(
            f"the {ours.name} engine records no routes by this recipe: add --replay.router_replay_mode R3, and take a "
            "mixture-of-experts model"
        )
    shapes = [(each.moe_layers, each.num_experts, each.topk) for each in (ours, theirs)]
    if theirs.records_routes and shapes[0] != shapes[1]:
        raise RecipeError(
            f"{rollout.path} was sampled from a model with (MoE layers, experts, top-k) {shapes[1]}, {recipe.model.path} "
            f"has {shapes[0]}: routes of different models cannot be compared"
        )


class _Counted:
    """Counts what was recorded while it is written."""

    def __init__(self) -> None:
        self.num_traces = self.num_rows = self.num_valid = 0

    def all_of(self, engine: Engine, rollout: RolloutFile) -> Iterator[tuple[str, RoutingTrace]]:
        from moe_replay.rollout.recording import given_tokens, record_given

        groups = (rollout.group(request_id) for request_id in rollout.request_ids)
        for name, trace in record_given(engine, given_tokens(groups), max_tokens=_MAX_TOKENS):
            self.num_traces += 1
            self.num_rows += len(trace)
            self.num_valid += trace.num_valid
            yield name, trace
