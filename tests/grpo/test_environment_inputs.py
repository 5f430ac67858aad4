"""What an environment adds to a prompt, and what of it a recipe may name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_replay.errors import RecipeError
from moe_replay.recipe.recipe import Recipe
from moe_replay.tasks.encoding import PromptInput
from moe_replay.tasks.environments.client import EnvironmentProcess
from moe_replay.tasks.environments.opening import begun_prompt, check_scored

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "ref"}
BEGUN = {"role": "user", "content": "q [1]"}


def begun(prompt: Any, added: Any, *, continues: bool = True) -> Any:
    given = PromptInput(where="row 1", index=0, prompt=prompt, columns={})
    return begun_prompt(given, added, continues=continues)


def test_the_text_of_reset_ends_the_last_user_message() -> None:
    assert begun("q", " [1]") == "q [1]"
    assert begun([SYSTEM, USER, USER], " [1]") == [SYSTEM, USER, BEGUN]
    # What follows it is a reference answer, which the encoder drops.
    assert begun([USER, ASSISTANT], " [1]", continues=False) == [BEGUN, ASSISTANT]
    tool = {"role": "tool", "content": "t"}
    assert begun([USER, ASSISTANT, tool], " [1]") == [BEGUN, ASSISTANT, tool]
    parts = [{"type": "text", "text": "q"}]
    (message,) = begun([{"role": "user", "content": parts}], " [1]")
    assert message["content"] == [*parts, {"type": "text", "text": " [1]"}]


def test_half_a_surrogate_pair_from_reset_becomes_a_question_mark() -> None:
    assert begun("q", " \ud83d") == "q ?"
    assert begun("q", [{"role": "user", "content": "\ud83d"}]) == [{"role": "user", "content": "?"}]


def test_a_text_of_reset_without_a_place_is_refused() -> None:
    with pytest.raises(RecipeError, match="would come before what the model has begun to say"):
        begun([USER, ASSISTANT], " [1]")
    with pytest.raises(RecipeError, match="the prompt has none"):
        begun([SYSTEM], " [1]")


def test_a_reward_that_an_environment_does_not_give_cannot_be_named(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    code = "    def reset(self, **row): ...\n    def step(self, text): ...\n"
    scores = "    def get_reward(self): return 1.0\n"
    for file, text in (("silent.py", code), ("scoring.py", code + scores)):
        (tmp_path / file).write_text(f"class Echo:\n{text}")

    def checked(file: str, **keys: str) -> None:
        check_scored(
            recipe(
                environment__factory=f"{tmp_path}/{file}:Echo",
                environment__form="step",
                data__eval=loaded.data.train,
                eval__pass_k="[1]",
                **keys,
            ),
            processes[file],
        )

    loaded = recipe(environment__factory=f"{tmp_path}/silent.py:Echo", environment__form="step")
    other = recipe(environment__factory=f"{tmp_path}/scoring.py:Echo", environment__form="step")
    assert loaded.environment is not None and other.environment is not None
    with (
        EnvironmentProcess(loaded.environment) as silent,
        EnvironmentProcess(other.environment) as scoring,
    ):
        processes = {"silent.py": silent, "scoring.py": scoring}
        for key, value in (
            ("eval__pass_reward", "Echo"),
            ("checkpoint__metric_for_best_model", "eval/rewards/Echo"),
        ):
            named = key.replace("__", ".")
            with pytest.raises(RecipeError, match=f"{named} = '{value}' .* Echo has no get_reward"):
                checked("silent.py", **{key: value})
            # The control: one that scores.
            checked("scoring.py", **{key: value})
        checked("silent.py")
