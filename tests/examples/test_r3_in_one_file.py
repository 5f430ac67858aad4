"""The example runs as its first lines say, and its guard stops routes that belong to other rows."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from moe_replay.errors import MisalignmentError
from moe_replay.testing.misrouting import MisroutingEngine, one_row_late
from moe_replay.testing.ranks import run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "r3_in_one_file.py"
pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def loaded() -> ModuleType:
    import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports

    module = module_from_spec(spec := spec_from_file_location("example", EXAMPLE))
    spec.loader.exec_module(module)
    return module


def test_the_example_trains_as_its_first_lines_say():
    ran = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=True)
    steps = [
        {name: float(value) for name, value in re.findall(r"(\w+) ([\d.e-]+)", line.split(":")[1])}
        for line in ran.stdout.splitlines()
        if line.startswith("step ")
    ]
    assert len(steps) == 3
    assert {step["coverage"] for step in steps} == {1.0}
    # The engine samples in bfloat16; steps 1 and 2 agree only if it has the new weights.
    assert min(step["agreement"] for step in steps) > 0.97
    assert max(step["k3"] for step in steps) < 2e-3


def with_late_routes(num_steps: int) -> list[dict[str, float]]:
    """Run the example with the routes of its third prompt one row late."""
    example = loaded()
    engine = example.EmbeddedEngine(example.CHECKPOINT, dtype="bfloat16")
    late = MisroutingEngine(engine, one_row_late, lambda group, _: group.request.request_id == 2)
    return example.train(late, num_steps)


def test_routes_one_row_late_stop_the_example_before_it_learns():
    with pytest.raises(MisalignmentError, match=r"step 0.*(?s:.*)token shift \+1"):
        run_ranks(with_late_routes, 1, 1)


def test_the_example_reads_in_one_sitting():
    assert len(EXAMPLE.read_text().splitlines()) <= 150
