"""The project's own files, parsed once."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = {".git", ".venv", "__pycache__", "site", "runs", "build", "dist"}


def _parse(folder: Path) -> dict[str, ast.Module]:
    return {
        path.relative_to(folder).as_posix(): ast.parse(path.read_text())
        for path in sorted(folder.rglob("*.py"))
        if not GENERATED & set(path.parts)
    }


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder that holds pyproject.toml."""
    return ROOT


@pytest.fixture(scope="session")
def package() -> dict[str, ast.Module]:
    """Modules of the package, by path below ``src/moe_replay`` (``routing/trace.py``)."""
    return _parse(ROOT / "src" / "moe_replay")


@pytest.fixture(scope="session")
def tests() -> dict[str, ast.Module]:
    """Modules of the tests, by path below ``tests``."""
    return _parse(ROOT / "tests")


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    """Every text file that a reader of the repository sees, by path."""
    found = {}
    for path in sorted(ROOT.rglob("*")):
        relative = path.relative_to(ROOT)
        hidden = any(part.endswith("_cache") or part == ".hypothesis" for part in relative.parts)
        is_text = path.suffix not in {".png", ".safetensors"}
        if path.is_file() and is_text and not hidden and not GENERATED & set(relative.parts):
            found[relative.as_posix()] = path.read_text(errors="replace")
    return found
