"""`moe-replay rollout`: sample with a recipe's engine and write completions with their routes."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.cli.environment import read_process, set_defaults
from moe_replay.cli.stages import Progress, quiet_transformers, say
from moe_replay.engines.checks import check_groups
from moe_replay.engines.types import Engine, RolloutGroup
from moe_replay.errors import RecipeError, UnsupportedError
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.rollout import SamplingEngineSection

if TYPE_CHECKING:
    from moe_replay.engines.files.format import Manifest
    from moe_replay.engines.files.writer import RolloutWriter
    from moe_replay.grpo.inputs import Inputs
    from moe_replay.megatron.ranks.messages import HostGroup


def run_rollout(options: argparse.Namespace) -> int:
    """Sample training prompts as the trainer would, by default one step; write each at once.

    When it is started again after a kill, it samples what is missing. Under torchrun every rank
    samples its share.

    Raises:
        MoeReplayError: of the kind that names what went wrong; finished groups stay.
    """
    process = read_process(os.environ)
    set_defaults(os.environ)
    recipe = load_recipe(options.recipe, options.overrides)
    wanted = _wanted(recipe, options)
    say("loading tokenizer, data and rewards ...")
    from moe_replay.grpo.inputs import open_inputs

    inputs = open_inputs(recipe, Progress())
    for note in inputs.notes:
        say(note)
    # Nothing is scored here.
    inputs.close()
    say(f"starting the {recipe.rollout.engine} engine ...")
    from moe_replay.cli.rollout_ranks import joined_ranks
    from moe_replay.grpo.engines import recipe_engine

    quiet_transformers()
    with ExitStack() as closing:
        ranks, device = closing.enter_context(
            joined_ranks(process, wait_limit=recipe.run.wait_limit)
        )
        engine = recipe_engine(recipe, device)
        closing.callback(engine.close)
        _push(recipe, engine, options.policy_version)
        text = _sample(recipe, inputs, engine, wanted, Path(options.output), ranks)
    say(text)
    return 0


def _wanted(recipe: Recipe, options: argparse.Namespace) -> range:
    """Return the positions of the prompts to sample among the training prompts."""
    if not isinstance(recipe.rollout, SamplingEngineSection):
        raise RecipeError(
            f"rollout.engine is {recipe.rollout.engine!r}, which samples nothing: choose another engine"
        )
    if recipe.environment is not None:
        raise UnsupportedError(
            "the recipe has an [environment], whose answers decide what the next turns are; files hold "
            "completions of one turn: train with an engine that samples, or remove the section"
        )
    given = options.num_prompts
    count = recipe.prompts_per_step if given is None else given
    for option, value, minimum in (
        ("--num-prompts", count, 1),
        ("--first-prompt", options.first_prompt, 0),
        ("--policy-version", options.policy_version, 0),
    ):
        if value < minimum:
            raise RecipeError(f"{option} is {value}, expected at least {minimum}")
    return range(options.first_prompt, options.first_prompt + count)


def _push(recipe: Recipe, engine: Engine, policy_version: int) -> None:
    """Set the policy version of the engine's weights, which it has loaded as version 0."""
    if policy_version:
        from moe_replay.checkpoint.facts import checkpoint_tensors

        weights = checkpoint_tensors(recipe.model.path)
        engine.load_weights(weights, policy_version=policy_version)


