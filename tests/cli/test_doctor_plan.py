"""`moe-replay doctor --plan` for a user: tables, JSON, exit codes, and no weights."""

import json
from pathlib import Path

import pytest

from moe_replay.cli.main import main

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(tmp_path) -> str:
    """Write a recipe whose checkpoint is a config.json and nothing else."""
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
[run]
output_dir = "out"
max_steps = 2
[model]
path = "{RECIPES / "qwen3-30b-a3b" / "model"}"
dtype = "bfloat16"
[data]
train = "reasoning_gym:chain_sum"
max_prompt_length = 1024
[[rewards]]
function = "reasoning_gym"
[rollout]
engine = "vllm-server"
urls = ["http://127.0.0.1:1"]
max_completion_length = 7168
[batch]
global_batch_size = 512
max_tokens_per_microbatch = 16384
[megatron]
expert_model_parallel_size = 8
recompute_granularity = "full"
recompute_method = "uniform"
recompute_num_layers = 1
"""
    )
    return str(path)


def test_what_does_not_fit_exits_with_2_and_says_what_would(recipe, capsys):
    assert main(["doctor", recipe, "--plan", "gpus=8x80GB"]) == 2
    shown = capsys.readouterr().out
    assert "computed, not run on a GPU" in shown
    assert "this recipe does not fit" in shown
    assert 'exp_avg_sq_dtype = "bfloat16"' in shown
    assert "optimizer_cpu_offload = true" in shown


def test_what_fits_exits_with_0(recipe, capsys):
    host = ["--megatron.optimizer.optimizer_cpu_offload", "true"]
    aware = ["--megatron.optimizer.use_precision_aware_optimizer", "true"]
    assert main(["doctor", recipe, *host, *aware, "--plan", "gpus=8x80GB"]) == 0
    assert "this recipe fits" in capsys.readouterr().out


def test_json_says_the_same(recipe, capsys):
    words = ["gpus=8x80GB", "servers=8x80GB"]
    assert main(["doctor", recipe, "--plan", *words, "--json"]) == 2
    plan = json.loads(capsys.readouterr().out)
    assert (plan["fits"], plan["machine"], plan["layout"]) == (False, "8 x 80 GB", "expert 8")
    by_name = {phase["phase"]: phase for phase in plan["phases"]}
    update = by_name["update"]
    assert update["total_bytes"] > plan["usable_bytes"] == 76_000_000_000
    assert abs(sum(update["bytes"].values()) - update["total_bytes"]) < len(update["bytes"])
    assert plan["engine"]["cache_bytes_per_token"] == 24_576
    assert plan["remedies"][0]["peak_bytes"] < plan["usable_bytes"]
    assert plan["assumptions"]["tflops"] == "989"


def test_a_machine_that_makes_no_sense_is_refused(recipe, capsys):
    assert main(["doctor", recipe, "--plan", "gpus=many"]) == 2
    assert "expected a form like gpus=8x80GB" in capsys.readouterr().err


def test_a_layout_that_cannot_be_is_refused(recipe, capsys):
    pipeline = ["--megatron.pipeline_model_parallel_size", "5"]
    assert main(["doctor", recipe, *pipeline, "--plan", "gpus=40x80GB"]) == 2
    assert "48 layers cannot be dealt evenly" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("moe_router_fusion", "true", "replay cannot be exact with moe_router_fusion"),
        ("frobnicate", "1", "frobnicate: set to 1, but TransformerConfig"),
        ("moe_permute_fusion", '"yes"', "expected true or false"),
    ],
)
def test_options_that_no_machine_takes_are_refused(recipe, capsys, option, value, message):
    with open(recipe, "a") as file:
        file.write(f"[megatron.transformer]\n{option} = {value}\n")
    assert main(["doctor", recipe, "--plan", "gpus=64x80GB"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_options_that_only_gpus_have_are_planned(recipe, capsys):
    with open(recipe, "a") as file:
        file.write("[megatron.transformer]\nmoe_permute_fusion = true\n")
    assert main(["doctor", recipe, "--plan", "gpus=64x80GB"]) == 0
    assert "this recipe fits" in capsys.readouterr().out
