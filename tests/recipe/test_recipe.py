"""The recipe as the loop sees it: values, world sizes, its text and its fingerprint."""

import pytest

from moe_replay.errors import RecipeError
from moe_replay.recipe.load import load_recipe, recipe_from_table
from moe_replay.routing import ReplayMode

from ..grpo.smallest_recipe import recipe, table


def test_smallest_recipe_has_the_documented_defaults():
    loaded = recipe()
    assert loaded.replay.router_replay_mode is ReplayMode.R3
    assert loaded.rollout.dtype == "bfloat16"
    assert loaded.grpo.epsilon_high == 0.2
    assert loaded.rewards[0].name == "exact_match"
    assert loaded.prompts_per_step == 4
    assert loaded.max_sequence_length == 576


@pytest.mark.parametrize(
    ("rollout", "on_cuda"),
    [
        ({}, ("bfloat16", "optimizer")),
        ({"engine": "vllm"}, ("bfloat16", "optimizer")),
        ({"engine": "vllm-server", "urls": ["http://a"]}, ("bfloat16", "none")),
        ({"engine": "files", "path": "/r"}, ("bfloat16", "none")),
    ],
)
def test_what_a_recipe_leaves_open_follows_the_device(rollout, on_cuda):
    open_ = recipe(rollout=rollout)
    cpu, cuda = open_.on_device("cpu"), open_.on_device("cuda")
    assert (cpu.model.dtype, cpu.megatron.offload_during_rollout) == ("float32", "none")
    assert (cuda.model.dtype, cuda.megatron.offload_during_rollout) == on_cuda
    assert cuda.on_device("cpu") == cuda
    # Another number format trains differently; memory given back does not.
    ours, theirs = cpu.fingerprint_items(), cuda.fingerprint_items()
    assert {key for key in ours if ours[key] != theirs[key]} == {"model.dtype"}
    assert (
        cpu.fingerprint_items()
        == recipe(rollout=rollout, model={"dtype": "float32"}).on_device("cpu").fingerprint_items()
    )


def test_what_a_recipe_sets_does_not_follow_the_device():
    given = {"model": {"dtype": "float32"}, "megatron": {"offload_during_rollout": "weights"}}
    cuda = recipe(**given).on_device("cuda")
    assert (cuda.model.dtype, cuda.megatron.offload_during_rollout) == ("float32", "weights")


def test_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match=r"frozen"):
        recipe().run.seed = 3


def test_world_that_divides_the_batch_is_accepted():
    recipe().check_world(4)


def test_world_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(
        RecipeError, match=r"4 prompts per update .* evenly by 8 data-parallel ranks"
    ):
        recipe().check_world(8)


def test_world_must_hold_whole_microbatches():
    loaded = table(batch={"micro_batch_size": 16})
    del loaded["batch"]["max_tokens_per_microbatch"]
    recipe_from_table(loaded).check_world(2)
    with pytest.raises(RecipeError, match=r"32 samples in microbatches of 16"):
        recipe_from_table(loaded).check_world(4)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_t10_an_interleaved_pipeline_takes_any_number_of_samples(stages):
    layout = {
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": 2,
    }
    for samples in range(2, 26, 2):
        batch = {"global_batch_size": samples}
        loaded = recipe(rollout={"num_generations": 2}, batch=batch, megatron=layout)
        loaded.check_world(stages)
        # What lies in tests/batch/test_packing.py holds for each of these counts.
        assert loaded.megatron.round_up_microbatches(samples) % stages == 0


def test_resolved_toml_loads_as_an_equal_recipe(tmp_path):
    loaded = recipe(
        data={"train": "reasoning_gym:chain_sum", "task": {"max_terms": 3}},
        rewards=[{"function": "reasoning_gym"}, {"function": "format", "args": {"regex": 'a"\n'}}],
        grpo={"beta": 0.1},
        megatron={"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        logging={"sinks": ["tensorboard"]},
    )
    path = tmp_path / "resolved.toml"
    path.write_text(loaded.resolved_toml())
    assert load_recipe(path) == loaded
    assert load_recipe(path).fingerprint_items() == loaded.fingerprint_items()


def test_resolved_toml_holds_defaults_but_no_key_without_effect():
    text = recipe().resolved_toml()
    assert "min_coverage = 0.95" in text
    assert "epsilon_high = 0.2" in text
    assert "reference_routes" not in text
    assert "min_lr" not in text


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"output_dir": "/elsewhere"}},
        {"run": {"max_steps": 20}},
        {"model": {"path": "/moved/m"}},
        {"data": {"train": "/moved/train.jsonl"}},
        {"checkpoint": {"save_steps": 7}},
        {"logging": {"sinks": ["wandb"]}},
        {"replay": {"on_misaligned": "drop"}},
        {"batch": {"max_tokens_per_microbatch": 8192}},
    ],
)
def test_fingerprint_is_unchanged_by_what_does_not_decide_results(sections):
    assert recipe(**sections).fingerprint_items() == recipe().fingerprint_items()


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"seed": 1}},
        {"data": {"train": "/data/other.jsonl"}},
        {"optimizer": {"lr": 1e-5}},
        {"replay": {"router_replay_mode": "R2"}},
        {"rollout": {"temperature": 0.9}},
        {"rewards": [{"function": "exact_match", "weight": 2.0}]},
        {"batch": {"global_batch_size": 64}},
        {"megatron": {"moe_aux_loss_coeff": 0.01}},
    ],
)
def test_fingerprint_changes_with_what_decides_results(sections):
    assert recipe(**sections).fingerprint_items() != recipe().fingerprint_items()


def test_fingerprint_depends_on_max_steps_where_the_schedule_does():
    schedule = {"optimizer": {"lr_scheduler": "cosine"}}
    assert (
        recipe(run={"max_steps": 20}, **schedule).fingerprint_items()
        != recipe(run={"max_steps": 30}, **schedule).fingerprint_items()
    )
