"""Dynamic sampling: which prompts a step learns from, and how many rounds it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_replay.engines.types import Completion, FinishReason, Request, RolloutGroup
from moe_replay.errors import RecipeError
from moe_replay.grpo.metrics import Tally
from moe_replay.grpo.rounds import Rounds
from moe_replay.grpo.types import Rated, Rollout
from moe_replay.recipe.recipe import Recipe
from moe_replay.tasks.encoding import Prompt
from moe_replay.testing.synthetic_routes import synthetic_trace

from .test_loop import metrics_of, run

Recipes = Callable[..., Recipe]
# Prompt `say N and M:` has equal rewards where N is odd; the items come in the order of N.
ODD_IS_EQUAL = """
def f(completions, completion_ids, prompts, **columns):
    odd = [int(prompt.split()[1]) % 2 for prompt in prompts]
    return [1.0 if o else float(sum(ids)) for o, ids in zip(odd, completion_ids)]
"""

TRACE = synthetic_trace(np.array([3, 4], dtype=np.int32), seed=0)


def a_round(first: int, rewards: list[tuple[float, float]], own: tuple[int, ...]) -> Rated:
    """Return a round of prompts ``first``, ``first + 1``... of which this rank sampled ``own``."""

    def completion(number: int) -> Completion:
        return Completion(
            token_ids=np.array([number], dtype=np.int32),
            rollout_logprobs=np.zeros(1, dtype=np.float32),
            trace=None,
            finish_reason=FinishReason.STOP,
            policy_version=0,
        )

    ids = np.array([3], dtype=np.int32)
    every = np.array(rewards, dtype=float)
    rollout = Rollout(
        prompts=tuple(
            Prompt(index=first + n, prompt_ids=ids, text="", columns={})
            for n in range(len(rewards))
        ),
        own=own,
        groups=tuple(
            RolloutGroup(
                request=Request(request_id=first + n, prompt_ids=ids, num_generations=2),
                completions=(completion(10 * (first + n)), completion(10 * (first + n) + 1)),
            )
            for n in own
        ),
        traces={(n, k): TRACE for n in own for k in range(2)},
        num_cut=1,
        policy_version=0,
    )
    rows = list(own)
    return Rated(
        rollout=rollout,
        texts=tuple(f"{first + n}.{k}" for n in own for k in range(2)),
        rewards={"f": every[rows]},
        totals=every[rows],
        every_reward={"f": every},
        every_total=every,
        tally=Tally(),
        counts=np.ones(every.shape, dtype=bool),
    )


def dynamic(recipe: Recipes, **keys: Any) -> Recipe:
    settings = {
        "grpo__dynamic_sample": "true",
        "rollout__num_generations": 2,
        "batch__global_batch_size": 8,
    }
    return recipe(**settings | keys)


def test_what_lacks_is_sampled_and_what_teaches_is_kept_in_order(recipe: Recipes) -> None:
    rounds = Rounds(dynamic(recipe))
    assert rounds.num_wanted == 4
    rounds.add(a_round(0, [(1, 0), (1, 1), (0, 2), (0, 0)], own=(1, 2)))
    assert rounds.num_wanted == 2
    rounds.add(a_round(4, [(3, 3), (5, 6)], own=(1,)))
    assert rounds.num_wanted == 1
    # One more than is wanted, so that all ranks sample equally many.
    rounds.add(a_round(6, [(7, 8), (9, 1)], own=(0,)))
    assert rounds.num_wanted == 0
    learned = rounds.learned
    assert [prompt.index for prompt in learned.rollout.prompts] == [0, 2, 5, 6]
    assert learned.rollout.own == (1, 2, 3)
    assert [group.request.request_id for group in learned.rollout.groups] == [2, 5, 6]
    assert learned.texts == ("2.0", "2.1", "5.0", "5.1", "6.0", "6.1")
    assert learned.totals.tolist() == [[0, 2], [5, 6], [7, 8]]
    assert learned.every_total.tolist() == [[1, 0], [0, 2], [5, 6], [7, 8]]
    assert learned.every_reward["f"].tolist() == learned.every_total.tolist()
    assert learned.rollout.num_cut == 3
    assert sorted(learned.rollout.traces) == [(n, k) for n in (1, 2, 3) for k in range(2)]
    # Nothing else holds them, so that sharing them frees them.
    assert not any(rated.rollout.traces for rated in rounds._rounds)
    assert rounds.learned is learned
    assert len(rounds.sampled.rollout.prompts) == 8
    assert rounds.metrics() == {
        "dynamic_sampling/rounds": 3.0,
        "dynamic_sampling/sampled_groups": 8.0,
        "dynamic_sampling/dropped_groups": 4.0,
        "dynamic_sampling/missing_groups": 0.0,
    }


def test_at_the_bound_what_teaches_is_kept_and_the_first_others_fill_up(recipe: Recipes) -> None:
    rounds = Rounds(dynamic(recipe, grpo__max_resample_times=1))
    rounds.add(a_round(0, [(1, 0), (1, 1), (0, 0), (2, 2)], own=(0,)))
    rounds.add(a_round(4, [(3, 3), (5, 6), (4, 4)], own=(1,)))
    assert rounds.num_wanted == 0
    assert [prompt.index for prompt in rounds.learned.rollout.prompts] == [0, 1, 2, 5]
    assert rounds.metrics()["dynamic_sampling/missing_groups"] == 2.0


def test_control_without_it_a_step_has_one_round(recipe: Recipes) -> None:
    rounds = Rounds(recipe(rollout__num_generations=2, batch__global_batch_size=8))
    rounds.add(a_round(0, [(1, 1)] * 4, own=(0,)))
    assert rounds.num_wanted == 0
    assert rounds.learned is rounds.sampled
    assert rounds.metrics() == {}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"batch__balance": "false"}, "would train on all of them"),
        (
            {
                "rollout__engine": "vllm-server",
                "rollout__urls": '["http://127.0.0.1:1"]',
                "rollout__max_staleness": 1,
            },
            "before this one knows",
        ),
        ({"rollout__engine": "files", "rollout__path": "x"}, "and no others"),
    ],
)
def test_what_cannot_sample_further_prompts_is_refused(
    recipe: Recipes, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=rf"grpo\.dynamic_sample: .*{said}"):
        recipe(grpo__dynamic_sample="true", **keys)


def test_a_bound_of_nothing_is_refused(recipe: Recipes) -> None:
    with pytest.raises(RecipeError, match=r"grpo\.max_resample_times.*dynamic_sample is false"):
        recipe(grpo__max_resample_times=2)


@pytest.mark.ranks
def test_a_bound_that_is_reached_is_said(
    recipe: Recipes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.py").write_text(ODD_IS_EQUAL)
    mine = recipe(
        grpo__dynamic_sample="true",
        grpo__max_resample_times=1,
        data__shuffle="false",
        rewards__0__function=f"{tmp_path}/odd.py:f",
        run__max_steps=1,
    )
    run(mine)
    lines = (mine.run.output_dir / "completions.jsonl").read_text().splitlines()
    # Of 0 to 5, 0, 2 and 4 teach.
    assert {json.loads(line)["item"] for line in lines} == {0, 1, 2, 4}
    (metrics,) = metrics_of(mine)
    assert metrics["dynamic_sampling/missing_groups"] == 1
    said = " ".join(capfd.readouterr().out.split())
    assert "1 further rounds of prompts left 1 of 4" in said


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_learns_from_prompts_that_teach_on_any_number_of_ranks(
    recipe: Recipes, tmp_path: Path, world_size: int
) -> None:
    (tmp_path / "odd.py").write_text(ODD_IS_EQUAL)
    mine = recipe(
        grpo__dynamic_sample="true",
        data__shuffle="false",
        rollout__dtype="float32",
        rewards__0__function=f"{tmp_path}/odd.py:f",
        run__max_steps=2,
    )
    run(mine, world_size=world_size)
    lines = (mine.run.output_dir / "completions.jsonl").read_text().splitlines()
    items = [(line["step"], line["item"]) for line in map(json.loads, lines)]
    # Of 0 to 3 two teach, of 4 and 5 one, and 6. The next step begins at 7, or at 8 where two ranks
    # have sampled 6 and 7.
    assert sorted(set(items)) == [(1, n) for n in (0, 2, 4, 6)] + [(2, n) for n in (8, 10, 12, 14)]
    assert all(items.count(item) == 4 for item in items)
    first, second = metrics_of(mine)
    assert first["dynamic_sampling/rounds"] == 3
    assert first["dynamic_sampling/sampled_groups"] == (7 if world_size == 1 else 8)
    assert second["dynamic_sampling/rounds"] == (4 if world_size == 1 else 3)
    # Over all that was sampled, kept or not: 1, 3 and 5, and on two ranks 7 too.
    assert first["frac_reward_zero_std"] == (3 / 7 if world_size == 1 else 4 / 8)
    for metrics in (first, second):
        assert metrics["dynamic_sampling/missing_groups"] == 0
        assert metrics["replay/coverage"] == metrics["replay/agreement"] == 1.0
