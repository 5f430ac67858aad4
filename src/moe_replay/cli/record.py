"""`moe-replay record`: how another engine, number format or the trainer routes given tokens."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from moe_replay.cli.environment import set_defaults
from moe_replay.cli.stages import quiet_transformers, say
from moe_replay.cli.trace_files import manifest_of
from moe_replay.engines.files.format import RolloutFile
from moe_replay.engines.recording import GivenTokens, given_tokens, in_calls, record_given
from moe_replay.engines.types import Engine
from moe_replay.errors import RecipeError
from moe_replay.grpo.start.device import on_this_device
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.rollout import SamplingEngineSection
from moe_replay.routing import Routing, RoutingTrace, write_trace_file

Recorder = Callable[[Sequence[GivenTokens]], Iterator[tuple[str, RoutingTrace]]]

_MAX_TOKENS = 16384
"""Maximum tokens, padding included, of one engine call; a longer sample gets its own call."""


def run_record(options: argparse.Namespace) -> int:
    """Run the tokens of a rollout through a recipe's engine or trainer, and write the routes.

    Raises:
        MoeReplayError: of the matching kind; no trace file is left behind.
    """
    set_defaults(os.environ)
    recipe = load_recipe(options.recipe, options.overrides)
    section, by = recipe.rollout, options.by
    if by == "trainer":
        recipe = on_this_device(recipe)
        name = f"trainer-{recipe.model.dtype}"
    elif not isinstance(section, SamplingEngineSection):
        raise RecipeError(
            f"rollout.engine is {section.engine!r}, which runs no model; choose another engine"
        )
    elif recipe.replay.router_replay_mode.passes.engine is not Routing.RECORD:
        raise RecipeError(
            f"replay.router_replay_mode is {recipe.replay.router_replay_mode.value!r}, which records no routes in the engine: "
            "add --replay.router_replay_mode R3"
        )
    else:
        name = f"{section.engine}-{section.dtype}"
    rollout = RolloutFile(manifest_of(Path(options.source)))
    target = Path(options.output) / f"{name}.traces"
    if target.exists():
        raise RecipeError(f"{target} exists: choose another --output, or remove it")
    say("starting the trainer ..." if by == "trainer" else f"starting the {name} engine ...")
    quiet_transformers()
    with _recorder(recipe, rollout, by=by) as record:
        counted = Counter()
        groups = (rollout.group(request_id) for request_id in rollout.request_ids)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"{target.parent} cannot be created: {error}") from error
        write_trace_file(target, _recorded(record, given_tokens(groups), counted))
    print(
        f"recorded {counted['traces']} traces, {counted['valid']} of {counted['rows']} rows: {target}\n"
        f"compare them: moe-replay compare {options.source} {target}",
        file=sys.stderr,
    )
    return 0


@contextmanager
def _recorder(recipe: Recipe, rollout: RolloutFile, *, by: str) -> Iterator[Recorder]:
    """Start the engine or trainer, and yield the function that turns tokens into traces."""
    if by == "trainer":
        # Loads Megatron-Core.
        from moe_replay.grpo.trainer_recorder import trainer_recorder

        with trainer_recorder(recipe) as record:
            yield record
        return
    import torch

    from moe_replay.grpo.engines import recipe_engine

    engine = recipe_engine(recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        _check_fit(recipe, rollout, engine)
        yield partial(record_given, engine)
    finally:
        engine.close()


def _check_fit(recipe: Recipe, rollout: RolloutFile, engine: Engine) -> None:
    ours, theirs = engine.description, rollout.manifest.engine
    if not ours.records_routes:
        raise RecipeError(
            f"{recipe.model.path} has no routers that the {ours.name} engine can record: use a mixture-of-experts model"
        )
    shapes = [(each.moe_layers, each.num_experts, each.topk) for each in (ours, theirs)]
    if theirs.records_routes and shapes[0] != shapes[1]:
        raise RecipeError(
            f"{rollout.path} was sampled from a model with (MoE layers, experts, top-k) {shapes[1]}, {recipe.model.path} "
            f"has {shapes[0]}: routes of different models cannot be compared"
        )


def _recorded(
    record: Recorder, samples: Iterator[GivenTokens], counted: Counter[str]
) -> Iterator[tuple[str, RoutingTrace]]:
    """Record in calls of bounded size; count traces and rows while they are written."""
    for call in in_calls(samples, max_tokens=_MAX_TOKENS):
        for name, trace in record(call):
            counted.update(traces=1, rows=len(trace), valid=trace.num_valid)
            yield name, trace
