"""A run stops at log-probabilities that are those of the tokens beside theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.engines.types import Completion, RolloutGroup
from moe_replay.errors import MisalignmentError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.recipe.recipe import Recipe
from moe_replay.testing.misrouting import ChangedEngine, each_chosen

from ..test_loop import run
from .test_judging import LONG, every, one

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]
LONGER = LONG | {"rollout__max_completion_length": 64}


def shifted(by: int, chosen: Callable[[int, int], bool]) -> Callable[[Recipe, torch.device], Any]:
    """Return an engine whose log-probabilities come ``by`` tokens late where chosen."""

    def rolled(group: RolloutGroup, number: int) -> Completion:
        completion = group.completions[number]
        return replace(completion, rollout_logprobs=np.roll(completion.rollout_logprobs, by))

    def change(groups: list[RolloutGroup]) -> list[RolloutGroup]:
        return each_chosen(
            groups, lambda group, number: chosen(group.request.request_id, number), rolled
        )

    return lambda recipe, device: ChangedEngine(recipe_engine(recipe, device), change)


@pytest.mark.parametrize(
    ("by", "chosen", "keys", "text"),
    [
        (1, every, {}, r"update 1 of 1: .*all samples: token shift \+1 of log-probabilities"),
        (-1, every, {"batch__steps_per_generation": 2}, r"old_logprobs: .*all samples: .* -1 of"),
        (1, one, {}, r"update 1 of 1: .*sample 14 \(prompt \d+\): token shift \+1"),
    ],
    ids=["late", "early", "one late"],
)
def test_f8_shifted_logprobs_stop_the_run_before_anything_is_learned(
    by: int, chosen: Callable[[int, int], bool], keys: dict[str, Any], text: str, recipe: Recipes
) -> None:
    spoiled = recipe(**LONGER | keys)
    with pytest.raises(MisalignmentError, match=f"(?s)step 1, {text}"):
        run(spoiled, make_engine=shifted(by, chosen))
    assert not list((spoiled.run.output_dir / "checkpoints").glob("*"))


def test_f8_two_ranks_find_the_shift_of_one_sample(recipe: Recipes) -> None:
    with pytest.raises(MisalignmentError, match=r"sample 14 \(prompt \d+\): token shift \+1"):
        run(recipe(**LONGER), make_engine=shifted(1, one), world_size=2)


def test_without_a_guard_shifted_logprobs_warn_and_right_ones_pass(
    recipe: Recipes, capfd: pytest.CaptureFixture[str]
) -> None:
    said = "token shift +1 of log-probabilities"
    keys = LONGER | {"replay__router_replay_mode": "disabled"}
    (record,) = run(recipe(**keys), make_engine=shifted(1, every))
    assert said in capfd.readouterr().out.replace("\n", " ")
    assert record["rollout_correction/ratio_mean"] > 1.5
    (clean,) = run(recipe(**keys), restart=True)
    assert clean["rollout_correction/ratio_mean"] == pytest.approx(1, abs=0.01)
    assert said not in capfd.readouterr().out.replace("\n", " ")
