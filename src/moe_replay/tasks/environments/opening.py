"""The environment of a run, opened and checked, and what it adds to prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moe_replay.checkpoint.facts import read_facts
from moe_replay.errors import RecipeError
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.environment import EnvironmentSection
from moe_replay.tasks.chat_messages import excerpt, well_formed
from moe_replay.tasks.encoding import Prompt, PromptEncoder, PromptInput
from moe_replay.tasks.environments.client import EnvironmentProcess
from moe_replay.tasks.environments.template import TurnTemplate


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenEnvironment:
    """The environment of a run: its process, and how its messages become tokens."""

    section: EnvironmentSection
    """``[environment]``."""
    process: EnvironmentProcess
    """Where it runs."""
    encoder: PromptEncoder
    """How a prompt to which it added becomes tokens."""
    template: TurnTemplate
    """How its messages become tokens."""

    def encoded(self, prompt: Prompt, added: str | list[dict[str, str]] | None) -> Prompt | None:
        """Return a prompt with what the environment adds: a text at its end, or a chat instead.

        None for one that is too long with it and is to be deleted, as ``data.truncation`` says.

        Raises:
            RecipeError: the prompt is too long with it and must not be, or has no place for a text.
        """
        if added is None:
            return prompt
        given = prompt.given
        assert given is not None
        continues = self.encoder.data.final_assistant_message == "continue"
        begun = begun_prompt(given, added, continues=continues)
        given = replace(given, prompt=begun, where=f"{given.where}, after reset")
        longer = self.encoder.encode(given)
        if longer is None:
            return None
        # The encoder knows neither the prompt's dataset nor the columns of others in a mixture, nor
        # the curriculum.
        return replace(
            longer,
            given=prompt.given,
            dataset=prompt.dataset,
            columns=prompt.columns,
            difficulty=prompt.difficulty,
        )


def begun_prompt(
    given: PromptInput, added: str | list[dict[str, str]], *, continues: bool
) -> str | list[dict[str, Any]]:
    """Return a prompt with a text at the end of its last user message, or the chat in its place.

    ``continues``: whether the model continues an assistant's message at the end.

    Raises:
        RecipeError: the text has no place.
    """
    if not isinstance(added, str):
        return [{key: well_formed(text) for key, text in each.items()} for each in added]
    prompt: Any = given.prompt
    text = well_formed(added)
    if isinstance(prompt, str):
        return prompt + text
    if continues and prompt[-1]["role"] == "assistant":
        raise RecipeError(
            f"{given.where}: the chat ends with the assistant's message, which the model continues, so the text "
            f"of reset, {excerpt(text)}, would come before what the model has begun to say: set "
            "data.final_assistant_message = 'drop', or let reset return None"
        )
    at = max((n for n, each in enumerate(prompt) if each["role"] == "user"), default=None)
    if at is None:
        raise RecipeError(
            f"{given.where}: reset returned {excerpt(text)}, which is added to the last user message, and the "
            f"prompt has none (roles: {', '.join(each['role'] for each in prompt)}): add one, or let reset "
            "return None"
        )
    user = prompt[at]
    content = user["content"]
    longer = content + ([{"type": "text", "text": text}] if isinstance(content, list) else text)
    return [*prompt[:at], {**user, "content": longer}, *prompt[at + 1 :]]


def check_scored(recipe: Recipe, process: EnvironmentProcess) -> None:
    """Raise `RecipeError` unless completions are scored, and by what the recipe names."""
    assert recipe.environment is not None
    if not recipe.rewards and not process.description.has_reward:
        raise RecipeError(
            f"nothing scores completions: {recipe.environment.what} has no get_reward, and there is no "
            "[[rewards]] table: add one of the two"
        )
    name = recipe.environment.name
    if process.description.has_reward or name in [reward.name for reward in recipe.rewards]:
        return
    best = recipe.checkpoint.metric_for_best_model or ""
    for key, value, names_it in (
        ("eval.pass_reward", recipe.eval.pass_reward, recipe.eval.pass_reward == name),
        ("checkpoint.metric_for_best_model", best, best.endswith(f"/rewards/{name}")),
    ):
        if names_it:
            raise RecipeError(
                f"{key} = {value!r} is the reward of the environment, but {process.description.name} has no "
                "get_reward: add the method, or name a function of [[rewards]]"
            )


def open_environment(
    recipe: Recipe, process: EnvironmentProcess, encoder: PromptEncoder
) -> OpenEnvironment:
    """Return an environment whose messages the tokenizer's chat template can write.

    Raises:
        RecipeError: it has none, or one that cannot go on after a turn.
    """
    section = recipe.environment
    assert section is not None
    if not encoder.has_template:
        raise RecipeError(
            f"[environment] needs a chat template, which says how turns follow each other, and the "
            f"tokenizer of {recipe.model.path} has none: add chat_template.jinja to the model directory"
        )
    ends = {*read_facts(recipe.model.path).eos_ids, *recipe.rollout.stop_token_ids}
    template = TurnTemplate(
        encoder.tokenizer,
        end_ids=ends,
        tools=process.description.tools,
        arguments=recipe.data.chat_template_kwargs,
    )
    return OpenEnvironment(section=section, process=process, encoder=encoder, template=template)
