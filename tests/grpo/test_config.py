"""The recipe as users write it: what loads, what is refused, and how the refusal reads."""

import copy
from pathlib import Path

import pytest
import tomlkit

from moe_replay.errors import RecipeError, UnsupportedError
from moe_replay.grpo.config import Recipe
from moe_replay.grpo.recipe_file import load_recipe, recipe_from_table, recipe_keys
from moe_replay.routing import ReplayMode

SMALLEST = {
    "run": {"output_dir": "/runs/a", "max_steps": 10},
    "model": {"path": "/models/m"},
    "data": {"train": "/data/train.jsonl"},
    "rewards": [{"function": "exact_match"}],
    "rollout": {"max_completion_length": 64},
    "batch": {"global_batch_size": 32, "max_tokens_per_microbatch": 4096},
}


def table(**sections: object) -> dict:
    """Return the smallest recipe with keys of sections replaced or added."""
    result = copy.deepcopy(SMALLEST)
    for name, keys in sections.items():
        if isinstance(keys, dict):
            result.setdefault(name, {}).update(keys)
        else:
            result[name] = keys
    return result


def recipe(**sections: object) -> Recipe:
    return recipe_from_table(table(**sections))


def problems_of(**sections: object) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(**sections)
    return str(caught.value)


def write(folder: Path, **sections: object) -> Path:
    path = folder / "recipe.toml"
    path.write_text(tomlkit.dumps(table(**sections)))
    return path


def test_smallest_recipe_has_the_documented_defaults():
    loaded = recipe()
    assert loaded.replay.router_replay_mode is ReplayMode.R3
    assert loaded.rollout.dtype == "bfloat16"
    assert loaded.grpo.epsilon_high == 0.2
    assert loaded.rewards[0].name == "exact_match"
    assert loaded.prompts_per_step == 4
    assert loaded.max_sequence_length == 576


def test_integer_is_accepted_for_a_float():
    assert recipe(optimizer={"lr": 1}).optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("run", "max_steps", "10"),
        ("run", "max_steps", 1.5),
        ("run", "max_steps", True),
        ("optimizer", "lr", True),
        ("optimizer", "lr", float("nan")),
        ("rollout", "top_p", 1.5),
        ("rollout", "num_generations", 1),
        ("data", "shuffle", 1),
        ("megatron", "recompute_modules", "moe"),
    ],
)
def test_wrong_type_or_range_names_key_and_value(section, key, value):
    message = problems_of(**{section: {key: value}})
    assert f"{section}.{key}: got {value!r}, expected" in message
    assert "It is: " in message


def test_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match=r"frozen"):
        recipe().run.seed = 3


def test_missing_key_says_what_it_is():
    broken = table()
    del broken["rollout"]["max_completion_length"]
    with pytest.raises(
        RecipeError, match=r"rollout.max_completion_length: missing.*Most tokens sampled"
    ):
        recipe_from_table(broken)


def test_missing_section_reports_its_required_keys():
    broken = table()
    del broken["model"]
    with pytest.raises(RecipeError, match=r"model.path: missing"):
        recipe_from_table(broken)


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("grpo", "epsilonn", "grpo.epsilon"),
        ("replay", "min_covrage", "replay.min_coverage"),
        ("rollout", "epsilon", "grpo.epsilon"),
        ("rollout", "epsilonn", "grpo.epsilon"),
        ("grpo", "router_replay_mode", "replay.router_replay_mode"),
        ("run", "lr", "optimizer.lr"),
    ],
)
def test_unknown_key_names_the_nearest_known_one(section, key, meant):
    assert (
        f"{section}.{key}: set to 3, but there is no such key; did you mean {meant}?"
        in problems_of(**{section: {key: 3}})
    )


def test_unknown_key_like_no_other_lists_the_section():
    assert "[checkpoint] knows save_steps, save_total_limit, export" in problems_of(
        checkpoint={"zzz": 1}
    )


