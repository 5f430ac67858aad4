"""`moe-replay record`: the routes that another engine, number format or the trainer takes for tokens that are given.

In: a recipe, a rollout on disk, a folder. Out: a trace file with the same names and tokens, to be compared.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from moe_replay.cli.environment import set_defaults
from moe_replay.cli.stages import quiet_transformers, say
from moe_replay.cli.train import with_values
from moe_replay.engines.files.format import RolloutFile
from moe_replay.engines.recording import GivenTokens, given_tokens, in_calls, record_given
from moe_replay.engines.types import Engine
from moe_replay.errors import RecipeError
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.rollout import SamplingEngineSection
from moe_replay.routing import Routing, RoutingTrace, write_trace_file

Recorder = Callable[[Sequence[GivenTokens]], Iterator[tuple[str, RoutingTrace]]]

_MAX_TOKENS = 16384
"""Tokens, padding included, that one call of an engine is given; a longer sample goes alone."""


def run_record(
    recipe_path: str,
    overrides: Sequence[tuple[str, str | None]],
    source: str,
    output: str,
    *,
    by: str,
) -> int:
    """Run the tokens of a rollout through a recipe's engine or trainer, and write the routes that it takes.

    Raises:
        MoeReplayError: of the kind that names what went wrong; no trace file is left then.
    """
    set_defaults(os.environ)
    recipe = load_recipe(recipe_path, with_values(overrides))
    section = recipe.rollout
    if by == "trainer":
        name = f"trainer-{recipe.model.dtype}"
    elif not isinstance(section, SamplingEngineSection):
        raise RecipeError(
            f"rollout.engine is {section.engine!r}, which runs no model; choose another engine"
        )
    elif recipe.replay.router_replay_mode.passes.engine is not Routing.RECORD:
        raise RecipeError(
            f"replay.router_replay_mode is {recipe.replay.router_replay_mode.value!r}, in which engines record no routes: "
            "add --replay.router_replay_mode R3"
        )
    else:
        name = f"{section.engine}-{section.dtype}"
    rollout = RolloutFile(_manifest_of(Path(source)))
    target = Path(output) / f"{name}.traces"
    if target.exists():
        raise RecipeError(f"{target} exists: choose another --output, or remove it")
    say("starting the trainer ..." if by == "trainer" else f"starting the {name} engine ...")
    quiet_transformers()
    with _recorder(recipe, rollout, by=by) as record:
        counted = _Counted()
        groups = (rollout.group(request_id) for request_id in rollout.request_ids)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"{target.parent} cannot be made: {error}") from error
        write_trace_file(target, counted.all_of(record, given_tokens(groups)))
    print(
        f"recorded {counted.num_traces} traces, {counted.num_valid} of {counted.num_rows} rows: {target}\n"
        f"compare them: moe-replay compare {source} {target}",
        file=sys.stderr,
    )
    return 0


@contextmanager
def _recorder(recipe: Recipe, rollout: RolloutFile, *, by: str) -> Iterator[Recorder]:
    """Yield what turns tokens into traces, started."""
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


def _manifest_of(path: Path) -> Path:
    """Return what a rollout is opened by; each of its shards leads to it as well."""
    beside = path.with_name(path.name.rpartition(".shard-")[0] + ".json")
    return beside if path.suffix in (".traces", ".groups") and beside.is_file() else path


def _check_fit(recipe: Recipe, rollout: RolloutFile, engine: Engine) -> None:
    ours, theirs = engine.description, rollout.manifest.engine
    if not ours.records_routes:
        raise RecipeError(
            f"{recipe.model.path} has no routers that the {ours.name} engine can record; take a mixture-of-experts model"
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

    def all_of(
        self, record: Recorder, samples: Iterator[GivenTokens]
    ) -> Iterator[tuple[str, RoutingTrace]]:
        for call in in_calls(samples, max_tokens=_MAX_TOKENS):
            for name, trace in record(call):
                self.num_traces += 1
                self.num_rows += len(trace)
                self.num_valid += trace.num_valid
                yield name, trace
