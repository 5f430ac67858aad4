"""The core is cheap to import: it loads numpy, and no package that is slow to start."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
{statement}
print(*sorted({{name.split(".")[0] for name in sys.modules}} & set({unwanted!r})))
"""
UNWANTED = ["torch", "jaxtyping", "beartype", "zstandard", "asyncio", "unittest", "transformers"]


def loaded_by(statement: str) -> list[str]:
    """Return the unwanted packages that a fresh interpreter holds after ``statement``."""
    program = PROGRAM.format(statement=statement, unwanted=UNWANTED)
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return ran.stdout.split()


def test_import_loads_nothing_heavy_beside_numpy():
    assert loaded_by("from moe_replay.routing import *") == []


@pytest.mark.parametrize("name", ["jaxtyping", "zstandard"])
def test_control_a_package_that_is_imported_is_seen(name: str):
    assert name in loaded_by(f"import moe_replay.routing, {name}")
