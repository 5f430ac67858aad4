"""The update's own forward pass gives what a pass of old log-probabilities gives, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moe_replay.checkpoint.tokenizer import load_tokenizer
from moe_replay.errors import DivergedError, MisalignmentError
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.scorer import MegatronScorer, ScoredSample, Scores
from moe_replay.recipe.recipe import Recipe
from moe_replay.testing.misrouting import one_row_late
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from .guard.test_judging import LONG, one, randomised, wrong
from .test_loop import run

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]
SHORT = {"run__max_steps": 2, "checkpoint__save_steps": 2}


def both_ways(
    recipe: Recipes, *, world_size: int = 1, make_engine: Any = None, **keys: Any
) -> list[tuple[list[dict[str, Any]], dict[str, torch.Tensor]]]:
    """Return metrics and weights of a run with the pass, and of one without."""
    options = {} if make_engine is None else {"make_engine": make_engine}
    found = []
    for way in ("pass", "auto"):
        made = recipe(batch__old_logprobs=way, **{**SHORT, **keys})
        records = run(made, world_size=world_size, restart=True, **options)
        found.append((records, load_file(made.run.output_dir / "export" / "model.safetensors")))
    return found


def assert_equal_bits(found: list[tuple[list[dict[str, Any]], dict[str, torch.Tensor]]]) -> None:
    (records, weights), (others, other_weights) = found
    assert records == others
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of four layers, for two stages of two chunks."""
    model = tmp_path_factory.mktemp("deep") / "model"
    write_tiny_checkpoint(model, num_hidden_layers=4)
    load_tokenizer(model)
    return model


@pytest.mark.parametrize("mode", ["R3", "disabled"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"context_parallel_size": 2},
        {"expert_model_parallel_size": 2},
    ],
    ids=["alone", "tp2", "pp2 vpp2", "cp2", "ep2"],
)
def test_a_run_without_the_pass_is_the_run_with_it(
    sizes: dict[str, int], mode: str, recipe: Recipes, deep: Path
) -> None:
    keys = {f"megatron__{name}": size for name, size in sizes.items()}
    found = both_ways(
        recipe,
        world_size=2 if sizes else 1,
        model__path=deep,
        replay__router_replay_mode=mode,
        **keys,
    )
    assert_equal_bits(found)
    assert found[1][0][0]["policy_ratio/mean"] == 1.0


@pytest.mark.parametrize(
    "keys",
    [
        {"grpo__beta": 0.1, "grpo__loss_type": "dapo"},
        {"megatron__moe_aux_loss_coeff": 0.01, "grpo__loss_type": "dr_grpo"},
        {"replay__live_gap_every": 1, "grpo__advantage_estimator": "rloo"},
        {"replay__guard": "false", "grpo__overlong_filter": "true"},
        {
            "megatron__recompute_granularity": "full",
            "megatron__recompute_method": "uniform",
            "megatron__recompute_num_layers": 1,
        },
        {"model__dtype": "bfloat16"},
        {
            "grpo__rollout_importance_sampling_mode": "sequence_truncate",
            "grpo__off_policy_sequence_mask_delta": 0.001,
            "grpo__entropy_coef": 0.1,
        },
        # Nothing trains, and what the pass measures is measured all the same.
        {"grpo__overlong_filter": "true", "rollout__max_completion_length": 1},
    ],
    ids=["kl", "aux", "live gap", "no guard", "recompute", "bfloat16", "corrected", "idle"],
)
def test_a_run_without_the_pass_is_the_run_with_it_under_every_option(
    keys: dict[str, Any], recipe: Recipes
) -> None:
    assert_equal_bits(both_ways(recipe, **keys))


def test_a_dropped_sample_is_dropped_without_the_pass_too(recipe: Recipes) -> None:
    found = both_ways(
        recipe,
        make_engine=wrong(one_row_late, one),
        replay__on_misaligned="drop",
        **{**LONG, "checkpoint__export": "true"},
    )
    assert_equal_bits(found)
    assert found[1][0][0]["replay/dropped_samples"] == 1.0
    # Control: a clean engine's run is another one.
    clean = both_ways(recipe, **{**LONG, "checkpoint__export": "true"})
    assert clean[1][0][0]["grad_norm"] != found[1][0][0]["grad_norm"]


