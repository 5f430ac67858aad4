"""Evaluation: its own sampling, several held-out sets, pass@k, the best checkpoint by a metric."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_replay.grpo.checkpoint import _take_best
from moe_replay.grpo.evaluate import EVAL_REQUESTS, _tally, eval_sampling, held_out_id, pass_at
from moe_replay.grpo.journal import Journal
from moe_replay.grpo.measured import measured_on
from moe_replay.grpo.run import BestStep
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.run import MAX_HELD_OUT, CheckpointSection, EvalSection
from moe_replay.report.metric_table import metric_of
from moe_replay.tasks.encoding import Prompt
from moe_replay.tasks.rewards.rewards import ScoredBatch

from .smallest_recipe import problems_of
from .smallest_recipe import recipe as smallest
from .test_loop import run


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_pass() -> None:
    for n in range(1, 7):
        for passed in range(n + 1):
            outcomes = [number < passed for number in range(n)]
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(outcomes, k))
                assert pass_at(k, n, passed) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    # The chance from the rate is another number.
    assert pass_at(2, 4, 1) == 0.5 != 1 - 0.75**2


def test_passes_are_those_of_the_named_function_and_of_prompts_with_enough_scores() -> None:
    nan = float("nan")
    # Three prompts of four completions; the last prompt has one score.
    scores = np.array([1, 0, 0, 0.5, 1, 1, nan, 0, nan, nan, nan, 1])
    batch = ScoredBatch(scores={"f": scores, "g": np.zeros(12)}, total=scores / 10)
    settings = EvalSection(num_generations=4, temperature=1.0, pass_k=(1, 2), pass_reward="f")
    found = _tally(batch, "eval/maths", settings).finish()
    assert found["eval/maths/pass@1"] == pytest.approx((1 / 4 + 2 / 3 + 1) / 3)
    # Pairs: 3 of 6 hold the pass of the first prompt, 3 of 3 one of the second.
    assert found["eval/maths/pass@2"] == pytest.approx((0.5 + 1.0) / 2)
    assert found["eval/maths/num_items"] == 3
    assert found["eval/maths/rewards/g"] == 0
    lower = settings.model_copy(update={"pass_threshold": 0.5})
    assert _tally(batch, "eval", lower).finish()["eval/pass@1"] == pytest.approx(
        (2 / 4 + 2 / 3 + 1) / 3
    )
    of_total = settings.model_copy(update={"pass_reward": None})
    assert _tally(batch, "eval", of_total).finish()["eval/pass@1"] == 0
    assert "eval/pass@1" not in _tally(batch, "eval", EvalSection()).finish()


def test_held_out_prompts_are_sampled_as_eval_says() -> None:
    plain = smallest(data={"eval": "/e.jsonl"}, rollout={"temperature": 0.7})
    greedy = eval_sampling(plain)
    assert (greedy.temperature, greedy.top_p, greedy.top_k) == (0.0, 1.0, 0)
    assert greedy.max_completion_length == 64
    own = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_completion_length": 32}
    drawn = eval_sampling(smallest(data={"eval": "/e.jsonl"}, eval=own))
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0.6, 0.95, 20)
    assert drawn.max_completion_length == 32


A, B = {"name": "a", "dataset": "/a.jsonl"}, {"name": "b", "dataset": "reasoning_gym:chain_sum"}


@pytest.mark.parametrize(
    ("sections", "path", "reason"),
    [
        ({"eval": {"pass_k": [2]}}, "eval.pass_k", "up to that"),
        ({"eval": {"pass_k": [1, 1]}}, "eval.pass_k", "each once"),
        (
            {"eval": {"pass_k": [1], "pass_reward": "exact"}},
            "eval.pass_reward",
            "nearest: 'exact_match'",
        ),
        ({"eval": {"pass_threshold": 0.5}}, "eval.pass_threshold", "eval.pass_k is not set"),
        ({"eval": {"top_p": 0.5}}, "eval.top_p", "takes the most likely token"),
        ({"eval": {"max_completion_length": 65}}, "eval.max_completion_length", "is above rollout"),
        ({"held_out": [A, A]}, "held_out.1.name", "is taken"),
        ({"held_out": [A | {"name": "rewards"}]}, "held_out.0.name", "those of functions"),
        ({"held_out": [A | {"name": "a/b"}]}, "held_out.0.name", "pattern"),
        ({"held_out": [A | {"seed": 3}]}, "held_out.0.seed", "its dataset is a file"),
        ({"held_out": [B | {"split": "x"}]}, "held_out.0.split", "neither a folder"),
        ({"held_out": A}, "held_out", "write [[held_out]]"),
        ({"held_out": [{"name": "a"}]}, "held_out.0.dataset", "missing"),
        (
            {"checkpoint": {"metric_for_best_model": "eval/rewards/exact"}},
            "checkpoint.metric_for_best_model",
            "nearest: 'eval/rewards/exact_match'",
        ),
        (
            {"checkpoint": {"greater_is_better": False}},
            "checkpoint.greater_is_better",
            "metric_for_best_model is not set",
        ),
    ],
)
def test_what_says_nothing_about_an_evaluation_is_refused(
    sections: dict[str, Any], path: str, reason: str
) -> None:
    message = problems_of(data={"eval": "/e.jsonl"}, **sections)
    assert f"\n  {path}: " in message
    assert reason in message


def test_a_recipe_of_several_sets_loads_again_as_it_was() -> None:
    # What is resolved omits what has no effect, in lists too.
    loaded = smallest(
        held_out=[A, B],
        eval={"temperature": 1.0, "num_generations": 4, "pass_k": [1, 4]},
        checkpoint={"metric_for_best_model": "eval/b/pass@4"},
    )
    again = smallest(**loaded.resolved_table())
    assert again.held_out == loaded.held_out
    assert [(each.key, each.name) for each in again.held_out_sets] == [
        ("held_out.0.dataset", "a"),
        ("held_out.1.dataset", "b"),
    ]
    assert "seed" not in loaded.resolved_table()["held_out"][0]
    files = problems_of(held_out=[A], rollout={"engine": "files", "path": "/r"})
    assert "held_out: given with rollout.engine = 'files'" in files


def lines(recipe: Recipe, name: str) -> list[dict[str, Any]]:
    text = (recipe.run.output_dir / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def two_sets(workspace: Path, tmp_path: Path) -> dict[str, Any]:
    """Return keys of a run with two held-out sets and a function that fails on some texts."""
    (tmp_path / "few.jsonl").write_text("".join(f'{{"prompt": "few {n}"}}\n' for n in range(3)))
    few = f'{{name = "few", dataset = "{tmp_path / "few.jsonl"}"}}'
    more = f'{{name = "more", dataset = "{workspace / "train.jsonl"}", size = 5}}'
    # A function that fails on some texts, and logs what it saw.
    (tmp_path / "some.py").write_text(
        "def some(completions, log_metric):\n"
        "    if any('1' in text for text in completions): raise ValueError('a one')\n"
        "    log_metric('texts', len(completions))\n"
        "    return [0.0] * len(completions)\n"
    )
    digits = f'{{function = "{workspace / "reward.py"}:likes_digits"}}'
    some = f'{{function = "{tmp_path / "some.py"}:some", on_failure = "drop"}}'
    return {
        "rewards": f"[{digits}, {some}]",
        "held_out": f"[{few}, {more}]",
        "eval__every_steps": 1,
        "eval__temperature": 1.0,
        "eval__top_p": 0.9,
        "eval__num_generations": 4,
        "eval__pass_k": "[1, 3]",
        "eval__pass_threshold": 0.1,
        "eval__max_completion_length": 6,
        "checkpoint__metric_for_best_model": "eval/more/reward",
        # Training raises it in every step, so the first one stays the lowest.
        "checkpoint__greater_is_better": "false",
        "checkpoint__save_total_limit": 1,
        "checkpoint__export_every_save": "true",
        "logging__completions": 8,
    }


@pytest.mark.ranks
def test_sets_are_reported_apart_and_the_best_checkpoint_stays(
    recipe: Callable[..., Recipe], workspace: Path, tmp_path: Path
) -> None:
    asked = two_sets(workspace, tmp_path)
    run(recipe(run__max_steps=2, **asked), world_size=2)
    loaded = recipe(run__max_steps=4, **asked)
    run(loaded, world_size=2)
    records = {line["step"]: line for line in lines(loaded, "eval")}
    assert sorted(records) == [0, 1, 2, 3, 4]
    kept = lines(loaded, "eval_completions")
    for line in lines(loaded, "completions"):
        assert (line["rewards"]["some"] is None) == ("1" in line["completion"])
    for line in lines(loaded, "metrics"):
        assert line["rewards/some/failed_ratio"] == line["rewards/some/none_ratio"]
        assert line["logged/texts"] >= 1
    for step, record in records.items():
        assert 0 <= record["eval/few/rewards/some/failed_ratio"] <= 1
        assert all(metric_of(name) for name in record)
        assert record["eval/few/num_items"] == 3 and record["eval/more/num_items"] == 5
        few_kept = [line for line in kept if (line["step"], line["held_out"]) == (step, "few")]
        # Eight of twelve completions: those of the first two prompts, in order.
        assert [line["item"] for line in few_kept] == [0] * 4 + [1] * 4
        assert {line["finish_reason"] for line in few_kept} <= {"stop", "length"}
        assert max(line["num_tokens"] for line in few_kept) <= 6
        assert 0 <= record["eval/few/pass@1"] <= record["eval/few/pass@3"] <= 1
    values = {step: record["eval/more/reward"] for step, record in records.items() if step}
    best = min(values, key=values.__getitem__)
    assert best < 4, f"the last step is the best, which shows nothing: {values}"
    folder = loaded.run.output_dir
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"step-{best:06d}", "step-000004"]
    position = json.loads((folder / "checkpoints" / "step-000004" / "position.json").read_text())
    assert len(position["best"].pop("measured_on")) == 32
    assert position["best"] == {
        "step": best,
        "value": values[best],
        "metric": "eval/more/reward",
        "is_greatest": False,
    }
    exports = sorted(path.name for path in folder.glob("export*"))
    assert exports == ["export", "export-best", f"export-step-{best:06d}", "export-step-000004"]

    def weights(name: str) -> bytes:
        return b"".join(path.read_bytes() for path in sorted((folder / name).glob("*.safetensors")))

    assert weights("export-best") == weights(f"export-step-{best:06d}") != weights("export")
    assert weights("export-step-000004") == weights("export")


@pytest.mark.parametrize(
    ("keys", "goes_on"),
    [
        ({"metric_for_best_model": "eval/reward"}, True),
        ({"metric_for_best_model": "eval/pass@1"}, False),
        ({"metric_for_best_model": "eval/reward", "greater_is_better": False}, False),
        ({}, False),
    ],
)
def test_a_best_value_is_compared_with_values_of_its_own_metric_alone(
    keys: dict[str, Any], goes_on: bool
) -> None:
    best = BestStep(step=2, value=2.5, metric="eval/reward", is_greatest=True)
    journal = Journal()
    loaded = smallest(data={"eval": "/e.jsonl"})
    loaded = loaded.model_copy(update={"checkpoint": CheckpointSection(**keys)})
    nothing = SimpleNamespace(num_prompts=0, num_deleted=0, columns=frozenset(), at=lambda *_: [])
    inputs = SimpleNamespace(held_out={"": nothing})
    run_: Any = SimpleNamespace(recipe=loaded, inputs=inputs, journal=journal, best=None)
    inspect.unwrap(_take_best)(run_, best)
    now = measured_on(loaded, inputs.held_out, "eval/reward")
    assert run_.best == (replace(best, measured_on=now) if goes_on else None)
    said = journal.take_warnings()
    assert not said if goes_on else "after step 2, had the greatest eval/reward" in said[0]


def test_a_best_value_of_other_held_out_prompts_or_another_sampling_is_not_compared() -> None:
    loaded = smallest(data={"eval": "/e.jsonl"}, held_out=[A], eval={"temperature": 0.5})

    def measured(recipe: Recipe, answer: str, *, metric: str = "eval/a/reward") -> Any:
        def prompts(question: str, answer: str) -> Any:
            ids = np.arange(3, dtype=np.int32)
            columns = {"answer": answer, "kept": object()}
            prompt = Prompt(index=0, prompt_ids=ids, text=question, columns=columns)
            facts = {"num_prompts": 1, "num_deleted": 0, "columns": frozenset(columns)}
            return SimpleNamespace(**facts, at=lambda *_: [prompt])

        held_out = {"": prompts("q", answer), "a": prompts("q", "7")}
        inputs = SimpleNamespace(held_out=held_out)
        best = {"metric_for_best_model": metric}
        recipe = recipe.model_copy(update={"checkpoint": CheckpointSection(**best)})
        return SimpleNamespace(recipe=recipe, inputs=inputs, journal=Journal(), best=None)

    def digest(run_: Any, metric: str) -> str:
        return measured_on(run_.recipe, run_.inputs.held_out, metric)

    for metric, moved in (("eval/reward", True), ("eval/a/reward", False)):
        before = measured(loaded, "3", metric=metric)
        edited = measured(loaded, "4", metric=metric)
        best = BestStep(
            step=2,
            value=2.5,
            metric=metric,
            is_greatest=True,
            measured_on=digest(before, metric),
        )
        inspect.unwrap(_take_best)(edited, best)
        assert edited.best == (None if moved else best)
        said = edited.journal.take_warnings()
        assert ("other held-out prompts" in said[0]) if moved else not said
    warmer = loaded.model_copy(update={"eval": EvalSection(temperature=0.6)})
    assert digest(measured(warmer, "3"), "eval/a/reward") != best.measured_on
    rarer = loaded.model_copy(update={"eval": EvalSection(temperature=0.5, every_steps=3)})
    assert digest(measured(rarer, "3"), "eval/a/reward") == best.measured_on
    # A checkpoint of an earlier revision says nothing of it.
    unknown = measured(loaded, "3", metric="eval/a/reward")
    inspect.unwrap(_take_best)(unknown, replace(best, measured_on=""))
    # From here on it is tied to what is measured now.
    assert unknown.best == best


def digest_of(metric: str, *sets: str, **sections: Any) -> str:
    """Return what a metric is measured on; the prompts of a set say its name."""

    def prompts(name: str) -> Any:
        prompt = Prompt(index=0, prompt_ids=np.arange(3, dtype=np.int32), text=name, columns={})
        facts = {"num_prompts": 1, "num_deleted": 0, "columns": frozenset()}
        return SimpleNamespace(**facts, at=lambda *_: [prompt])

    held_out = [{"name": name, "dataset": "/e.jsonl"} for name in sets]
    loaded = smallest(**{"data": {"eval": "/e.jsonl"}, "held_out": held_out} | sections)
    return measured_on(loaded, {name: prompts(name) for name in ("", *sets)}, metric)


def test_a_metric_is_of_the_set_whose_name_something_follows() -> None:
    plain = digest_of("eval/reward")
    assert digest_of("eval/reward", "reward") == plain
    assert digest_of("eval/pass@1", "reward") == digest_of("eval/pass@1")
    own = digest_of("eval/reward/reward", "reward")
    assert own == digest_of("eval/reward/rewards/exact_match", "reward") != plain


EVAL = {"temperature": 0.5, "num_generations": 4, "pass_k": [1]}
TOOLS = {"factory": "/a/env.py:Shop", "max_turns": 3}


@pytest.mark.parametrize(
    ("metric", "before", "after", "is_another"),
    [
        # What evaluations inherit counts where they do.
        ("reward", {}, {"rollout": {"max_completion_length": 32}}, True),
        (
            "reward",
            {"eval": EVAL | {"max_completion_length": 16}},
            {
                "eval": EVAL | {"max_completion_length": 16},
                "rollout": {"max_completion_length": 32},
            },
            False,
        ),
        ("reward", {}, {"eval": EVAL | {"max_completion_length": 64}}, False),
        ("reward", {}, {"rollout": {"stop": ["!"]}}, True),
        ("reward", {}, {"rollout": {"stop_token_ids": [7]}}, True),
        ("reward", {}, {"rollout": {"temperature": 0.7}}, False),
        ("reward", {}, {"eval": EVAL | {"top_k": 7}}, True),
        ("reward", {}, {"eval": EVAL | {"num_generations": 5}}, True),
        # What passes counts for pass@k alone, and each k is a metric of its own.
        ("reward", {}, {"eval": EVAL | {"pass_k": [1, 2]}}, False),
        ("reward", {}, {"eval": EVAL | {"pass_threshold": 0.5}}, False),
        ("pass@1", {}, {"eval": EVAL | {"pass_threshold": 0.5}}, True),
        ("pass@1", {}, {"eval": EVAL | {"pass_reward": "exact_match"}}, True),
        ("pass@1", {}, {"eval": EVAL | {"pass_k": [1, 2]}}, False),
        # An environment: what happens in it, and neither where it lies nor how long it may take.
        ("reward", {}, {"environment": TOOLS}, True),
        ("reward", {"environment": TOOLS}, {"environment": TOOLS | {"max_turns": 4}}, True),
        ("reward", {"environment": TOOLS}, {"environment": TOOLS | {"args": {"n": 1}}}, True),
        ("reward", {"environment": TOOLS}, {"environment": TOOLS | {"timeout_s": 9}}, False),
        (
            "reward",
            {"environment": TOOLS},
            {"environment": TOOLS | {"factory": "/b/env.py:Shop"}},
            False,
        ),
    ],
)
def test_a_best_value_is_tied_to_how_its_metric_is_sampled_and_judged(
    metric: str, before: dict[str, Any], after: dict[str, Any], is_another: bool
) -> None:
    asked = [digest_of(f"eval/{metric}", **{"eval": EVAL} | keys) for keys in (before, after)]
    assert (asked[0] != asked[1]) == is_another


def test_the_noise_of_a_held_out_set_goes_by_its_name() -> None:
    assert held_out_id("", 3) == EVAL_REQUESTS + 3
    names = ["", *(f"set{n}" for n in range(50))]
    ids = [held_out_id(name, index) for name in names for index in (0, 5, MAX_HELD_OUT - 1)]
    assert len(set(ids)) == len(ids)
    # Room for the turns of conversations, see `turns.turn_id`.
    assert max(ids) < 1 << 42
    # Worked out by hand: the first 8 bytes of SHA-256 of "a" are ca978112ca1bbdca.
    number = 1 + 0xCA978112CA1BBDCA % ((1 << 18) - 1)
    assert held_out_id("a", 2) == EVAL_REQUESTS + number * 4194304 + 2
