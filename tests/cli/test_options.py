"""What the command line accepts, what its help says, and what a wrong option is answered with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moe_replay
from moe_replay.cli.main import main
from moe_replay.cli.options import split_overrides
from moe_replay.recipe.keys import recipe_keys

SOURCES = Path(moe_replay.__file__).parents[1]
HEAVY = ("torch", "pydantic", "transformers", "megatron", "numpy", "rich", "starlette", "vllm")


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """Return the exit code and the text of a command that ends while its options are read."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    captured = capsys.readouterr()
    return stopped.value.code, captured.out + captured.err


def test_version_is_printed(capsys):
    assert ended(capsys, "--version") == (0, f"moe-replay {moe_replay.__version__}\n")


def test_help_of_train_shows_the_keys_of_a_recipe(capsys):
    code, text = ended(capsys, "train", "--help")
    assert code == 0
    assert "replay.min_coverage (default: 0.95)" in text


def test_d19_help_of_train_shows_the_choices_of_every_key_that_has_some(capsys):
    _, text = ended(capsys, "train", "--help")
    lines = text.splitlines()
    choices = {
        "grpo.loss_type": "one of: grpo, bnpo, dr_grpo, dapo, cispo, sapo, dppo",
        "grpo.scale_rewards": "one of: group, batch, none, gdpo",
        "optimizer.lr_scheduler": "one of: constant, linear, cosine",
        "replay.router_replay_mode": "one of: disabled, R2, R3",
        "megatron.recompute_granularity": "one of: full, selective",
        "megatron.moe_token_dispatcher_type": "one of: alltoall, allgather, flex",
        "logging.sinks": "any of: tensorboard, wandb, trackio",
    }
    for key, shown in choices.items():
        (place,) = [n for n, line in enumerate(lines) if line.startswith(f"  {key} (default")]
        assert lines[place + 1].strip() == shown
    with_choices = [key for key in recipe_keys() if key.choices]
    assert sum(" of: " in line for line in lines) == len(with_choices) > len(choices)


@pytest.mark.parametrize(
    ("command", "given", "meant"),
    [
        ("train", ["--lr", "1e-5"], "--lr: did you mean --optimizer.lr?"),
        ("train", ["--learning-rate", "1"], "--learning-rate: did you mean --optimizer.lr?"),
        ("rollout", ["--output", "o", "--num_prompt=4"], "did you mean --num-prompts?"),
        ("doctor", ["--temperature", "1"], "--rollout.temperature or --eval.temperature?"),
        ("train", ["--dryrun"], "--dryrun: did you mean --dry-run?"),
        ("train", ["--min_covrage", "1"], "did you mean --replay.min_coverage?"),
        ("inspect", ["--jsn"], "--jsn: did you mean --json?"),
        ("serve", ["--prot", "1"], "--prot: did you mean --port?"),
    ],
)
def test_d19_an_unknown_option_is_answered_with_the_nearest_one(capsys, command, given, meant):
    code, text = ended(capsys, command, "thing", *given)
    assert code == 2
    assert f"usage: moe-replay {command} " in text
    assert "unrecognized arguments: --" in text
    assert meant in text


def test_d19_a_recipe_key_is_refused_where_there_is_no_recipe(capsys):
    code, text = ended(capsys, "inspect", "file", "--grpo.beta", "3")
    assert code == 2
    assert "--grpo.beta: only train, rollout, record and doctor take recipe keys" in text


def test_overrides_are_taken_out_wherever_they_stand():
    arguments = ["--a.b", "-1", "train", "--c.d=e=f", "r.toml", "--dry-run", "--g.h"]
    assert split_overrides(arguments) == (
        ["train", "r.toml", "--dry-run"],
        [("a.b", "-1"), ("c.d", "e=f"), ("g.h", None)],
    )


def test_d19_an_option_is_no_value_of_the_key_before_it(capsys):
    arguments, overrides = split_overrides(["train", "--run.output_dir", "--dry-run", "r.toml"])
    assert (arguments, overrides) == (["train", "--dry-run", "r.toml"], [("run.output_dir", None)])
    assert split_overrides(["--run.output_dir=--odd"]) == ([], [("run.output_dir", "--odd")])
    code, text = ended(capsys, "train", "r.toml", "--data.system_prompt", "--dry-run")
    assert code == 2
    assert "--data.system_prompt has no value" in text


def test_d19_help_and_version_load_nothing_heavy():
    code = (
        "import sys\nfrom moe_replay.cli.main import main\n"
        "for words in ['--version'], ['--help'], *([c, '--help'] for c in sys.argv[2:]):\n"
        "    try: main(words)\n    except SystemExit: pass\n"
        "print(sorted(set(sys.argv[1].split(',')) & set(sys.modules)))\n"
    )
    commands = ["doctor", "rollout", "record", "compare", "inspect", "serve"]
    done = subprocess.run(
        [sys.executable, "-c", code, ",".join(HEAVY), *commands],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "serve a model to trainers" in done.stdout
