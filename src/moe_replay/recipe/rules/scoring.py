"""The rules between keys about what is sampled for and scored: data, rewards, evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from moe_replay.errors import nearest_of
from moe_replay.recipe.rule import EffectRule, Problem, Rule
from moe_replay.recipe.rules.mixing import trained_on
from moe_replay.recipe.sections.environment import EnvironmentSection
from moe_replay.recipe.sections.locations import GENERATED, HUB, has_splits
from moe_replay.recipe.sections.mixture import MixtureSection
from moe_replay.recipe.sections.rollout import FilesEngineSection, RolloutSection
from moe_replay.recipe.sections.run import (
    CheckpointSection,
    DataSection,
    EvalSection,
    HeldOutSection,
    RewardSection,
    held_out_number,
)
from moe_replay.recipe.sections.training import BatchSection, GrpoSection

_KEYS_OF_FILES = (
    "prompt_column",
    "messages_column",
    "columns",
    "drop_columns",
    "final_assistant_message",
    "cache_dir",
)


@Rule
def _reward_names_differ(rewards: tuple[RewardSection, ...]) -> Iterator[Problem]:
    names = [reward.name for reward in rewards]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Problem(
                f"rewards.{index}.name",
                f"{name!r} is also the name of rewards.{names.index(name)}, and metrics go by that "
                "name: give one of them another name",
            )


@Rule
def _eval_samples_differ(eval: EvalSection) -> Iterator[Problem]:
    if eval.temperature == 0 and eval.num_generations > 1:
        yield Problem(
            "eval.num_generations",
            f"{eval.num_generations} completions at temperature 0 are all equal: set "
            "eval.temperature above 0, or num_generations = 1",
        )


def _functions(
    rewards: tuple[RewardSection, ...], environment: EnvironmentSection | None
) -> list[str]:
    """Return the names under which scores are reported."""
    own = [environment.name] if environment is not None and environment.name else []
    return [reward.name for reward in rewards] + own


@Rule
def _passes_can_be_estimated(
    eval: EvalSection,
    rewards: tuple[RewardSection, ...],
    environment: EnvironmentSection | None,
) -> Iterator[Problem]:
    beyond = [k for k in eval.pass_k if k > eval.num_generations]
    if beyond or len(set(eval.pass_k)) < len(eval.pass_k):
        yield Problem(
            "eval.pass_k",
            f"got {list(eval.pass_k)} with eval.num_generations = {eval.num_generations}, expected "
            "numbers of completions up to that, each once: raise num_generations, or lower k",
        )
    names = _functions(rewards, environment)
    if eval.pass_reward is not None and eval.pass_reward not in names:
        yield Problem(
            "eval.pass_reward",
            f"{eval.pass_reward!r} is not the name of a reward function, which are "
            f"{', '.join(names)}{nearest_of(eval.pass_reward, names)}",
        )


@Rule
def _evaluation_is_no_longer_than_the_rollout(
    eval: EvalSection, rollout: RolloutSection
) -> Iterator[Problem]:
    longest = eval.max_completion_length
    if longest is not None and longest > rollout.max_completion_length:
        yield Problem(
            "eval.max_completion_length",
            f"{longest} is above rollout.max_completion_length = {rollout.max_completion_length}, "
            "for which the engine's context is made: lower it, or raise that",
            is_unsupported=True,
        )


@Rule
def _held_out_names_differ(held_out: tuple[HeldOutSection, ...]) -> Iterator[Problem]:
    names = [entry.name for entry in held_out]
    for number, name in enumerate(names):
        if name == "rewards" or name in names[:number]:
            why = "eval/rewards/ are those of functions" if name == "rewards" else "is taken"
            text = f"{name!r}: {why}, and metrics go by that name; give it another one"
            yield Problem(f"held_out.{number}.name", text)
        elif held_out_number(name) in map(held_out_number, names[:number]):
            text = f"{name!r} would have the noise of another set, by chance: give it another name"
            yield Problem(f"held_out.{number}.name", text)


@Rule
def _best_is_measured(
    checkpoint: CheckpointSection,
    data: DataSection,
    eval: EvalSection,
    held_out: tuple[HeldOutSection, ...],
    rewards: tuple[RewardSection, ...],
    environment: EnvironmentSection | None,
) -> Iterator[Problem]:
    functions = _functions(rewards, environment)
    asked = checkpoint.metric_for_best_model
    measured = [f"pass@{k}" for k in eval.pass_k] + [f"rewards/{name}" for name in functions]
    sets = ([""] if data.eval is not None else []) + [f"{entry.name}/" for entry in held_out]
    known = [f"eval/{name}{metric}" for name in sets for metric in ("reward", *measured)]
    if asked is not None and asked not in known:
        there = ", ".join(known) or "none, as neither data.eval nor [[held_out]] is set"
        yield Problem(
            "checkpoint.metric_for_best_model",
            f"{asked!r} is not a metric of this recipe's evaluations, which are {there}"
            f"{nearest_of(asked, known)}",
        )


@EffectRule
def _checkpoint_without_effect(checkpoint: CheckpointSection) -> Iterator[tuple[str, str]]:
    if checkpoint.metric_for_best_model is None:
        yield "checkpoint.greater_is_better", "checkpoint.metric_for_best_model is not set"


@EffectRule
def _data_without_effect(
    data: DataSection,
    mixture: tuple[MixtureSection, ...],
    held_out: tuple[HeldOutSection, ...],
) -> Iterator[tuple[str, str]]:
    own = [location for location in (data.train, data.eval) if location is not None]
    trained = trained_on(data, mixture)
    every = [*own, *(entry.dataset for entry in (*mixture, *held_out))]
    if not any(location.startswith(GENERATED) for location in own):
        yield "data.task", "no dataset is generated by reasoning_gym, of data.train and data.eval"
    if all(location.startswith(GENERATED) for location in every):
        for key in _KEYS_OF_FILES:
            yield f"data.{key}", "every dataset is generated by reasoning_gym"
    if not any(location.startswith(HUB) for location in every):
        yield "data.hub_config", "no dataset is read from the hub (hf:ORG/NAME)"
    if all(location.startswith(GENERATED) for location in trained):
        yield "data.shuffle", "generated items come in random order already"
    if data.train is None:
        for key in ("train_seed", "train_split"):
            yield f"data.{key}", "each table of [[mixture]] has its own"
    elif not data.train.startswith(GENERATED):
        yield "data.train_seed", "data.train is a file; run.seed shuffles it"
    if data.train is not None and not has_splits(data.train):
        yield "data.train_split", "data.train is neither a folder nor a dataset of the hub"
    if data.eval is None:
        for key in ("eval_size", "eval_seed", "eval_split"):
            yield f"data.{key}", "data.eval is not set"
        return
    if not data.eval.startswith(GENERATED):
        yield "data.eval_seed", "data.eval is a file"
    if not has_splits(data.eval):
        yield "data.eval_split", "data.eval is neither a folder nor a dataset of the hub"


@EffectRule
def _held_out_without_effect(held_out: tuple[HeldOutSection, ...]) -> Iterator[tuple[str, str]]:
    for number, entry in enumerate(held_out):
        if not entry.dataset.startswith(GENERATED):
            yield f"held_out.{number}.seed", "its dataset is a file"
            yield f"held_out.{number}.task", "its dataset is a file"
        if not has_splits(entry.dataset):
            why = "its dataset is neither a folder nor a dataset of the hub"
            yield f"held_out.{number}.split", why


@EffectRule
def _eval_without_effect(
    data: DataSection, eval: EvalSection, held_out: tuple[HeldOutSection, ...]
) -> Iterator[tuple[str, str]]:
    if data.eval is None and not held_out:
        for key in type(eval).model_fields:
            yield f"eval.{key}", "data.eval is not set, so nothing is evaluated"
        return
    if eval.temperature == 0:
        for key in ("top_p", "top_k", "min_p"):
            yield f"eval.{key}", "eval.temperature is 0, which takes the most likely token"
    if not eval.pass_k:
        for key in ("pass_reward", "pass_threshold"):
            yield f"eval.{key}", "eval.pass_k is not set"


@Rule
def _files_answer_no_evaluation(
    rollout: FilesEngineSection, data: DataSection, held_out: tuple[HeldOutSection, ...]
) -> Iterator[Problem]:
    given = (["data.eval"] if data.eval is not None else []) + (["held_out"] if held_out else [])
    for key in given:
        yield Problem(
            key,
            f"given with rollout.engine = {rollout.engine!r}, which holds completions of training "
            "prompts only: remove it, or choose an engine that samples",
            is_unsupported=True,
        )


@Rule
def _further_prompts_can_be_sampled(
    grpo: GrpoSection, batch: BatchSection, rollout: RolloutSection
) -> Iterator[Problem]:
    if not grpo.dynamic_sample:
        return
    for is_set, key, why in (
        (
            isinstance(rollout, FilesEngineSection),
            f"rollout.engine = {rollout.engine!r}",
            "it answers the prompts that were sampled before, and no others",
        ),
        (
            rollout.max_staleness > 0,
            f"rollout.max_staleness = {rollout.max_staleness}",
            "the next step is sampled before this one knows which prompts it needs",
        ),
        (
            not batch.balance,
            "batch.balance = false",
            "the replica that sampled more prompts that teach would train on all of them",
        ),
    ):
        if is_set:
            yield Problem("grpo.dynamic_sample", f"true with {key}: {why}", is_unsupported=True)


@EffectRule
def _sampling_without_effect(grpo: GrpoSection) -> Iterator[tuple[str, str]]:
    if not grpo.dynamic_sample:
        yield "grpo.max_resample_times", "grpo.dynamic_sample is false"


@Rule
def _gdpo_has_no_other_estimator(grpo: GrpoSection) -> Iterator[Problem]:
    if grpo.scale_rewards == "gdpo" and grpo.advantage_estimator != "grpo":
        yield Problem(
            "grpo.scale_rewards",
            f"'gdpo' with advantage_estimator = {grpo.advantage_estimator!r}: GDPO compares each "
            "reward with the mean of its group and divides by the spread itself; remove "
            "advantage_estimator, or choose group, batch or none",
        )
