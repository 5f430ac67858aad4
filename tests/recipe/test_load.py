"""The recipe as users write it: files, overrides, and how a refusal reads."""

from pathlib import Path

import pytest
import tomlkit

from moe_replay.errors import RecipeError
from moe_replay.recipe.keys import recipe_keys
from moe_replay.recipe.load import load_recipe, recipe_from_table

from ..grpo.smallest_recipe import problems_of, recipe, table


def write(folder: Path, **sections: object) -> Path:
    path = folder / "recipe.toml"
    path.write_text(tomlkit.dumps(table(**sections)))
    return path


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
        ("logging", "sinks", {"wandb": 1}),
    ],
)
def test_wrong_type_or_range_names_key_and_value(section, key, value):
    message = problems_of(**{section: {key: value}})
    assert f"{section}.{key}: got {value!r}, expected" in message
    assert "It is: " in message


def test_missing_key_says_what_it_is():
    broken = table()
    del broken["rollout"]["max_completion_length"]
    with pytest.raises(
        RecipeError,
        match=r"rollout.max_completion_length: missing.*Maximum number of tokens sampled",
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
    assert "'dapo', 'cispo', 'sapo' or 'dppo' (nearest: 'dapo')" in message


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
        megatron={"virtual_pipeline_model_parallel_size": 2},
        trainer={"x": 1},
    )
    assert "has 5 problems" in message
    for path in (
        "run.max_steps",
        "rollout.temprature",
        "optimizer.min_lr",
        "megatron.virtual_pipeline_model_parallel_size",
        "trainer",
    ):
        assert f"\n  {path}: " in message


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


@pytest.mark.parametrize(
    ("function", "file"),
    [
        ("mine:f", "mine.py"),
        ("package.inner:f", "package/inner.py"),
        ("package:f", "package/__init__.py"),
    ],
)
def test_d7_module_beside_the_recipe_is_found_by_its_file(tmp_path, function, file):
    (tmp_path / "package").mkdir()
    (tmp_path / file).touch()
    loaded = load_recipe(write(tmp_path, rewards=[{"function": function}]))
    assert loaded.rewards[0].function == f"{tmp_path / file}:f"


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


def test_every_key_is_described():
    keys = list(recipe_keys())
    assert {"run.output_dir", "rewards.N.weight", "grpo.epsilon_high"} <= {key.path for key in keys}
    assert all(key.text.endswith(".") for key in keys)


LISTS = {
    "rollout.urls": "http://127.0.0.1:8000",
    "logging.sinks": "wandb",
    "megatron.recompute_modules": "moe",
}
# What the list keys need beside them.
WITH_LISTS = {
    "rollout": {"engine": "vllm-server"},
    "megatron": {"recompute_granularity": "selective"},
}


def test_d7_one_value_is_a_list_of_one_for_every_list_key(tmp_path):
    assert set(LISTS) <= {key.path for key in recipe_keys() if key.is_list}
    loaded = load_recipe(write(tmp_path, **WITH_LISTS), list(LISTS.items()))
    for key, value in LISTS.items():
        section, name = key.split(".")
        assert getattr(getattr(loaded, section), name) == (value,)


def test_d7_a_list_in_brackets_stays_one(tmp_path):
    loaded = load_recipe(
        write(tmp_path, **WITH_LISTS), [("rollout.urls", '["http://a:1", "http://b:2"]')]
    )
    assert loaded.rollout.urls == ("http://a:1", "http://b:2")


def test_d19_a_wrong_entry_of_a_list_names_the_nearest_choice():
    assert "got 'tensorbord', expected 'tensorboard', 'wandb' or 'trackio' (nearest" in problems_of(
        logging={"sinks": "tensorbord"}
    )


def test_d18_a_recipe_and_its_overrides_may_be_python_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(
        table(model={"path": tmp_path / "m"}, data={"train": "t.jsonl"}),
        {"run.max_steps": 3, "rewards.0.weight": 2, "logging.sinks": ("wandb",)},
    )
    assert loaded.model.path == tmp_path / "m"
    assert loaded.data.train == str(tmp_path / "t.jsonl")
    assert (loaded.run.max_steps, loaded.rewards[0].weight) == (3, 2.0)
    assert loaded.logging.sinks == ("wandb",)


def test_d18_python_values_are_not_read_as_toml(tmp_path):
    with pytest.raises(RecipeError, match=r"run.max_steps: got '3', expected a valid integer"):
        load_recipe(write(tmp_path), {"run.max_steps": "3"})
