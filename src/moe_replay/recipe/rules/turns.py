"""The rules between keys about conversations of several turns."""

from __future__ import annotations

from collections.abc import Iterator

from moe_replay.recipe.rule import EffectRule, Problem, Rule
from moe_replay.recipe.sections.environment import EnvironmentSection
from moe_replay.recipe.sections.rollout import FilesEngineSection, RolloutSection
from moe_replay.recipe.sections.run import RewardSection


@Rule
def _turns_are_sampled(
    environment: EnvironmentSection, rollout: FilesEngineSection
) -> Iterator[Problem]:
    yield Problem(
        "rollout.engine",
        f"{rollout.engine!r} with [environment]: later turns depend on what the environment answers, "
        "and cannot be sampled before; choose an engine that samples",
        is_unsupported=True,
    )


@Rule
def _turns_have_one_policy(
    environment: EnvironmentSection, rollout: RolloutSection
) -> Iterator[Problem]:
    if rollout.max_staleness:
        yield Problem(
            "rollout.max_staleness",
            f"{rollout.max_staleness} with [environment]: the rollout of the next step is one call of "
            "the engine in the background, and a conversation takes several, with the environment's "
            "answers between them; set it to 0",
            is_unsupported=True,
        )


@Rule
def _there_is_something_to_act_in(environment: EnvironmentSection) -> Iterator[Problem]:
    if environment.factory is None and environment.form != "tools":
        text = (
            f"missing with environment.form = {environment.form!r}: name the class, as file.py:Class "
            "or module:Class"
        )
        yield Problem("environment.factory", text)
    elif environment.factory is None and not environment.tools:
        text = "missing, and there are no environment.tools: name a class, functions, or both"
        yield Problem("environment.factory", text)


@Rule
def _environment_has_a_name_of_its_own(
    environment: EnvironmentSection, rewards: tuple[RewardSection, ...]
) -> Iterator[Problem]:
    for index, reward in enumerate(rewards):
        if reward.name == environment.name:
            yield Problem(
                f"rewards.{index}.name",
                f"{reward.name!r} is also the class of environment.factory, whose reward goes by that "
                "name in metrics: give the function another name",
            )


@EffectRule
def _no_tool_is_called(environment: EnvironmentSection) -> Iterator[tuple[str, str]]:
    if environment.form != "tools":
        for key in ("tool_parser", "tools"):
            yield f"environment.{key}", f"environment.form is {environment.form!r}, without tools"
    if environment.factory is None:
        for key in ("args", "weight"):
            yield f"environment.{key}", "environment.factory is not set, so there is no class"
