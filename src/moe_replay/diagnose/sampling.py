"""Sample a rollout for a diagnosis: any engine, any prompts, into files that are read like others.

In: a checkpoint, an engine, prompts. Out: a rollout on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_replay.checkpoint.facts import read_facts
from moe_replay.checkpoint.tokenizer import load_tokenizer
from moe_replay.engines.checks import check_groups
from moe_replay.engines.files.format import Manifest, begin_rollout
from moe_replay.engines.files.writer import RolloutWriter
from moe_replay.engines.registry import EngineUse, engine_entry
from moe_replay.engines.types import Engine, Request, SamplingParams
from moe_replay.errors import RecipeError
from moe_replay.grpo.start.digest_cache import DigestCache
from moe_replay.grpo.start.identity import model_digests
from moe_replay.megatron.ranks.messages import all_ranks
from moe_replay.recipe.load import section_from_table
from moe_replay.recipe.sections.locations import GENERATED
from moe_replay.recipe.sections.rollout import RolloutSection, SamplingEngineSection
from moe_replay.recipe.sections.run import DataSection
from moe_replay.tasks.datasets.file_prompts import open_file_prompts
from moe_replay.tasks.encoding import PromptEncoder
from moe_replay.tasks.generated import GeneratedTask
from moe_replay.tasks.prompts import GeneratedPrompts, PromptSource


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """What is sampled."""

    model_dir: Path
    """Checkpoint whose tokenizer encodes the prompts, and which the engine holds."""
    rollout: SamplingEngineSection
    """The engine, and how it samples."""
    prompts: DataSection
    """Where prompts come from."""
    num_prompts: int
    """Prompts, each completed ``rollout.num_generations`` times."""
    seed: int = 0
    """Seed of the sampling noise."""


def engine_section(keys: Mapping[str, object]) -> SamplingEngineSection:
    """Return keys of ``[rollout]`` as a checked section.

    Raises:
        RecipeError: when a key is unknown, wrong, or the engine samples nothing.
    """
    section = section_from_table("rollout", keys, where="the engine")
    if not isinstance(section, SamplingEngineSection):
        raise RecipeError(f"the engine {keys.get('engine')!r} samples nothing: choose another")
    return section


def prompt_section(keys: Mapping[str, object]) -> DataSection:
    """Return keys of ``[data]`` as a checked section.

    Raises:
        RecipeError: when a key is unknown or wrong.
    """
    section = section_from_table("data", keys, where="the prompts")
    assert isinstance(section, DataSection)
    return section


def sample_rollout(plan: SamplingPlan, folder: Path, progress: Callable[[str], None]) -> Path:
    """Sample into ``folder`` and return the manifest of the rollout; the engine is closed again.

    ``progress`` gets a line of text now and then.

    Raises:
        RecipeError: when prompts or engine cannot be opened.
        EngineError: when the engine fails.
    """
    prompts = _open_prompts(plan)
    if prompts.num_prompts is not None and prompts.num_prompts < plan.num_prompts:
        raise RecipeError(
            f"{plan.prompts.train} holds {prompts.num_prompts} prompts, but {plan.num_prompts} are asked for: lower "
            "--num-samples, or give more prompts"
        )
    engine = _open_engine(plan)
    try:
        return _sample(plan, engine, prompts, folder, progress)
    finally:
        engine.close()


def _sample(
    plan: SamplingPlan,
    engine: Engine,
    prompts: PromptSource,
    folder: Path,
    progress: Callable[[str], None],
) -> Path:
    sampling = SamplingParams(
        max_completion_length=plan.rollout.max_completion_length,
        temperature=plan.rollout.temperature,
        top_p=plan.rollout.top_p,
        top_k=plan.rollout.top_k,
        min_p=plan.rollout.min_p,
        stop_token_ids=plan.rollout.stop_token_ids,
        seed=plan.seed,
    )
    manifest = Manifest(
        engine=engine.description,
        policy_version=engine.policy_version,
        sampling=sampling,
        first_request=0,
        num_requests=plan.num_prompts,
        weights=model_digests(plan.model_dir, DigestCache(Path(os.devnull))),
    )
    path = begin_rollout(folder, manifest)
    vocab_size = read_facts(plan.model_dir).vocab_size
    # As many at once as the engine samples together, so that routes of few calls are held.
    step = max(1, plan.rollout.max_batch_size // plan.rollout.num_generations)
    with RolloutWriter(path) as writer:
        for start in range(0, plan.num_prompts, step):
            count = min(step, plan.num_prompts - start)
            requests = _requests(plan, prompts, start, count)
            groups = engine.generate(requests, sampling)
            check_groups(
                groups,
                requests,
                sampling,
                engine.description,
                vocab_size=vocab_size,
                policy_versions=range(engine.policy_version, engine.policy_version + 1),
            )
            for group in groups:
                writer.write(group)
            progress(f"sampled {start + count} of {plan.num_prompts} prompts")
        writer.finish()
    return path


def _requests(
    plan: SamplingPlan, prompts: PromptSource, start: int, count: int
) -> Sequence[Request]:
    return [
        Request(
            request_id=start + number,
            prompt_ids=prompt.prompt_ids,
            num_generations=plan.rollout.num_generations,
        )
        for number, prompt in enumerate(prompts.at(start, count))
    ]


def _open_engine(plan: SamplingPlan) -> Engine:
    section: RolloutSection = plan.rollout
    routed = read_facts(plan.model_dir).routed
    use = EngineUse(
        model_dir=plan.model_dir,
        max_context_length=plan.prompts.max_prompt_length + section.max_completion_length,
        record_routes=routed is not None,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return engine_entry(section).open_engine(section, use, device=device, ranks=all_ranks())


def _open_prompts(plan: SamplingPlan) -> PromptSource:
    encoder = PromptEncoder(tokenizer=load_tokenizer(plan.model_dir), data=plan.prompts)
    encoder.check()
    location = plan.prompts.train
    assert location is not None, "prompts of a diagnosis are one dataset"
    if location.startswith(GENERATED):
        task = GeneratedTask(location.removeprefix(GENERATED), plan.prompts.task)
        return GeneratedPrompts(task=task, seed=plan.prompts.train_seed, encoder=encoder)
    return open_file_prompts(location, encoder)
