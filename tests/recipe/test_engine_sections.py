"""Each engine has its own keys: in the short form, in a table of its own, and by --section.key."""

import pytest
import tomlkit

from moe_replay.errors import RecipeError
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.sections.rollout import (
    EmbeddedEngineSection,
    FilesEngineSection,
    ServersEngineSection,
    VllmEngineSection,
)

from ..grpo.smallest_recipe import problems_of, recipe, table


@pytest.mark.parametrize(
    ("keys", "section"),
    [
        ({}, EmbeddedEngineSection),
        ({"engine": "embedded"}, EmbeddedEngineSection),
        ({"engine": "vllm", "kv_cache_gib": 2}, VllmEngineSection),
        ({"engine": "vllm-server", "urls": "http://a"}, ServersEngineSection),
        ({"engine": "sglang-server", "urls": "http://a"}, ServersEngineSection),
        ({"engine": "files", "path": "/f"}, FilesEngineSection),
    ],
)
def test_the_engine_chooses_the_class_of_its_keys(keys, section):
    assert type(recipe(rollout=keys).rollout) is section


@pytest.mark.parametrize(
    ("keys", "key", "owners"),
    [
        ({"kv_cache_gib": 2.0}, "kv_cache_gib", "'vllm'"),
        ({"ca_file": "ca.pem"}, "ca_file", "'vllm-server', 'sglang-server'"),
        ({"engine": "vllm", "urls": ["http://a"]}, "urls", "'vllm-server', 'sglang-server'"),
        ({"engine": "files", "path": "/f", "max_batch_size": 4}, "max_batch_size", "'embedded'"),
        ({"engine": "vllm", "path": "/f"}, "path", "'files'"),
    ],
)
def test_a_key_of_another_engine_is_unknown_and_names_the_engine_that_has_it(keys, key, owners):
    message = problems_of(rollout=keys)
    assert f"rollout.{key}: set to {keys[key]!r}" in message
    assert f"rollout.engine = {keys.get('engine', 'embedded')!r} has no such key" in message
    assert f"it belongs to {owners}" in message
    assert "has 1 problem:" in message


def test_an_unknown_engine_is_one_problem_whatever_its_keys():
    message = problems_of(rollout={"engine": "vlm", "kv_cache_gib": 2, "urls": ["http://a"]})
    assert "rollout.engine: got 'vlm', expected 'embedded', 'vllm'" in message
    assert "(nearest: 'vllm')" in message and "has 1 problem:" in message


@pytest.mark.parametrize("engine", [3, ["vllm"]])
def test_an_engine_is_a_name(engine):
    assert f"rollout.engine: got {engine!r}, expected a valid string" in problems_of(
        rollout={"engine": engine}
    )


def test_a_table_of_the_engine_is_its_short_form():
    short = recipe(rollout={"engine": "vllm", "kv_cache_gib": 2.0, "top_k": 5})
    nested = recipe(rollout={"engine": {"kind": "vllm", "kv_cache_gib": 2.0}, "top_k": 5})
    assert nested == short
    assert nested.resolved_toml() == short.resolved_toml()
    assert nested.fingerprint_items() == short.fingerprint_items()


def test_paths_in_the_table_of_an_engine_start_at_the_folder_of_the_recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(tomlkit.dumps(table(rollout={"engine": {"kind": "files", "path": "sampled"}})))
    loaded = load_recipe(path).rollout
    assert isinstance(loaded, FilesEngineSection) and loaded.path == tmp_path / "sampled"


def test_overrides_reach_the_table_of_an_engine():
    nested = table(rollout={"engine": {"kind": "vllm", "kv_cache_gib": 2.0}})
    for prefix in ("rollout", "rollout.engine"):
        loaded = load_recipe(nested, {f"{prefix}.kv_cache_gib": 3.0}).rollout
        assert isinstance(loaded, VllmEngineSection) and loaded.kv_cache_gib == 3.0
    other = load_recipe(table(), {"rollout.engine.kind": "vllm", "rollout.engine.dtype": "float32"})
    assert other.rollout.describe_engine() == "vllm, float32"
    with pytest.raises(RecipeError, match=r"'vllm-server' has no such key; it belongs to 'vllm'"):
        load_recipe(nested, {"rollout.engine": "vllm-server", "rollout.urls": "http://a"})


@pytest.mark.parametrize(
    ("engine", "more", "problem"),
    [
        ({"kind": "vllm", "top_k": 5}, {}, "rollout.engine.top_k: set to 5"),
        ({"kind": "vllm", "kv_cache_gb": 5}, {}, "did you mean rollout.kv_cache_gib?"),
        (
            {"kind": "vllm", "kv_cache_gib": 5.0},
            {"kv_cache_gib": 4.0},
            "rollout.engine.kv_cache_gib: set to 5.0, but there is no such key; "
            "did you mean rollout.kv_cache_gib?",
        ),
    ],
)
def test_the_table_of_an_engine_holds_its_own_keys_once(engine, more, problem):
    message = problems_of(rollout={"engine": engine, **more})
    assert problem in message and "has 1 problem:" in message


def test_files_need_a_folder():
    message = problems_of(rollout={"engine": "files"})
    assert "rollout.path: missing" in message and "moe-replay rollout RECIPE --output" in message
