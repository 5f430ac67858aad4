"""A run that stops, resumes and exports is that of one process, in every layout and mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_replay.grpo.loop import train
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.layouts import CASES, Case, layout
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]
MODES = ("disabled", "R2", "R3")
ALONE = Case(layout=layout(), ranks=1)
WITHOUT_ROUTERS = "pp2 without routers"
LAYOUTS = {
    **{
        name: CASES[name]
        for name in (
            *("dp2", "tp2", "tp2 etp1", "ep2", "ep2 allgather", "tp2 ep2 etp1", "pp2", "pp2 vpp2"),
            *("cp2", "cp2 ep2"),
        )
    },
    # The first stage holds the embedding and the dense layer, and no router.
    WITHOUT_ROUTERS: Case(layout=layout(pp=2, stages="Et|tttL"), ranks=2),
}
FOUR_RANKS = {"tp2 pp2 ep2": Case(layout=layout(tp=2, pp=2, ep=2, etp=1), ranks=4)}
"""Four processes cost twice as much: in one mode only."""
ELSEWHERE = {
    "qwen2_moe": ("tp2", "ep2", "pp2 vpp2"),
    "mixtral": ("cp2 ep2", "tp2 ep2 etp1", "pp2"),
    "olmoe": ("ep2", "pp2 vpp2", "cp2"),
    "deepseek_v2": (WITHOUT_ROUTERS, "tp2", "ep2"),
    "deepseek_v3": ("cp2", WITHOUT_ROUTERS, "tp2 ep2 etp1"),
    "glm4_moe": ("ep2 allgather", "cp2", WITHOUT_ROUTERS),
}
"""Family -> its layouts in the order of `MODES`; tests/invariants has every gradient.

The families that are not here share their parts; `test_expert_groups.py` runs gpt-oss."""
TAKEN = [
    (family, name, mode)
    for family, names in ELSEWHERE.items()
    for name, mode in zip(names, MODES, strict=True)
]
COVERED = {(name, mode) for _, name, mode in TAKEN}
RUNS = [
    *TAKEN,
    # The layouts and modes that no other family has taken.
    *(
        ("qwen3_moe", name, mode)
        for mode in MODES
        for name in LAYOUTS
        if (name, mode) not in COVERED
    ),
    *(("qwen3_moe", name, "R3") for name in FOUR_RANKS),
]
OTHERS = [
    (name, MODES[-1 - number % len(MODES)])
    for number, name in enumerate(name for name in CASES if name not in LAYOUTS)
]
"""Every other layout that single steps are tested in, on eight layers, in alternating modes."""
# What must be equal on every rank's own count of rows, and what a sum in another order may move.
EXACT = ("reward", "completions/mean_length", "policy_version", "step")
CLOSE = ("grad_norm", "entropy/mean")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a checkpoint of four layers of each family, the first dense where there are such."""
    folder = tmp_path_factory.mktemp("families")
    dense = {"qwen3_moe": {"mlp_only_layers": [0]}, "qwen2_moe": {"mlp_only_layers": [0]}}
    return {
        family: write_tiny_checkpoint(folder / family, family, **dense.get(family, {}))
        for family in ("qwen3_moe", *ELSEWHERE)
    }


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of eight layers, the first one dense."""
    folder = tmp_path_factory.mktemp("deep")
    return write_tiny_checkpoint(folder, num_hidden_layers=8, mlp_only_layers=[0])


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], Any]:
    """Return an empty place for the runs of a single process, by family and mode."""
    return {}


def go(recipe: Recipe, world_size: int) -> None:
    """Train in processes of their own, to the last step of the recipe or on to it."""

    def call() -> None:
        rank = torch.distributed.get_rank()
        directory = RunDirectory(recipe.run.output_dir)
        with build_reporter(recipe, rank=rank, run_directory=directory) as reporter:
            process = ProcessSpec(rank=rank, world_size=world_size)
            train(recipe, process=process, reporter=reporter)

    run_ranks(call, world_size)


def whole_run(
    recipe: Recipes, model: Path, case: Case, mode: str, folder: str, **more: Any
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Run a step, stop after its checkpoint, resume for another; return metrics and weights."""
    default = layout().model_dump()
    sizes = {k: size for k, size in case.layout.model_dump().items() if size != default[k]}
    keys = {f"megatron__{key}": value for key, value in (sizes | case.overrides).items()}
    out = Path(str(recipe().run.output_dir)).with_name(folder)
    values = {
        "run__output_dir": out,
        "model__path": model,
        "rollout__dtype": "float32",
        "rollout__max_completion_length": 6,
        "replay__router_replay_mode": mode,
        "batch__global_batch_size": 8,
        "batch__max_tokens_per_microbatch": 64,
        "optimizer__lr_scheduler": "constant",
    }
    for steps, export in ((1, "false"), (2, "true")):
        lengths = {"run__max_steps": steps, "checkpoint__export": export}
        go(recipe(**{**values, **keys, **lengths, **more}), case.ranks)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], load_file(out / "export" / "model.safetensors")


