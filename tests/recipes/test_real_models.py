"""Recipes for real models fit their machines, and pass the dry run on hollow checkpoints."""

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports
from moe_replay.cli.main import main
from moe_replay.testing.hollow import write_hollow_checkpoint

RECIPES = Path(__file__).parents[2] / "recipes"
MACHINES = {
    "qwen3-30b-a3b/colocated": ["gpus=8x80GB"],
    "qwen3-30b-a3b/servers": ["gpus=8x80GB", "servers=8x80GB"],
    "qwen3-235b-a22b/servers": ["gpus=64x80GB", "servers=64x80GB"],
    "glm-4.5-air/colocated": ["gpus=64x80GB"],
    "deepseek-v3/servers": ["gpus=512x80GB", "servers=128x80GB"],
}


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Put back what the command sets for torch."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def hollow(tmp_path_factory):
    """Return a function: folder of a recipe -> hollow checkpoint of its model."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            config = RECIPES / name / "model" / "config.json"
            made[name] = write_hollow_checkpoint(tmp_path_factory.mktemp("hollow"), config)
        return made[name]

    return make


def dry_run(name: str, model: Path, *options: str) -> int:
    recipe = str(RECIPES / f"{name}.toml")
    return main(["train", recipe, "--dry-run", "--elsewhere", "--model.path", str(model), *options])


def test_every_recipe_of_a_real_model_is_tested():
    found = {path.relative_to(RECIPES).as_posix() for path in RECIPES.glob("*/*.toml")}
    assert found == {"demo/recipe.toml", *(f"{name}.toml" for name in MACHINES)}


@pytest.mark.parametrize("name", MACHINES)
def test_a_recipe_fits_its_machine(name, capsys):
    assert main(["doctor", str(RECIPES / f"{name}.toml"), "--plan", *MACHINES[name]]) == 0
    assert "this recipe fits" in capsys.readouterr().out


@pytest.mark.parametrize("name", MACHINES)
def test_no_recipe_fits_with_float32_state_on_half_of_the_memory(name, capsys):
    """The control."""
    words = MACHINES[name][:1]
    number = int(words[0].removeprefix("gpus=").partition("x")[0])
    recipe = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    assert recipe["megatron"]["optimizer"]["exp_avg_dtype"] == "bfloat16"
    keys = ("exp_avg_dtype", "exp_avg_sq_dtype", "main_grads_dtype")
    wide = [text for key in keys for text in (f"--megatron.optimizer.{key}", "float32")]
    small = [f"gpus={number}x40GB"]
    assert main(["doctor", str(RECIPES / f"{name}.toml"), *wide, "--plan", *small]) == 2
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_a_recipe_passes_the_dry_run(name, hollow, capsys):
    assert dry_run(name, hollow(name.partition("/")[0])) == 0
    said = capsys.readouterr()
    shown = said.out + said.err
    assert "everything it points to are in order" in shown
    assert "left to the machine that trains: megatron.optimizer" in shown
    assert ("servers of rollout.urls were not asked" in shown) == name.endswith("servers")


@pytest.mark.slow
def test_a_dry_run_elsewhere_still_finds_what_is_wrong(hollow, tmp_path, capsys):
    """A layout that cannot be, and a checkpoint with a shard missing."""
    model = hollow("qwen3-30b-a3b")
    recipe = "qwen3-30b-a3b/colocated"
    assert dry_run(recipe, model, "--megatron.tensor_model_parallel_size", "6") == 2
    assert "num_attention_heads = 32 cannot be split" in capsys.readouterr().err
    for file in model.iterdir():
        if not file.name.startswith("model-00002"):
            (tmp_path / file.name).symlink_to(file)
    assert dry_run(recipe, tmp_path) == 2
    assert "model-00002-of-" in capsys.readouterr().err


def test_elsewhere_is_for_dry_runs(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", str(RECIPES / "qwen3-30b-a3b" / "servers.toml"), "--elsewhere"])
    assert ended.value.code == 2
    assert "add --dry-run" in capsys.readouterr().err
