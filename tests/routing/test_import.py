"""The core is cheap to import: the package loads nothing until a name is used, and then little beside numpy."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moe_replay.routing

# CPU time, because wall time on a busy machine says nothing; the least of a few fresh processes, of which the first
# leaves its bytecode to the others, as an installation does.
PROGRAM = """
import sys, time
{before}
start = time.process_time()
{statement}
print(time.process_time() - start)
print(*sorted({{name.split(".")[0] for name in sys.modules}} & set({unwanted!r})))
"""
UNWANTED = ["torch", "jaxtyping", "beartype", "zstandard", "asyncio", "unittest", "transformers"]
NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
PROCESSES = 6
MOST_SECONDS = 0.15


def cost_of(
    statement: str, folder: Path, before: str = "", processes: int = PROCESSES
) -> tuple[float, list[str]]:
    """Return the least CPU seconds of ``statement`` after ``before``, and what both loaded of the unwanted."""
    program = PROGRAM.format(
        before=before, statement=statement, unwanted=["numpy"] * (not before) + UNWANTED
    )
    environ = {name: value for name, value in os.environ.items() if name != NO_BYTECODE}
    environ["PYTHONPYCACHEPREFIX"] = str(folder)
    seconds, loaded = [], []
    for _ in range(processes):
        ran = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=environ,
        )
        taken, _, names = ran.stdout.partition("\n")
        seconds.append(float(taken))
        loaded = names.split()
    return min(seconds), loaded


def test_import_loads_nothing_heavy(tmp_path):
    seconds, loaded = cost_of("import moe_replay.routing", tmp_path)
    assert loaded == []
    assert seconds < MOST_SECONDS


def test_first_use_of_every_name_loads_little_beside_numpy(tmp_path):
    seconds, loaded = cost_of(
        "from moe_replay.routing import *",
        tmp_path,
        before="import numpy  # its own time is its own",
    )
    assert loaded == []
    assert seconds < MOST_SECONDS


def test_cost_sees_a_package_that_only_type_checkers_need(tmp_path):
    _, loaded = cost_of("import jaxtyping", tmp_path, processes=1)
    assert "jaxtyping" in loaded


@pytest.mark.parametrize("planted", ["sum(range(60_000_000))", "import torch"])
def test_cost_sees_time_spent(planted, tmp_path):
    assert cost_of(planted, tmp_path, processes=2)[0] > MOST_SECONDS


def test_every_export_is_what_type_checkers_read():
    tree = ast.parse(Path(moe_replay.routing.__file__).read_text())
    read = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("moe_replay")
        for alias in node.names
    }
    assert sorted(read) == sorted(moe_replay.routing.__all__)
    assert {name: getattr(moe_replay.routing, name).__module__ for name in read} == read


def test_a_name_that_is_not_exported_is_refused():
    with pytest.raises(
        AttributeError, match=r"'moe_replay\.routing' has no attribute 'RoutingTracer'"
    ):
        moe_replay.routing.RoutingTracer  # noqa: B018