@pytest.mark.parametrize("plant", [one_row_late, randomised])
def test_wrong_routes_stop_a_run_before_the_optimizer_moves(
    plant: Any, recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(actor: MegatronActor) -> None:
        raise AssertionError("the optimizer moved")

    monkeypatch.setattr(MegatronActor, "step", step)
    for way, where in (("auto", "update 1 of 1"), ("pass", "old_logprobs")):
        with pytest.raises(MisalignmentError, match=f"(?s)step 1, {where}: .*sample 14 "):
            run(
                recipe(batch__old_logprobs=way, **LONG),
                restart=True,
                make_engine=wrong(plant, one),
            )
    # Control: of a healthy run it does move.
    with pytest.raises(AssertionError, match="the optimizer moved"):
        run(recipe(**LONG), restart=True)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"context_parallel_size": 2},
    ],
    ids=["alone", "tp2", "pp2 vpp2", "cp2"],
)
@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_scoring_in_larger_microbatches_changes_nothing_but_rounding(
    mode: str,
    sizes: dict[str, int],
    recipe: Recipes,
    deep: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = tmp_path / "sizes"
    count_passes(monkeypatch, log, lambda given: str(len(given)))
    keys = {
        "model__path": deep,
        "replay__router_replay_mode": mode,
        "rollout__dtype": "float32",
        "grpo__beta": 0.1,
        "run__max_steps": 1,
        # The old pass and the reference's, both in other microbatches than the updates.
        "batch__steps_per_generation": 2,
        **{f"megatron__{name}": size for name, size in sizes.items()},
    }
    world_size = 2 if sizes else 1
    (usual,) = run(recipe(**keys), world_size=world_size, restart=True)
    (larger,) = run(
        recipe(batch__max_tokens_per_scoring_microbatch=1000, **keys),
        world_size=world_size,
        restart=True,
    )
    assert usual.keys() == larger.keys()
    assert larger["replay/agreement"] == 1.0
    for key in ("loss", "grad_norm", "kl", "entropy/mean", "rollout_correction/training_log_ppl"):
        assert larger[key] == pytest.approx(usual[key], rel=1e-4, abs=1e-6), key
    # Control: the passes did run in fewer microbatches.
    counts = [int(line) for line in log.read_text().split()]
    before, after = counts[: len(counts) // 2], counts[len(counts) // 2 :]
    assert max(after) < min(before)


def count_passes(
    monkeypatch: pytest.MonkeyPatch, log: Path, says: Callable[[Any], str] | None = None
) -> None:
    """Write a line to ``log`` for each forward pass alone, whatever process runs it.

    It is what the pass does, or what ``says`` says of its microbatches.
    """
    score = MegatronScorer.score

    def counted(scorer: MegatronScorer, *args: Any, **options: Any) -> Scores:
        with log.open("a") as file:
            file.write(f"{says(args[0]) if says else options['routing'].value}\n")
        return score(scorer, *args, **options)

    monkeypatch.setattr(MegatronScorer, "score", counted)


@pytest.mark.parametrize(
    ("keys", "passes"),
    [
        ({}, []),
        ({"replay__router_replay_mode": "disabled"}, []),
        ({"replay__router_replay_mode": "R2"}, ["record"]),
        ({"batch__old_logprobs": "pass"}, ["replay"]),
        ({"batch__steps_per_generation": 2}, ["replay"]),
        ({"replay__live_gap_every": 1}, ["live"]),
        ({"grpo__beta": 0.1}, ["replay"]),
        # All rewards count for nothing, so there is no update whose pass could be taken.
        ({"rollout__max_completion_length": 1, "grpo__overlong_filter": "true"}, ["replay"]),
    ],
)
def test_a_step_runs_no_pass_more_than_it_needs(
    keys: dict[str, Any],
    passes: list[str],
    recipe: Recipes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = tmp_path / "passes"
    log.touch()
    count_passes(monkeypatch, log)
    run(recipe(run__max_steps=1, **keys))
    assert log.read_text().split() == passes


def test_a_value_that_is_not_finite_stops_all_ranks_before_the_optimizer_moves(
    recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = MegatronActor._scored

    def spoiled(actor: MegatronActor, *args: Any) -> dict[int, ScoredSample]:
        values = scored(actor, *args)
        if torch.distributed.get_rank() == 1:
            values[5].token_logprobs[1] = np.nan
        return values

    monkeypatch.setattr(MegatronActor, "_scored", spoiled)
    made = recipe(batch__global_batch_size=32, run__max_steps=1)
    with pytest.raises(
        DivergedError,
        match=r"step 1: old_logprobs or entropies are not finite(?s:.*)sample 5 of replica 1: 1 of ",
    ):
        run(made, world_size=2)
    assert not list((made.run.output_dir / "checkpoints").glob("*"))


def test_a_run_goes_on_when_the_way_has_changed(recipe: Recipes, tmp_path: Path) -> None:
    ends = {"checkpoint__save_steps": 1, "run__output_dir": str(tmp_path / "changed")}
    run(recipe(batch__old_logprobs="pass", **ends, run__max_steps=1))
    run(recipe(batch__old_logprobs="auto", **ends, run__max_steps=2))
    whole = recipe(run__output_dir=str(tmp_path / "whole"), run__max_steps=2)
    run(whole)
    changed = (tmp_path / "changed" / "metrics.jsonl").read_text().splitlines()
    straight = (whole.run.output_dir / "metrics.jsonl").read_text().splitlines()
    for line, other in zip(changed, straight, strict=True):
        first, second = json.loads(line), json.loads(other)
        del first["seconds"], second["seconds"]
        assert first == second
