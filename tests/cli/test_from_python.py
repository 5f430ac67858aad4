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
PAGE = Path(__file__).parents[2] / "docs" / "first-run.md"
LINES = """
import sys, moe_replay
print({"torch", "numpy", "pydantic"} & set(sys.modules))
PAGE
first = run.read_steps()[-1].metrics["reward"]
changes = {"run.max_steps": 6, "optimizer.lr": 1e-5, "checkpoint.export": False}
run = moe_replay.train("recipe.toml", changes)
assert run.read_steps()[4].metrics["reward"] == first
print(run, [record.step for record in run.read_steps()])
"""


@pytest.mark.slow
def test_d18_the_script_of_the_page_trains_and_resumes(write_recipe, tmp_path):
    marked = PAGE.read_text().partition("<!-- run with: a recipe -->\n```python\n")[2]
    script = LINES.replace("PAGE", marked.partition("```")[0])
    write_recipe()
    write_tiny_checkpoint(tmp_path / "model", num_hidden_layers=2)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "set()"
    export = tmp_path / "out" / "export"
    assert str(export) in lines
    assert lines[-1] == f"RunDirectory({str(tmp_path / 'out')!r}) [1, 2, 3, 4, 5, 6]"
    assert (export / "config.json").is_file()


def test_d18_a_wrong_override_is_refused_before_anything_runs(write_recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"did you mean optimizer.lr"):
        moe_replay.train(write_recipe(), {"run.lr": 1e-5})
    assert not (tmp_path / "out").exists()