def test_unknown_section_lists_the_sections():
    message = problems_of(trainer={"x": 1})
    assert "trainer: set to {'x': 1}, but there is no such section or key" in message
    assert "the sections are run, model, data" in message


def test_misspelt_section_names_the_nearest_one():
    assert "did you mean [rollout]?" in problems_of(rolout={"x": 1})


def test_unknown_reward_key_names_the_entry():
    message = problems_of(
        rewards=[{"function": "exact_match"}, {"function": "format", "wieght": 2}]
    )
    assert "rewards.1.wieght" in message
    assert "did you mean rewards.1.weight" in message


def test_wrong_choice_names_the_nearest_one():
    message = problems_of(grpo={"loss_type": "dapoo"})
    assert "'grpo', 'bnpo', 'dr_grpo' or 'dapo' (nearest: 'dapo')" in message


def test_scalar_in_place_of_a_section_is_refused():
    assert "grpo: got the value 3, expected a table: write [grpo]" in problems_of(grpo=3)


@pytest.mark.parametrize("rewards", [[], {"function": "exact_match"}])
def test_rewards_must_be_a_list_of_tables(rewards):
    broken = table()
    broken["rewards"] = rewards
    with pytest.raises(RecipeError, match=r"expected at least one \[\[rewards\]\] table"):
        recipe_from_table(broken)


def test_all_problems_are_reported_at_once():
    message = problems_of(
        run={"max_steps": "10"},
        rollout={"temprature": 1.0},
        optimizer={"min_lr": 1e-8},
        megatron={"tensor_model_parallel_size": 2},
        trainer={"x": 1},
    )
    assert "has 5 problems" in message
    for path in (
        "run.max_steps",
        "rollout.temprature",
        "optimizer.min_lr",
        "megatron.tensor_model_parallel_size",
        "trainer",
    ):
        assert f"\n  {path}: " in message


@pytest.mark.parametrize(
    ("sections", "path", "reason"),
    [
        (
            {"replay": {"router_replay_mode": "disabled", "min_coverage": 0.5}},
            "replay.min_coverage",
            "replay.router_replay_mode is 'disabled'",
        ),
        (
            {"replay": {"guard": False, "guard_rows": 8}},
            "replay.guard_rows",
            "replay.guard is false",
        ),
        ({"replay": {"reference_routes": "live"}}, "replay.reference_routes", "grpo.beta is 0"),
        ({"optimizer": {"min_lr": 1e-8}}, "optimizer.min_lr", "lr_scheduler is 'constant'"),
        ({"data": {"task": {"max_terms": 3}}}, "data.task", "no dataset is generated"),
        ({"data": {"train_seed": 3}}, "data.train_seed", "data.train is a file"),
        ({"data": {"eval_seed": 3}}, "data.eval_seed", "data.eval is not set"),
        ({"data": {"eval_size": 3}}, "data.eval_size", "data.eval is not set"),
        ({"eval": {"every_steps": 3}}, "eval.every_steps", "nothing is evaluated"),
        (
            {"data": {"train": "reasoning_gym:chain_sum", "prompt_column": "q"}},
            "data.prompt_column",
            "every dataset is generated",
        ),
        (
            {"data": {"train": "reasoning_gym:chain_sum", "shuffle": True}},
            "data.shuffle",
            "random order already",
        ),
        (
            {"megatron": {"recompute_method": "uniform"}},
            "megatron.recompute_method",
            "recompute_granularity is not set, not 'full'",
        ),
        (
            {"megatron": {"recompute_granularity": "selective", "recompute_num_layers": 1}},
            "megatron.recompute_num_layers",
            "is 'selective', not 'full'",
        ),
    ],
)
def test_key_without_effect_is_refused_with_the_reason(sections, path, reason):
    message = problems_of(**sections)
    assert f"{path}: set to " in message
    assert reason in message
    assert "has 1 problem:" in message


def test_key_without_effect_is_refused_even_at_its_default():
    assert "optimizer.min_lr" in problems_of(optimizer={"min_lr": 0.0})


