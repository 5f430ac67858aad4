"""`moe-replay train` as a user meets it: what it prints, and how it says no."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moe_replay
from moe_replay.cli.main import main
from moe_replay.cli.options import read_options
from moe_replay.cli.stages import say
from moe_replay.cli.train import run_train
from moe_replay.errors import RecipeError
from moe_replay.grpo.inputs import open_inputs
from moe_replay.grpo.start.device import on_this_device
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.recipe import Recipe

from .conftest import CONFIG

SOURCES = Path(moe_replay.__file__).parents[1]


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(SOURCES)}
    return subprocess.run(
        [sys.executable, "-m", "moe_replay.cli.main", *map(str, arguments)],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command in this process and return its message with the line breaks taken out."""
    assert main(["train", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert "\nmoe-replay: " in captured.err
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


@pytest.mark.slow
def test_dry_run_prints_a_recipe_that_loads_and_writes_nothing(tmp_path, write_recipe):
    recipe = write_recipe()
    done = command("train", recipe, "--dry-run", "--grpo.beta", "0.1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dry run: the recipe and everything it points to are in order" in done.stderr
    assert re.search(r"first training prompt, \d+ tokens:\n\d \+ 1 =\n", done.stderr)
    printed = tmp_path / "printed.toml"
    printed.write_text(done.stdout)
    assert load_recipe(printed) == on_this_device(load_recipe(recipe, [("grpo.beta", "0.1")]))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_dry_run_refuses_an_architecture_without_weight_table(tmp_path, write_recipe):
    config = {**CONFIG, "model_type": "phimoe", "num_local_experts": 8}
    done = command("train", write_recipe(config=config), "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert "asks for something that is not supported" in done.stderr
    assert "phimoe" in done.stderr


def test_command_says_no_without_a_traceback(tmp_path):
    done = command("train", tmp_path / "none.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    said, kind, *_ = done.stderr.splitlines()
    assert said == f"moe-replay {moe_replay.__version__}: reading {tmp_path / 'none.toml'} ..."
    assert kind == "moe-replay: the recipe, or something it points to, is wrong"
    assert "Traceback" not in done.stderr


def test_d13_the_first_line_is_there_before_anything_heavy_is_imported(tmp_path):
    code = (
        "import sys\nfrom moe_replay.cli.main import main\n"
        "class Noted:\n"
        "    def write(self, text):\n"
        "        print(text.split()[:1], {'numpy', 'pydantic', 'torch', 'rich'} & set(sys.modules))\n"
        "        sys.exit()\n"
        "sys.stderr = Noted()\nmain(['train', 'recipe.toml'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "['moe-replay'] set()\n"


def test_d13_other_ranks_are_silent(monkeypatch, capsys):
    say("heard")
    monkeypatch.setenv("RANK", "1")
    say("not heard")
    assert capsys.readouterr().err == "heard\n"


def test_traceback_is_shown_when_asked_for(tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.toml"), "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_unknown_key_on_the_command_line_is_refused(capsys, write_recipe):
    message = refusal(capsys, write_recipe(), "--grpo.epsilonn", "0.1")
    assert (
        "grpo.epsilonn: set to 0.1, but there is no such key; did you mean grpo.epsilon?" in message
    )


def test_override_without_value_is_refused(capsys, write_recipe):
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(write_recipe()), "--model.grouped_experts"])
    assert "--model.grouped_experts has no value" in capsys.readouterr().err


def test_batch_that_does_not_fit_the_processes_is_refused(capsys, write_recipe, monkeypatch):
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "3"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "29500"),
    ):
        monkeypatch.setenv(name, value)
    assert "cannot be shared evenly by 3 data-parallel ranks" in refusal(capsys, write_recipe())


def test_dense_checkpoint_with_replay_is_refused(capsys, write_recipe):
    dense = {"model_type": "qwen3", "hidden_size": 64, "max_position_embeddings": 64}
    message = refusal(capsys, write_recipe(config=dense))
    assert "describes a dense model (model_type 'qwen3', no experts)" in message
    assert "replay.router_replay_mode is 'R3'" in message
    assert "set replay.router_replay_mode = 'disabled'" in message


def test_short_context_is_refused(capsys, write_recipe):
    message = refusal(capsys, write_recipe(), "--rollout.max_completion_length", "50")
    assert "max_position_embeddings is 64" in message
    assert "data.max_prompt_length 16 + rollout.max_completion_length 50 = 66 tokens" in message
    assert "Lower one of them by 2 or more" in message


def test_missing_tokenizer_is_refused(capsys, write_recipe, tmp_path):
    recipe = write_recipe()
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    message = refusal(capsys, recipe)
    assert "no tokenizer in" in message
    assert "expected tokenizer.json" in message
    assert "found config.json" in message


@pytest.mark.parametrize("what", ["model", "model/config.json"])
def test_missing_checkpoint_is_refused(capsys, write_recipe, tmp_path, what):
    recipe = write_recipe()
    (tmp_path / what).rename(tmp_path / "away")
    message = refusal(capsys, recipe)
    assert str(tmp_path / "model") in message
    assert "config.json" in message


def test_damaged_config_is_refused(capsys, write_recipe, tmp_path):
    recipe = write_recipe()
    (tmp_path / "model" / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(capsys, recipe)


def test_empty_dataset_is_refused(capsys, write_recipe, tmp_path):
    recipe = write_recipe()
    (tmp_path / "train.jsonl").write_text("")
    assert "train.jsonl is empty: expected at least one row" in refusal(capsys, recipe)


def test_missing_dataset_is_refused(capsys, write_recipe):
    message = refusal(capsys, write_recipe(), "--data.train", "trian.jsonl")
    assert "trian.jsonl does not exist" in message


def test_missing_column_of_a_reward_is_refused(capsys, write_recipe, tmp_path):
    recipe = write_recipe()
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a", "solution": "b"}))
    assert "needs answer, but the dataset's columns are solution" in refusal(capsys, recipe)


def test_held_out_file_needs_the_columns_too(capsys, write_recipe, tmp_path):
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "a", "solution": "b"}))
    message = refusal(capsys, write_recipe(data={"eval": "eval.jsonl"}))
    assert "needs answer, but the dataset's columns are solution" in message


def test_missing_reward_file_is_refused(capsys, write_recipe, tmp_path):
    message = refusal(capsys, write_recipe(rewards=[{"function": "my/reward.py:f"}]))
    assert f"file {tmp_path}/my/reward.py does not exist" in message


def test_first_generated_prompt_that_is_too_long_is_refused(capsys, write_recipe):
    recipe = write_recipe(
        data={"train": "reasoning_gym:chain_sum"}, rewards=[{"function": "reasoning_gym"}]
    )
    assert "data.max_prompt_length is 16" in refusal(capsys, recipe)


def test_r1_exit_of_a_reward_file_ends_with_code_2(capsys, write_recipe, tmp_path):
    (tmp_path / "reward.py").write_text("import sys\nsys.exit(0)\n")
    recipe = write_recipe(rewards=[{"function": "reward.py:f"}])
    assert main(["train", str(recipe)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "cannot be imported: SystemExit: 0 (it tried to exit the program)" in said
    assert f"({tmp_path}/reward.py, line 2)" in said


def test_r8_interrupt_promises_no_checkpoint_where_there_is_none(capsys, write_recipe, tmp_path):
    # The trainer is the parent of the process that imports it.
    (tmp_path / "reward.py").write_text(
        "import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(1000)\n"
    )
    recipe = write_recipe(rewards=[{"function": "reward.py:f"}])
    assert main(["train", str(recipe)]) == 130
    said = capsys.readouterr().err
    assert "stopped by SIGINT before the run began: the same command starts it again" in said
    assert "checkpoint" not in said


def generated(write_recipe, **data) -> Recipe:
    return load_recipe(
        write_recipe(
            config={**CONFIG, "max_position_embeddings": 512},
            data={
                "train": "reasoning_gym:chain_sum",
                "eval": "reasoning_gym:chain_sum",
                "max_prompt_length": 100,
                "eval_size": 30,
                "task": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
                **data,
            },
            rewards=[{"function": "reasoning_gym"}],
        )
    )


def test_training_prompts_exclude_held_out_ones(write_recipe):
    inputs = open_inputs(generated(write_recipe))
    held_out = {prompt.text for prompt in inputs.held_out[""].at(0, 30)}
    trained = {prompt.text for prompt in inputs.train.at(0, 200)}
    assert len(held_out) == 30
    assert not held_out & trained


def test_seeds_choose_the_items(write_recipe):
    texts = [
        [p.text for p in open_inputs(generated(write_recipe, train_seed=seed)).train.at(0, 20)]
        for seed in (1, 1, 5)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_run_train_raises_for_callers_that_handle_errors(tmp_path):
    with pytest.raises(RecipeError, match="does not exist"):
        run_train(read_options(["train", str(tmp_path / "none.toml"), "--dry-run"]))
