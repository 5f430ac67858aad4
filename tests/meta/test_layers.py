"""The core loads without torch; import-linter holds what each package imports."""

import subprocess
import sys

import pytest


def loads_torch(statement: str) -> bool:
    """Tell whether a fresh interpreter has torch loaded after ``statement``."""
    program = f"import sys\n{statement}\nprint('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return ran.stdout.strip() == "True"


@pytest.mark.parametrize("module", ["moe_replay", "moe_replay.routing", "moe_replay.engines.types"])
def test_import_does_not_load_torch(module):
    assert not loads_torch(f"import {module}")


def test_loads_torch_sees_torch():
    assert loads_torch("import torch")
