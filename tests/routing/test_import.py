"""The core is cheap to import: no torch, nothing that only type checkers need, and half the time of numpy itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# CPU time, because wall time on a busy machine says nothing; the least of a few fresh processes, of which the first
# leaves its bytecode to the others, as an installation does.
PROGRAM = """
import sys, time
start = time.process_time()
import numpy
middle = time.process_time()
{statement}
stop = time.process_time()
print((stop - middle) / (middle - start))
print(*sorted({{name.split(".")[0] for name in sys.modules}} & set({unwanted!r})))
"""
UNWANTED = ["torch", "jaxtyping", "beartype", "zstandard", "asyncio", "unittest", "transformers"]
NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
PROCESSES = 6
MOST_TIME = 0.5


def cost_of(statement: str, folder: Path, processes: int = PROCESSES) -> tuple[float, list[str]]:
    """Return the least time of ``statement`` over that of importing numpy, and what it loaded of the unwanted."""
    program = PROGRAM.format(statement=statement, unwanted=UNWANTED)
    environ = {name: value for name, value in os.environ.items() if name != NO_BYTECODE}
    environ["PYTHONPYCACHEPREFIX"] = str(folder)
    ratios, loaded = [], []
    for _ in range(processes):
        ran = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=environ,
        )
        ratio, _, names = ran.stdout.partition("\n")
        ratios.append(float(ratio))
        loaded = names.split()
    return min(ratios), loaded


def test_import_loads_nothing_heavy_and_takes_less_time_than_numpy(tmp_path):
    ratio, loaded = cost_of("import moe_replay.routing", tmp_path)
    assert loaded == []
    assert ratio < MOST_TIME


def test_cost_sees_a_package_that_only_type_checkers_need(tmp_path):
    _, loaded = cost_of("import jaxtyping", tmp_path, processes=1)
    assert "jaxtyping" in loaded


@pytest.mark.parametrize("planted", ["sum(range(60_000_000))", "import jaxtyping"])
def test_cost_sees_time_spent(planted, tmp_path):
    assert cost_of(planted, tmp_path, processes=2)[0] > MOST_TIME