def assert_same_run(found: Any, expected: Any, source: Path, mode: str) -> None:
    records, weights = found
    expected_records, expected_weights = expected
    assert [record["step"] for record in records] == [1, 2]
    for many, one in zip(records, expected_records, strict=True):
        assert one.keys() == many.keys()
        assert {key: one[key] for key in EXACT} == {key: many[key] for key in EXACT}
        for key in CLOSE:
            assert many[key] == pytest.approx(one[key], rel=1e-4), key
        assert many["rollout_correction/k3_kl"] < 1e-9
        if mode != "disabled":
            assert many["replay/agreement"] == 1.0
            assert many["replay/coverage"] == 1.0
            for reason in ("last_token", "engine_gave_none", "prompt_omitted"):
                key = f"replay/rows_live_{reason}"
                assert many[key] == one[key]
    before = load_file(source / "model.safetensors")
    assert weights.keys() == before.keys()
    moved = torch.cat([(expected_weights[n] - before[n]).flatten() for n in before]).norm()
    apart = torch.cat([(weights[n] - expected_weights[n]).flatten() for n in before]).norm()
    assert moved > 0
    # Adam moves a weight by the learning rate whatever its gradient's size, so noise in tiny
    # gradients shows.
    assert apart < 0.02 * moved


@pytest.mark.parametrize(("family", "name", "mode"), RUNS)
def test_whole_runs_of_every_layout_mode_and_family_are_those_of_one_process(
    family: str,
    name: str,
    mode: str,
    recipe: Recipes,
    checkpoints: dict[str, Path],
    alone: dict[tuple[str, str], Any],
) -> None:
    source = checkpoints[family]
    if (family, mode) not in alone:
        # With a pass of old log-probabilities, which the others leave to the update.
        with_pass = {"batch__old_logprobs": "pass"}
        alone[family, mode] = whole_run(recipe, source, ALONE, mode, "alone", **with_pass)
    found = whole_run(recipe, source, (LAYOUTS | FOUR_RANKS)[name], mode, "together")
    assert_same_run(found, alone[family, mode], source, mode)


@pytest.mark.parametrize(("name", "mode"), OTHERS)
def test_whole_runs_of_every_other_layout_are_those_of_one_process(
    name: str, mode: str, recipe: Recipes, deep: Path, alone: dict[tuple[str, str], Any]
) -> None:
    # Four prompts: a layout of four replicas takes one each.
    pairs = {"rollout__num_generations": 2}
    if ("deep", mode) not in alone:
        alone["deep", mode] = whole_run(recipe, deep, ALONE, mode, "alone", **pairs)
    found = whole_run(recipe, deep, CASES[name], mode, "together", **pairs)
    assert_same_run(found, alone["deep", mode], deep, mode)


def test_whole_runs_leave_out_no_layout_in_any_mode_and_no_family_in_any_mode() -> None:
    assert {(name, mode) for _, name, mode in RUNS} >= {(n, m) for n in LAYOUTS for m in MODES}
    assert {name for name, _ in OTHERS} | LAYOUTS.keys() == CASES.keys() | {WITHOUT_ROUTERS}
    assert {mode for _, mode in OTHERS} == set(MODES)
    families = {"qwen3_moe", *ELSEWHERE}
    assert {(family, mode) for family, _, mode in RUNS} == {(f, m) for f in families for m in MODES}


def test_t2_a_bfloat16_run_exports_the_expert_biases_that_it_loaded(
    recipe: Recipes, tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(tmp_path / "model", "deepseek_v3", dtype=torch.bfloat16)
    keys = {"model__dtype": "bfloat16", "rollout__dtype": "bfloat16", "grpo__beta": 0.05}
    records, weights = whole_run(recipe, source, CASES["pp2"], "R3", "out", **keys)
    before = load_file(source / "model.safetensors")
    biases = {name for name in before if name.endswith("e_score_correction_bias")}
    assert len(biases) == 3
    assert all(torch.equal(weights[name], before[name]) for name in biases)
    assert {weights[name].dtype for name in biases} == {torch.float32}
    assert {weights[name].dtype for name in weights.keys() - biases} == {torch.bfloat16}
    assert records[0]["replay/agreement"] > 0.95
