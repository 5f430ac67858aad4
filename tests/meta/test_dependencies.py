"""What pyproject.toml declares is enough for every import, and for a training run."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement

from moe_replay.testing.tiny_models import write_tiny_checkpoint

RECIPE = """
[run]
output_dir = "out"
max_steps = 1
[model]
path = "model"
[data]
train = "reasoning_gym:chain_sum"
eval = "reasoning_gym:chain_sum"
eval_size = 2
max_prompt_length = 200
[[rewards]]
function = "math_verify"
[[rewards]]
function = "reasoning_gym"
[rollout]
max_completion_length = 6
num_generations = 2
[batch]
global_batch_size = 4
micro_batch_size = 2
[optimizer]
lr = 1e-3
"""


_OWNERS = packages_distributions()


def normal(name: str) -> str:
    """Return a distribution's name as metadata compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(root: Path, *extras: str) -> list[Requirement]:
    """Return what pyproject.toml requires, with these extras."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def brought(requirements: Iterable[Requirement]) -> set[str]:
    """Return the distributions that pip installs for these requirements, recursively."""
    found: set[str] = set()
    left = list(requirements)
    while left:
        requirement = left.pop()
        name = normal(requirement.name)
        if name in found and not requirement.extras:
            continue
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        for need in map(Requirement, needs):
            extras = ("", *requirement.extras)
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras):
                left.append(need)
    return found


def environment_of(folder: Path, names: set[str]) -> Path:
    """Make a virtual environment of these distributions alone; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    for name in names:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or [] if file.parts[0] != ".."}:
            if not top.endswith(".pth") and not (site / top).exists():
                (site / top).symlink_to(installed.locate_file(top))
    return folder / "bin" / "python"


def imported_distributions(tree: ast.Module) -> set[str]:
    """Return the top-level names that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - {*sys.stdlib_module_names, "moe_replay", "__future__"}


def undeclared(tree: ast.Module, names: set[str]) -> set[str]:
    """Return what a module imports although none of these distributions provides it."""
    return {
        name
        for name in imported_distributions(tree)
        if not {normal(owner) for owner in [*_OWNERS.get(name, []), name]} & names
    }


def test_every_import_is_declared(root, package):
    extras = ("tensorboard", "wandb", "trackio", "hub", "trl", "vllm")
    names = {normal(requirement.name) for requirement in declared(root, *extras)}
    # Imported by the recorder and by servers only where their engine runs.
    names |= {"sglang"}
    found = {path: undeclared(tree, names) for path, tree in package.items()}
    assert {path: missing for path, missing in found.items() if missing} == {}


def test_undeclared_finds_an_import_inside_a_function():
    tree = ast.parse("def late():\n    import psutil\n    import json\n    import numpy.linalg\n")
    assert undeclared(tree, {"numpy"}) == {"psutil"}


def test_t1_a_run_needs_nothing_but_what_is_declared(root, tmp_path):
    ran, lines = train_with(brought(declared(root)), root, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert [line["step"] for line in lines] == [1]
    assert (tmp_path / "out" / "export" / "model.safetensors").exists()


def test_t1_that_environment_holds_nothing_else(root, tmp_path):
    """A package that is not declared is missing there, and so are the tools of the tests."""
    python = environment_of(tmp_path / "venv", brought(declared(root)) - {"psutil"})
    given = [import_in(python, name) for name in ("torch.distributed", "psutil", "pytest")]
    assert given == [True, False, False]


def import_in(python: Path, name: str) -> bool:
    command = [python, "-I", "-c", f"import importlib.util as u; assert u.find_spec('{name}')"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def train_with(
    names: set[str], root: Path, folder: Path
) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """Train a step, save and export in an environment of these distributions alone."""
    python = environment_of(folder / "venv", names)
    write_tiny_checkpoint(folder / "model")
    (folder / "recipe.toml").write_text(RECIPE)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    ran = subprocess.run(
        [python, "-m", "moe_replay.cli.main", "train", "recipe.toml"],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    metrics = folder / "out" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return ran, [json.loads(line) for line in lines]
