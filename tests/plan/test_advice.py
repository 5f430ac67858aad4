"""The changes that make a recipe fit are few, do make it fit, and are lines of a recipe."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from moe_replay.plan.advice import recipe_lines, remedies
from moe_replay.plan.machine import read_machine
from moe_replay.plan.plan import make_plan
from moe_replay.recipe.load import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
EIGHT = read_machine(["gpus=8x80GB"])


def test_qwen3_30b_is_told_of_both_options(recipe, shape):
    found = [dict(r.keys) for r in remedies(recipe(), shape("qwen3-30b-a3b"), EIGHT)]
    optimizer = "megatron.optimizer"
    assert {
        f"{optimizer}.use_precision_aware_optimizer": True,
        f"{optimizer}.main_grads_dtype": "bfloat16",
        f"{optimizer}.exp_avg_dtype": "bfloat16",
        f"{optimizer}.exp_avg_sq_dtype": "bfloat16",
    } in found
    assert {
        f"{optimizer}.optimizer_cpu_offload": True,
        f"{optimizer}.use_precision_aware_optimizer": True,
    } in found


def test_every_remedy_fits(recipe, shape):
    found = remedies(recipe(), shape("qwen3-30b-a3b"), EIGHT)
    assert found
    assert all(remedy.memory.fits for remedy in found)


def test_what_leaves_most_room_comes_first(recipe, shape):
    """By hand: Adam on the host takes 12 bytes of 3.82e9 parameters off each GPU, moments in
    bfloat16 and what belongs to them 8, and half the tokens a microbatch less than either."""
    found = remedies(recipe(), shape("qwen3-30b-a3b"), EIGHT)
    room = [remedy.memory.headroom for remedy in found]
    assert room == sorted(room, reverse=True)
    assert len(set(room)) > 1
    assert "megatron.optimizer.optimizer_cpu_offload" in found[0].keys


def test_nothing_is_promised_where_nothing_helps(recipe, shape):
    """671 B parameters in bfloat16 are 168 GB on each of eight GPUs, however they are cut."""
    assert remedies(recipe(), shape("deepseek-v3"), EIGHT) == []


def test_a_recipe_that_fits_gets_no_advice(recipe):
    optimizer = {"optimizer_cpu_offload": True, "use_precision_aware_optimizer": True}
    fits = recipe(
        megatron={"expert_model_parallel_size": 8, "optimizer": optimizer},
        batch={"max_tokens_per_microbatch": 8192},
    )
    plan = make_plan(fits, EIGHT)
    assert (plan.memory.fits, list(plan.remedies)) == (True, [])


def test_lines_are_toml():
    keys = {
        "batch.logprob_chunk_size": 1024,
        "megatron.recompute_modules": ["moe"],
        "megatron.recompute_method": None,
        "megatron.optimizer.optimizer_cpu_offload": True,
        "rollout.gpu_memory_utilization": 0.6,
    }
    lines = recipe_lines(keys)
    assert "# remove recompute_method" in lines
    assert tomllib.loads("\n".join(lines)) == {
        "batch": {"logprob_chunk_size": 1024},
        "megatron": {"recompute_modules": ["moe"], "optimizer": {"optimizer_cpu_offload": True}},
        "rollout": {"gpu_memory_utilization": 0.6},
    }


@pytest.mark.parametrize("words", [["gpus=8x80GB"], ["gpus=8x80GB", "servers=8x80GB"]])
def test_seconds_need_the_engines_gpus(recipe, words):
    """By hand: 512 x 4096 tokens x 6 x 3.3 B operations over 8 x 989 T x 0.3 are 17 s and more."""
    time = make_plan(recipe(), read_machine(words)).time
    assert ("rollout" in time.parts) == (len(words) == 2)
    # Recomputation makes 8 of the 6 operations, attention adds the rest.
    assert 17 * 8 / 6 < time.parts["update"] < 60
    assert time.total == pytest.approx(sum(time.parts.values()))


def optimizer_keys(found) -> list[dict[str, object]]:
    """Return the optimizer keys of each remedy that changes nothing else."""
    prefix = "megatron.optimizer."
    return [
        {key.removeprefix(prefix): value for key, value in each.keys.items()}
        for each in found
        if all(key.startswith(prefix) for key in each.keys)
    ]


def test_offload_is_offered_beside_lean_moments(shape):
    """On the host moments are float32, so their formats have to go."""
    recipe = load_recipe(RECIPES / "qwen3-30b-a3b" / "colocated.toml", {}).on_device("cuda")
    found = remedies(recipe, shape("qwen3-30b-a3b"), read_machine(["gpus=8x40GB"]))
    gone = {"exp_avg_dtype": None, "exp_avg_sq_dtype": None}
    assert {"optimizer_cpu_offload": True} | gone in optimizer_keys(found)
    assert all(each.memory.fits for each in found)


def test_a_small_host_is_told_to_keep_the_optimizer_on_the_gpus(recipe, shape):
    """By hand: offloaded state takes 8 x 16 x 3.82 = 489 GB of the host, a save 1,062."""
    options = {"optimizer_cpu_offload": True, "use_precision_aware_optimizer": True}
    offloaded = recipe(megatron={"expert_model_parallel_size": 8, "optimizer": options})
    found = remedies(
        offloaded, shape("qwen3-30b-a3b"), read_machine(["gpus=8x80GB", "host_gb=1400"])
    )
    lean = dict.fromkeys(("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"), "bfloat16")
    assert lean | {"optimizer_cpu_offload": None} in optimizer_keys(found)
    assert all(each.memory.fits for each in found)
