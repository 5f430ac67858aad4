"""What ends a completion, and what may be in one: keys of a recipe in whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_replay.checkpoint.tokenizer import load_tokenizer
from moe_replay.errors import RecipeError
from moe_replay.grpo.engines import recipe_engine, recipe_sampling
from moe_replay.grpo.inputs import check_checkpoint_config
from moe_replay.grpo.loop import train
from moe_replay.grpo.sampling_words import describe_drawing, describe_ends
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import VOCAB_SIZE, write_tiny_checkpoint

from .smallest_recipe import problems_of

Recipes = Callable[..., Recipe]
SHORT = {"run__max_steps": 1, "rollout__dtype": "float32", "checkpoint__export": "false"}


def run(recipe: Recipe, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train and return the last step's metrics and all completions."""

    def call() -> None:
        directory = RunDirectory(recipe.run.output_dir)
        with build_reporter(recipe, rank=0, run_directory=directory) as reporter:
            train(recipe, process=ProcessSpec(rank=0, world_size=1), reporter=reporter, **options)

    run_ranks(call, 1)
    return tuple(
        [json.loads(line) for line in (recipe.run.output_dir / name).read_text().splitlines()][part]
        for name, part in (("metrics.jsonl", -1), ("completions.jsonl", slice(None)))
    )


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["R3", "disabled"])
def test_e19_a_stop_string_ends_completions_and_what_lies_behind_is_counted(
    recipe: Recipes, mode: str
) -> None:
    made = recipe(
        rollout__stop='["e", "7q"]',
        rollout__max_completion_length=30,
        replay__router_replay_mode=mode,
        **SHORT,
    )
    metrics, completions = run(made)
    texts = [line["completion"] for line in completions]
    assert any(text.endswith("e") for text in texts)
    assert all("e" not in text[:-1] for text in texts)
    assert all(
        line["finish_reason"] == "stop" for line in completions if line["completion"].endswith("e")
    )
    assert metrics["completions/tokens_cut_off"] > 0
    assert metrics["rollout_correction/k3_kl"] < 1e-9
    if mode == "R3":
        assert metrics["replay/coverage"] == 1.0


@pytest.mark.ranks
def test_e19_a_stop_token_of_the_recipe_ends_completions(recipe: Recipes, workspace: Path) -> None:
    stop = load_tokenizer(workspace / "model").convert_tokens_to_ids("e")
    made = recipe(rollout__stop_token_ids=f"[{stop}]", rollout__max_completion_length=30, **SHORT)
    metrics, completions = run(made)
    texts = [line["completion"] for line in completions]
    assert any(text.endswith("e") for text in texts)
    assert all("e" not in text[:-1] for text in texts)
    assert "completions/tokens_cut_off" not in metrics


def test_e19_one_string_or_one_token_is_a_list_of_one(recipe: Recipes) -> None:
    made = recipe(rollout__stop="</answer>", rollout__stop_token_ids="7")
    assert made.rollout.stop == ("</answer>",)
    assert recipe_sampling(made).stop_token_ids == (7,)


def test_e19_stop_keys_out_of_range_are_refused(recipe: Recipes) -> None:
    assert "rollout.stop" in problems_of(rollout={"stop": [""]})
    assert "rollout.stop_token_ids" in problems_of(rollout={"stop_token_ids": [-1]})
    with pytest.raises(RecipeError, match=r"stop_token_ids holds \[5000\], expected ids below"):
        check_checkpoint_config(recipe(rollout__stop_token_ids="[5, 5000]"))
    check_checkpoint_config(recipe(rollout__stop_token_ids="[5]"))


def test_e19_the_start_of_a_run_shows_what_ends_completions(
    recipe: Recipes, workspace: Path
) -> None:
    made = recipe(rollout__stop="</answer>", rollout__stop_token_ids="7")
    tokens, strings = describe_ends(made, load_tokenizer(workspace / "model"))
    assert tokens.startswith("stops at <eos> (1: generation_config.json, config.json, tokenizer); ")
    assert tokens.endswith("(7: rollout.stop_token_ids)")
    assert strings.startswith("and after '</answer>'")


@pytest.mark.ranks
def test_e18_padding_of_the_vocabulary_is_never_trained_on(recipe: Recipes, tmp_path: Path) -> None:
    model = write_tiny_checkpoint(
        tmp_path / "padded", num_hidden_layers=2, vocab_size=VOCAB_SIZE * 2
    )
    metrics, _ = run(recipe(model__path=str(model), **SHORT))
    assert metrics["completions/unknown_tokens"] == 0
    # Engine and trainer mean the same probabilities: those of the full vocabulary.
    assert metrics["rollout_correction/k3_kl"] < 1e-9


class TheirEngine:
    """An engine that draws from a whole padded vocabulary, as those of others do."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.inner = recipe_engine(recipe, device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def generate(self, requests: Any, sampling: Any) -> Any:
        groups = self.inner.generate(requests, sampling)
        first, *rest = groups[0].completions
        tokens = first.token_ids.copy()
        tokens[:2] = VOCAB_SIZE + 3
        return [
            replace(groups[0], completions=(replace(first, token_ids=tokens), *rest)),
            *groups[1:],
        ]


@pytest.mark.ranks
def test_e18_unknown_tokens_of_other_engines_are_counted(recipe: Recipes, tmp_path: Path) -> None:
    model = write_tiny_checkpoint(
        tmp_path / "padded", num_hidden_layers=2, vocab_size=VOCAB_SIZE * 2
    )
    made = recipe(model__path=str(model), replay__router_replay_mode="disabled", **SHORT)
    metrics, _ = run(made, make_engine=TheirEngine)
    assert metrics["completions/unknown_tokens"] == 2


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rollout__top_p": 0.9}, "truncated by top_p 0.9: what each token was drawn from is kept"),
        ({"rollout__top_k": 20}, "of which there are at most 20), and all log-probabilities"),
        ({"rollout__top_k": 20, "rollout__top_p": 0.9}, "by top_p 0.9 and top_k 20: "),
        ({"rollout__min_p": 0.05}, "truncated by min_p 0.05: "),
        ({}, "temperature 1, the full vocabulary"),
    ],
    ids=str,
)
def test_e17_truncated_sampling_is_named_with_what_it_costs(
    recipe: Recipes, keys: dict[str, Any], words: str
) -> None:
    from moe_replay.cli.doctor import settings_of

    made = recipe(**keys)
    assert words in describe_drawing(made)
    assert settings_of(made)["sampling"] == describe_drawing(made)


@pytest.mark.ranks
def test_e17_the_start_of_a_run_names_it(recipe: Recipes) -> None:
    made = recipe(rollout__top_k=20, **SHORT)
    seen: list[str] = []

    def call() -> list[str]:
        directory = RunDirectory(made.run.output_dir)
        with build_reporter(made, rank=0, run_directory=directory) as reporter:
            start = reporter.start
            reporter.start = lambda summary: (
                seen.extend(summary.sections["Engine"]),
                start(summary),
            )
            train(made, process=ProcessSpec(rank=0, world_size=1), reporter=reporter)
        return seen

    (lines,) = run_ranks(call, 1)
    assert describe_drawing(made) in lines
    assert any(line.startswith("stops at <eos> (1: ") for line in lines)
