"""Updates that must not be taken: broken gradients stop a run, empty mini-batches are counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_replay.engines.types import Engine
from moe_replay.errors import DivergedError, UpdateError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.loop import train
from moe_replay.grpo.records import CompletionRecord, StepRecord
from moe_replay.megatron.backward import MegatronLearner
from moe_replay.megatron.scorer import MegatronScorer, Scores
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import BaseReporter, RunDirectory, build_reporter
from moe_replay.testing.ranks import run_ranks

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]

# What a step earns is read from a file beside the function: one word a step, the last one for all
# that follow.
REWARD = """
from pathlib import Path

PLAN = Path(__file__).with_suffix(".plan")
calls = 0

def planned(completions, **columns):
    global calls
    words = PLAN.read_text().split()
    word = words[min(calls, len(words) - 1)]
    calls += 1
    count = len(completions)
    usual = [sum(c.isdigit() for c in text) / max(1, len(text)) + 0.01 * n for n, text in enumerate(completions)]
    return {
        "usual": usual,
        "equal": [0.5] * count,
        "half": usual[: count // 2] + [0.5] * (count - count // 2),
        "huge": usual[:-1] + [1e30],
        "turns": [float(n % 2) for n in range(count)],
    }[word]
"""


class Keeping(BaseReporter):
    """Keeps what a run says about its steps."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def step(self, record: StepRecord, completions: Any) -> None:
        """Keep the step."""
        self.records.append(record)


@pytest.fixture
def planned(recipe: Recipes, tmp_path: Path) -> Recipes:
    """Return a loader of the recipe with a plan of rewards, such as ``plan="usual equal"``."""
    (tmp_path / "planned.py").write_text(REWARD)

    def load(*, plan: str, **overrides: Any) -> Recipe:
        (tmp_path / "planned.plan").write_text(plan)
        reward = f"[{{function = '{tmp_path}/planned.py:planned'}}]"
        return recipe(rewards=reward, rollout__dtype="float32", **overrides)

    return load


def run(
    recipe: Recipe,
    *,
    before: Callable[[], None] = lambda: None,
    make_engine: Callable[[Recipe, torch.device], Engine] = recipe_engine,
    world_size: int = 1,
) -> list[StepRecord]:
    """Train in processes of its own, files included, and return the records of its steps."""

    def call() -> list[StepRecord]:
        before()
        process = ProcessSpec(rank=dist.get_rank(), world_size=world_size)
        directory, kept = RunDirectory(recipe.run.output_dir), Keeping()
        with build_reporter(recipe, rank=process.rank, run_directory=directory) as files:
            inner = files.step

            def both(record: StepRecord, completions: list[CompletionRecord]) -> None:
                kept.step(record, completions)
                inner(record, completions)

            files.step = both
            train(recipe, process=process, reporter=files, make_engine=make_engine)
        return kept.records

    return run_ranks(call, world_size)[0]


def test_t11_a_broken_second_mini_batch_stops_the_run_and_costs_no_checkpoint(
    planned: Recipes,
) -> None:
    stopped = planned(
        plan="usual huge",
        run__max_steps=3,
        grpo__scale_rewards="none",
        batch__steps_per_generation=2,
        optimizer__clip_grad=0.0,
        optimizer__warmup_steps=3,
        checkpoint__save_total_limit=1,
    )
    with pytest.raises(
        DivergedError, match="step 2, update 2 of 2: the norm of the gradient is inf"
    ):
        run(stopped)
    folder = stopped.run.output_dir
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001"]
    (first,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    norms = [first[f"grad_norm/update_{number}"] for number in (1, 2)]
    # F21: the norm of every update of a step, and what the step says is about all of them.
    assert first["grad_norm"] == pytest.approx(sum(norms) / 2)
    assert first["grad_norm/max"] == max(norms)
    rates = [first[f"learning_rate/update_{number}"] for number in (1, 2)]
    assert rates == pytest.approx([1e-3 / 4, 1e-3 / 2])
    assert first["learning_rate"] == rates[-1]
    assert first["update/num_skipped"] == 0
    # The same command goes on from the step before, with what it had.
    (folder.parent / "planned.plan").write_text("usual")
    assert [record.step for record in run(stopped)] == [2, 3]


def _engine_without_gradients(recipe: Recipe, device: torch.device) -> Engine:
    engine = recipe_engine(recipe, device)
    # What a careless adapter does once, and a whole run pays for.
    torch.set_grad_enabled(False)
    return engine


def test_r2_an_engine_that_switches_gradients_off_is_not_trained_with(planned: Recipes) -> None:
    with pytest.raises(UpdateError, match="update 1 of 1: gradients are switched off"):
        run(planned(plan="usual", run__max_steps=1), make_engine=_engine_without_gradients)


def _detach_logprobs() -> None:
    connected = MegatronLearner._statistics

    def detached(*args: Any, **options: Any) -> torch.Tensor:
        return connected(*args, **options).detach().requires_grad_(torch.is_grad_enabled())

    MegatronLearner._statistics = detached


def test_r2_a_gradient_of_exactly_zero_with_rewards_that_differ_is_an_error(
    planned: Recipes,
) -> None:
    refused = planned(plan="usual", run__max_steps=1)
    with pytest.raises(UpdateError, match=r"exactly 0, though \d+ sampled tokens"):
        run(refused, before=_detach_logprobs)
    # Nothing should pull: the same loss of connection cannot be seen, and nothing is lost by it.
    assert run(planned(plan="equal", run__max_steps=1), before=_detach_logprobs)


@pytest.mark.parametrize("world_size", [1, 2])
def test_r2_equal_completions_whose_rewards_differ_cancel_and_do_not_stop_a_run(
    world_size: int, planned: Recipes
) -> None:
    # On two ranks the completions of a prompt are dealt over both replicas.
    (record,) = run(
        planned(plan="turns", run__max_steps=1, rollout__top_k=1, rollout__num_generations=4),
        world_size=world_size,
    )
    assert record.metrics["reward_std"] > 0.5
    assert record.metrics["grad_norm"] < 1e-3


def test_t14_a_step_in_which_nothing_trains_moves_no_weight_and_says_so(planned: Recipes) -> None:
    settings = {"optimizer__weight_decay": 0.1, "batch__steps_per_generation": 2}
    first = planned(plan="usual", run__max_steps=1, **settings)
    run(first)
    export = first.run.output_dir / "export" / "model.safetensors"
    before = export.read_bytes()
    # Adam has momentum now, and there is decay: a step along a gradient of 0 would move every
    # weight.
    (record,) = run(planned(plan="equal", run__max_steps=2, **settings))
    assert record.step == 2
    assert record.metrics["update/num_skipped"] == 2
    assert record.metrics["loss"] == record.metrics["grad_norm"] == 0
    assert record.metrics["policy_version"] == 2
    assert export.read_bytes() == before
    assert any("all rewards are equal" in text for text in record.warnings)
    (record,) = run(planned(plan="usual", run__max_steps=3, **settings))
    assert record.metrics["update/num_skipped"] == 0
    assert export.read_bytes() != before
    assert not any("all rewards are equal" in text for text in record.warnings)


def test_t14_only_the_mini_batch_in_which_nothing_trains_is_skipped(planned: Recipes) -> None:
    (record,) = run(planned(plan="half", run__max_steps=1, batch__steps_per_generation=2))
    assert record.metrics["update/num_skipped"] == 1
    assert record.metrics["grad_norm"] == record.metrics["grad_norm/update_1"] > 0
    assert "grad_norm/update_2" not in record.metrics


@pytest.mark.parametrize(
    "also", [{"grpo__beta": 0.1}, {"megatron__moe_aux_loss_coeff": 0.01}], ids=["kl", "aux"]
)
def test_t14_what_trains_without_an_advantage_is_not_skipped(
    also: dict[str, float], planned: Recipes
) -> None:
    (record,) = run(planned(plan="equal", run__max_steps=1, **also))
    assert record.metrics["update/num_skipped"] == 0


def test_d15_completions_that_are_all_cut_are_counted_and_the_run_goes_on(planned: Recipes) -> None:
    settings = {"rollout__max_completion_length": 1, "run__max_steps": 2}
    records = run(planned(plan="usual", grpo__overlong_filter="true", **settings))
    assert [record.metrics["update/num_skipped"] for record in records] == [1, 1]
    for record in records:
        assert record.metrics["completions/clipped_ratio"] == 1
        assert record.metrics["completions/filtered_ratio"] == 1
    said = " ".join(records[0].warnings)
    assert "every completion was cut at rollout.max_completion_length = 1" in said
    assert "nothing was learned" in said
    # Said when it begins, not every step.
    assert not any("every completion was cut" in text for text in records[1].warnings)


@pytest.mark.parametrize("what", ["old_logprobs", "ref_logprobs"])
def test_t11_one_sample_that_is_scored_as_nan_on_one_rank_stops_all_before_anything_is_pushed(
    what: str, planned: Recipes
) -> None:
    settings = {
        "batch__global_batch_size": 32,
        "batch__old_logprobs": "pass",
        "run__max_steps": 1,
    }
    refused = planned(plan="usual", **settings, **({"grpo__beta": 0.1} if what[0] == "r" else {}))
    score = MegatronScorer.score

    def spoiled(scorer: MegatronScorer, *args: Any, **options: Any) -> Scores:
        scores = score(scorer, *args, **options)
        # The policy is a kind of scorer; the reference is no more than one.
        is_asked = (type(scorer) is MegatronScorer) == (what == "ref_logprobs")
        if torch.distributed.get_rank() == 1 and is_asked:
            scores.samples[5].token_logprobs[1] = np.nan
        return scores

    def engine_never_pushed(recipe: Recipe, device: torch.device) -> Engine:
        engine = recipe_engine(recipe, device)

        def load_weights(*_: Any, policy_version: int) -> None:
            raise AssertionError(f"policy version {policy_version} was pushed")

        engine.load_weights = load_weights  # pyrefly: ignore
        return engine

    def call() -> str:
        MegatronScorer.score = spoiled
        process = ProcessSpec(rank=torch.distributed.get_rank(), world_size=2)
        with pytest.raises(DivergedError) as caught:
            train(refused, process=process, reporter=Keeping(), make_engine=engine_never_pushed)
        return str(caught.value)

    said = run_ranks(call, 2)
    assert said[0] == said[1]
    assert said[0].startswith(f"step 1: {what} or entropies are not finite")
    assert "sample 5 of replica 1: 1 of " in said[0]
    assert said[0].count("sample ") == 1