def _sample(
    recipe: Recipe, inputs: Inputs, engine: Engine, wanted: range, folder: Path, ranks: HostGroup
) -> str:
    """Sample what is missing, and return a summary; collective."""
    from rich.console import Console

    from moe_replay.engines.files.format import begin_rollout, rollout_name
    from moe_replay.engines.files.writer import RolloutWriter, union_of
    from moe_replay.report.progress import showing_progress

    path = folder / f"{rollout_name(engine.description, engine.policy_version)}.json"
    if ranks.rank == 0:
        begin_rollout(folder, _manifest(recipe, engine, wanted))
    ranks.barrier()
    with RolloutWriter(path, rank=ranks.rank, num_ranks=ranks.size) as writer:
        _check_kept(recipe, inputs, writer, where=str(path))
        present = union_of(ranks.gather(list(writer.kept)), str(path))
        cut = sum(ranks.gather(writer.num_cut_bytes))
        if present or cut:
            say(
                f"continuing: {len(present)} of {len(wanted)} prompts are already there; removed {cut} bytes of an unfinished one"
            )
        calls = list(_calls(wanted, present, recipe.prompts_per_step, ranks))
        done = Counter()
        with showing_progress(
            Console(stderr=True, highlight=False, quiet=ranks.rank > 0),
            engine,
            num_total=sum(map(len, calls)) * recipe.rollout.num_generations,
            done=lambda: (done["completions"], done["tokens"]),
        ):
            for group in _groups(recipe, inputs, engine, calls):
                writer.write(group)
                done["completions"] += len(group.completions)
                done["tokens"] += sum(len(c.token_ids) for c in group.completions)
        writer.finish()
        sampled = sum(ranks.gather(done["completions"]))
    return f"wrote {sampled} completions of {len(wanted) - len(present)} prompts: {path}"


def _manifest(recipe: Recipe, engine: Engine, wanted: range) -> Manifest:
    from moe_replay.engines.files.format import Manifest
    from moe_replay.grpo.engines import recipe_sampling
    from moe_replay.grpo.start.digest_cache import DigestCache
    from moe_replay.grpo.start.identity import model_digests

    return Manifest(
        engine=engine.description,
        policy_version=engine.policy_version,
        sampling=recipe_sampling(recipe),
        first_request=wanted.start,
        num_requests=len(wanted),
        weights=model_digests(recipe.model.path, DigestCache(Path(os.devnull))),
    )


def _check_kept(recipe: Recipe, inputs: Inputs, writer: RolloutWriter, *, where: str) -> None:
    """Raise `RecipeError` unless existing groups were sampled for the prompts of this recipe."""
    for kept in writer.kept_requests():
        step = recipe.step_of(kept.request_id)
        (prompt,) = inputs.train.at(kept.request_id, 1, step=step)
        asked = prompt.prompt_ids, recipe.rollout.num_generations
        if not np.array_equal(kept.prompt_ids, asked[0]) or kept.num_generations != asked[1]:
            raise RecipeError(
                f"{where}: request {kept.request_id} was sampled {kept.num_generations} times for the prompt "
                f"{kept.prompt_ids[:8].tolist()}..., this recipe asks for {asked[1]} samples of {asked[0][:8].tolist()}...: the "
                "dataset, its order (run.seed), the tokenizer or rollout.num_generations changed; choose another folder"
            )


def _calls(wanted: range, present: set[int], step: int, ranks: HostGroup) -> Iterator[list[int]]:
    """Yield the requests of each engine call of this rank: its share of a step's missing prompts.

    Every rank makes equally many calls, some of them empty, because ranks that share an engine must
    call together. Example: two ranks share two steps of 3 prompts as ``[0, 2], [4]`` and ``[1], [3,
    5]``: the odd one alternates.
    """
    for turn, start in enumerate(range(0, len(wanted), step)):
        missing = [each for each in wanted[start : start + step] if each not in present]
        if missing:
            yield missing[(ranks.rank - turn * step) % ranks.size :: ranks.size]


def _groups(
    recipe: Recipe, inputs: Inputs, engine: Engine, calls: Sequence[Sequence[int]]
) -> Iterator[RolloutGroup]:
    from moe_replay.checkpoint.facts import read_facts
    from moe_replay.grpo.engines import recipe_sampling, training_request

    vocab_size, sampling = read_facts(recipe.model.path).vocab_size, recipe_sampling(recipe)
    shares_engine = recipe.rollout.ranks_per_engine > 1
    for ids in calls:
        if not ids and not shares_engine:
            continue
        requests = [
            training_request(recipe, request_id, prompt)
            for request_id in ids
            for prompt in inputs.train.at(request_id, 1, step=recipe.step_of(request_id))
        ]
        groups = engine.generate(requests, sampling)
        check_groups(
            groups,
            requests,
            sampling,
            engine.description,
            vocab_size=vocab_size,
            policy_versions=range(engine.policy_version, engine.policy_version + 1),
        )
        yield from groups
