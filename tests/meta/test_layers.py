"""The core stays free of everything but numpy and a lazy zstandard. (The layering of packages is import-linter's, see pyproject.toml.)"""

import ast
import subprocess
import sys

import pytest

ALLOWED = {"numpy", "jaxtyping", *sys.stdlib_module_names}
# Imported when a chunk is coded, not before.
ALLOWED_IN = {"routing/format/set_coding.py": {"zstandard"}}
ALLOWED_HERE = ("moe_replay.errors", "moe_replay.routing")


def foreign_imports(tree: ast.Module, path: str = "") -> list[str]:
    """Return imported modules that the core may not use in the module at ``path``."""
    allowed = ALLOWED | ALLOWED_IN.get(path, set())
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return [
        name
        for name in names
        if name.split(".")[0] not in allowed and not name.startswith(ALLOWED_HERE)
    ]


def loads_torch(statement: str) -> bool:
    """Tell whether a fresh interpreter has torch loaded after ``statement``."""
    program = f"import sys\n{statement}\nprint('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return ran.stdout.strip() == "True"


def test_core_imports_numpy_and_nothing_else(package):
    core = {path: tree for path, tree in package.items() if path.startswith("routing/")}
    found = {path: foreign_imports(tree, path) for path, tree in core.items()}
    assert core
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "def f():\n    from scipy import stats",
        "from moe_replay.batch import Sample",
    ],
)
def test_foreign_imports_finds_them(source):
    assert len(foreign_imports(ast.parse(source))) == 1


def test_exceptions_are_still_needed(package):
    needed = {path: set(foreign_imports(package[path])) for path in ALLOWED_IN}
    assert needed == ALLOWED_IN


@pytest.mark.parametrize("module", ["moe_replay", "moe_replay.routing", "moe_replay.engines.types"])
def test_import_does_not_load_torch(module):
    assert not loads_torch(f"import {module}")


def test_loads_torch_sees_torch():
    assert loads_torch("import torch")