def test_same_keys_are_accepted_where_they_have_an_effect():
    loaded = recipe(
        replay={"reference_routes": "live", "guard_rows": 8, "min_coverage": 0.5},
        grpo={"beta": 0.1},
        optimizer={"lr_scheduler": "cosine", "min_lr": 1e-8},
        data={"eval": "reasoning_gym:chain_sum", "task": {"max_terms": 3}, "eval_size": 5},
        eval={"every_steps": 3},
    )
    assert loaded.replay.reference_routes == "live"


@pytest.mark.parametrize(
    ("sections", "path", "reason"),
    [
        (
            {"batch": {"global_batch_size": 33}},
            "batch.global_batch_size",
            "33 samples is not a multiple",
        ),
        ({"batch": {"micro_batch_size": 4}}, "batch.max_tokens_per_microbatch", "both of"),
        (
            {"batch": {"max_tokens_per_microbatch": 575}},
            "batch.max_tokens_per_microbatch",
            "= 576 tokens",
        ),
        (
            {"optimizer": {"lr_scheduler": "linear", "min_lr": 1.0}},
            "optimizer.min_lr",
            "is above lr",
        ),
        ({"optimizer": {"warmup_steps": 10}}, "optimizer.warmup_steps", "never be reached"),
        (
            {"megatron": {"recompute_granularity": "full", "recompute_method": "uniform"}},
            "megatron.recompute_num_layers",
            "missing",
        ),
        (
            {"rewards": [{"function": "a.py:f"}, {"function": "b.py:f"}]},
            "rewards.1.name",
            "also the name of rewards.0",
        ),
        (
            {"data": {"eval": "/e.jsonl"}, "eval": {"num_generations": 2}},
            "eval.num_generations",
            "all equal",
        ),
    ],
)
def test_contradiction_between_keys_is_refused(sections, path, reason):
    message = problems_of(**sections)
    assert f"\n  {path}: " in message
    assert reason in message


def test_batch_needs_a_budget_or_a_size():
    broken = table()
    del broken["batch"]["max_tokens_per_microbatch"]
    with pytest.raises(
        RecipeError, match=r"neither of max_tokens_per_microbatch and micro_batch_size"
    ):
        recipe_from_table(broken)


def test_micro_batch_size_must_divide_the_batch():
    broken = table(batch={"micro_batch_size": 5})
    del broken["batch"]["max_tokens_per_microbatch"]
    with pytest.raises(RecipeError, match=r"5 does not divide global_batch_size = 32"):
        recipe_from_table(broken)


@pytest.mark.parametrize(
    "key",
    [
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    ],
)
def test_layout_without_an_equality_test_is_unsupported(key):
    with pytest.raises(
        UnsupportedError, match=rf"megatron.{key}: got 2, expected 1.*no test of equality"
    ):
        recipe(megatron={key: 2})


def test_unsupported_and_wrong_together_are_wrong():
    with pytest.raises(RecipeError) as caught:
        recipe(megatron={"context_parallel_size": 2}, grpo={"epsilonn": 1})
    assert not isinstance(caught.value, UnsupportedError)


def test_recipe_built_directly_keeps_the_rules_between_sections():
    sections = dict(recipe())
    sections["rollout"] = sections["rollout"].model_copy(update={"num_generations": 5})
    with pytest.raises(ValueError, match=r"not a multiple of"):
        Recipe(**sections)


def test_world_that_divides_the_batch_is_accepted():
    recipe().check_world(4)


def test_world_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(RecipeError, match=r"4 prompts per step .* evenly by 8 data-parallel ranks"):
        recipe().check_world(8)


def test_world_must_hold_whole_microbatches():
    loaded = table(batch={"micro_batch_size": 16})
    del loaded["batch"]["max_tokens_per_microbatch"]
    recipe_from_table(loaded).check_world(2)
    with pytest.raises(RecipeError, match=r"32 samples in microbatches of 16"):
        recipe_from_table(loaded).check_world(4)


