"""`moe_replay.train`: a recipe run from a notebook or a script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moe_replay
from moe_replay.errors import RecipeError
from moe_replay.testing.tiny_models import write_tiny_checkpoint

SOURCES = Path(moe_replay.__file__).parents[1]
SCRIPT = """
import sys, moe_replay
print({"torch", "numpy", "pydantic"} & set(sys.modules))
run = moe_replay.train("recipe.toml", {"run.max_steps": 1})
first = run.read_steps()[-1].metrics["reward"]
run = moe_replay.train("recipe.toml", {"run.max_steps": 2, "checkpoint.export": False})
assert run.read_steps()[0].metrics["reward"] == first
print(run, [record.step for record in run.read_steps()])
"""


@pytest.mark.slow
def test_d18_a_script_of_five_lines_trains_and_resumes(write_recipe, tmp_path):
    write_recipe()
    write_tiny_checkpoint(tmp_path / "model", num_hidden_layers=2)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "set()"
    assert lines[-1] == f"RunDirectory({str(tmp_path / 'out')!r}) [1, 2]"
    assert (tmp_path / "out" / "export" / "config.json").is_file()


def test_d18_a_wrong_override_is_refused_before_anything_runs(write_recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"did you mean optimizer.lr"):
        moe_replay.train(write_recipe(), {"run.lr": 1e-5})
    assert not (tmp_path / "out").exists()
