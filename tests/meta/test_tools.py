"""The tools of scripts/check refuse planted faults."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
PACKAGES = (
    *("routing", "batch", "transformers", "checkpoint", "tasks", "recipe", "engines"),
    *("megatron", "grpo", "testing"),
)
MODULES = ("errors", "engines/types", "report/__init__", "cli/__init__")


@pytest.fixture
def project(tmp_path, root):
    """A project of empty modules under this project's own settings."""
    shutil.copy(root / "pyproject.toml", tmp_path)
    for module in ("__init__", *MODULES, *(f"{package}/__init__" for package in PACKAGES)):
        plant(tmp_path, module, "")
    return tmp_path


def plant(project: Path, module: str, source: str) -> None:
    path = project / "src" / "moe_replay" / f"{module}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'"""Planted."""\n{source and chr(10)}{source}')


def run_tool(project: Path, *command: str) -> tuple[int, str]:
    ran = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=project,
        env={"PATH": f"{BIN}:/usr/bin:/bin", "PYTHONPATH": "src", "HOME": str(project)},
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "command",
    ["ruff format --check", "ruff check", "pyrefly check", "lint-imports --no-cache --no-logo"],
)
def test_tool_accepts_a_project_without_faults(project, command):
    code, output = run_tool(project, *command.split())
    assert code == 0, output


def test_ruff_finds_every_planted_fault(project):
    faults = {
        "F401": "import os\n",
        "D103": "def public():\n    return 1\n",
        "BLE001": "try:\n    x = 1\nexcept Exception:\n    x = 2\n",
        "B006": "def _f(x=[]):\n    return x\n",
        "PLW0603": "X = 1\n\n\ndef _f():\n    global X\n    X = 2\n",
    }
    for rule, source in faults.items():
        plant(project, f"routing/planted_{rule.lower()}", source)
    code, output = run_tool(project, "ruff", "check", "--output-format=concise")
    found = {
        rule for rule in faults if re.search(rf"planted_{rule.lower()}\.py:.* {rule} ", output)
    }
    assert (code, found) == (1, set(faults))


@pytest.mark.parametrize(
    ("module", "source", "is_refused"),
    [
        ("grpo/a", "import os\n\nX = os.environ['X']\n", True),
        ("grpo/a", "import os\n\nX = os.getenv('X')\n", True),
        ("cli/a", "import os\n\nX = os.environ['X']\n", False),
        ("grpo/a", "import pickle\n\nX = pickle.HIGHEST_PROTOCOL\n", True),
        ("grpo/a", "from cloudpickle import dumps\n\nX = dumps\n", True),
        ("grpo/a", "import torch\n\nX = torch.load('x')\n", True),
        ("grpo/a", "import json\n\nX = json.loads('1')\n", False),
    ],
)
def test_ruff_bans_the_environment_and_pickle(project, module, source, is_refused):
    plant(project, module, source)
    _, output = run_tool(project, "ruff", "check", "--output-format=concise")
    assert ("TID251" in output) == is_refused, output


@pytest.mark.parametrize(
    ("source", "is_refused"),
    [
        (f"# {'ab ' * 30}abcdefgh\n", False),  # 100 columns
        (f"# {'ab ' * 30}abcdefghi\n", True),
        (f'"""{"ab " * 30}abcd"""\n', False),
        (f'"""{"ab " * 30}abcde"""\n', True),
        (f'X = "{"ab " * 30}abcdefghi"\n', False),
    ],
)
def test_ruff_bans_comments_and_docstrings_over_100_columns(project, source, is_refused):
    plant(project, "routing/planted", source)
    _, output = run_tool(project, "ruff", "check", "--output-format=concise")
    assert ("W505" in output) == is_refused, output


def test_ruff_accepts_the_axes_of_jaxtyping(project):
    annotated = 'ROWS = Shaped[np.ndarray, " rows *rest"]\n'
    plant(
        project,
        "routing/axes",
        f"import numpy as np\nfrom jaxtyping import Shaped\n\n{annotated}",
    )
    code, output = run_tool(project, "ruff", "check")
    assert code == 0, output


def test_pyrefly_finds_every_planted_fault(project):
    faults = {
        "bad-assignment": 'x: int = "a"\n',
        "bad-argument-type": 'def f(n: int) -> int:\n    return n\n\n\nf("a")\n',
        "missing-import": "import not_there\n",
        "missing-attribute": "import numpy as np\n\nnp.arrange(3)\n",
    }
    for rule, source in faults.items():
        plant(project, f"routing/planted_{rule.replace('-', '_')}", source)
    code, output = run_tool(project, "pyrefly", "check", "--output-format=min-text")
    found = {
        rule
        for rule in faults
        if re.search(rf"planted_{rule.replace('-', '_')}\.py:.*\[{rule}\]", output)
    }
    assert (code, found) == (1, set(faults))


def test_import_linter_finds_every_planted_fault(project):
    faults = {
        "errors": "moe_replay.routing",
        "routing/planted": "moe_replay.batch",
        "routing/planted_torch": "torch",
        "routing/planted_zstandard": "zstandard",
        "batch/planted": "moe_replay.megatron",
        "engines/types": "moe_replay.batch",
        "megatron/planted": "moe_replay.grpo",
        "grpo/planted_cli": "moe_replay.cli",
        "grpo/planted_report": "moe_replay.report",
        "grpo/planted_megatron": "megatron",
        "tasks/planted": "vllm",
        "batch/planted_late": "sglang",
    }
    for module, imported in faults.items():
        plant(project, module, f"def late():\n    import {imported}\n")
    code, output = run_tool(project, "lint-imports", "--no-cache", "--no-logo")
    arrows = {
        f"moe_replay.{module.replace('/', '.')} -> {imported}"
        for module, imported in faults.items()
    }
    found = {arrow for arrow in arrows if arrow in output}
    assert (code, found) == (1, arrows), output