def test_relative_paths_of_the_file_start_at_its_folder(tmp_path):
    path = write(
        tmp_path,
        run={"output_dir": "out"},
        model={"path": "m"},
        data={"train": "t.jsonl", "eval": "reasoning_gym:chain_sum"},
        rewards=[{"function": "r.py:f"}, {"function": "package.module:g"}, {"function": "format"}],
    )
    loaded = load_recipe(path)
    assert loaded.run.output_dir == tmp_path / "out"
    assert loaded.model.path == tmp_path / "m"
    assert loaded.data.train == str(tmp_path / "t.jsonl")
    assert loaded.data.eval == "reasoning_gym:chain_sum"
    assert [r.function for r in loaded.rewards] == [
        f"{tmp_path / 'r.py'}:f",
        "package.module:g",
        "format",
    ]


def test_relative_paths_of_overrides_start_at_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    loaded = load_recipe(write(tmp_path), [("model.path", "m"), ("rewards.0.function", "r.py:f")])
    assert loaded.model.path == tmp_path / "here" / "m"
    assert loaded.rewards[0].function == f"{tmp_path / 'here' / 'r.py'}:f"


def test_overrides_are_read_as_toml_values_or_strings(tmp_path):
    loaded = load_recipe(
        write(tmp_path, rewards=[{"function": "exact_match"}, {"function": "format"}]),
        [
            ("grpo.beta", "0.1"),
            ("grpo.loss_type", "dapo"),
            ("model.grouped_experts", "true"),
            ("logging.sinks", '["wandb"]'),
            ("rewards.1.args.regex", "a.*"),
            ("rewards.0.weight", "2"),
        ],
    )
    assert loaded.grpo.beta == 0.1
    assert loaded.grpo.loss_type == "dapo"
    assert loaded.model.grouped_experts is True
    assert loaded.logging.sinks == ("wandb",)
    assert loaded.rewards[1].args == {"regex": "a.*"}
    assert loaded.rewards[0].weight == 2.0


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("rewards.1.weight", "names no entry of a list of 1"),
        ("rewards.weight", "names no entry of a list of 1"),
        ("run.max_steps.x", "run.max_steps is the value 10, not a table"),
        ("grpo.betaa", "grpo.betaa: set to 2, but there is no such key"),
        ("replay.reference_routes", "grpo.beta is 0"),
    ],
)
def test_wrong_override_is_refused(tmp_path, key, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path), [(key, "2" if key != "replay.reference_routes" else "live")])


def test_missing_file_names_the_path(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.toml does not exist"):
        load_recipe(tmp_path / "nothing.toml")


def test_broken_toml_names_the_line(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[run]\nmax_steps = ten\n")
    with pytest.raises(RecipeError, match=r"not valid TOML.*line 2"):
        load_recipe(path)


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
    assert load_recipe(path).fingerprint() == loaded.fingerprint()


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
        {"replay": {"guard_rows": 7}},
        {"batch": {"max_tokens_per_microbatch": 8192}},
    ],
)
def test_fingerprint_is_unchanged_by_what_does_not_decide_results(sections):
    assert recipe(**sections).fingerprint() == recipe().fingerprint()


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
    ],
)
def test_fingerprint_changes_with_what_decides_results(sections):
    assert recipe(**sections).fingerprint() != recipe().fingerprint()


def test_fingerprint_depends_on_max_steps_where_the_schedule_does():
    schedule = {"optimizer": {"lr_scheduler": "cosine"}}
    assert (
        recipe(run={"max_steps": 20}, **schedule).fingerprint()
        != recipe(run={"max_steps": 30}, **schedule).fingerprint()
    )


def test_every_key_is_described():
    keys = list(recipe_keys())
    assert {"run.output_dir", "rewards.N.weight", "grpo.epsilon_high"} <= {key.path for key in keys}
    assert all(key.text.endswith(".") for key in keys)
