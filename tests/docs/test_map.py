"""docs/map.md and docs/papers.md say what the docstrings say."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    """The script of the map."""
    return load(monkeypatch, "map")


def load(monkeypatch, name: str) -> ModuleType:
    """Return a script as a module; it has no suffix, and no bytecode is left beside it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = SourceFileLoader(f"{name}_script", str(ROOT / "scripts" / name))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def test_the_map_is_current(script):
    written = (ROOT / "docs" / "map.md").read_text().splitlines()
    now = script.page(ROOT).splitlines()
    stale = sorted(set(written) ^ set(now))
    assert written == now, f"run scripts/map, which writes the page again; these differ: {stale}"


def test_a_page_groups_first_sentences_by_folder(script, tmp_path):
    package = tmp_path / "src" / "moe_replay"
    (package / "grpo").mkdir(parents=True)
    (package / "__init__.py").write_text('"""Trains."""')
    (package / "grpo" / "__init__.py").write_text('"""The loop."""')
    (package / "grpo" / "loss.py").write_text(
        '"""Turn a ratio\ninto a loss. In short.\n\nIn: a."""'
    )
    (package / "errors.py").write_text('"""Every error"""')
    page = script.page(tmp_path)
    assert page.split("## ", 1)[1].splitlines() == [
        "moe_replay",
        "",
        "Trains.",
        "",
        "- `errors.py`: Every error",
        "",
        "## grpo/",
        "",
        "The loop.",
        "",
        "- `loss.py`: Turn a ratio into a loss.",
    ]


def test_a_changed_docstring_changes_the_page(script, tmp_path):
    package = tmp_path / "src" / "moe_replay"
    package.mkdir(parents=True)
    (package / "errors.py").write_text('"""One."""')
    before = script.page(tmp_path)
    (package / "errors.py").write_text('"""Two."""')
    assert script.page(tmp_path) != before


def test_the_page_of_papers_is_current(monkeypatch, tmp_path):
    script = load(monkeypatch, "papers")
    assert (ROOT / "docs" / "papers.md").read_text() == script.page(ROOT), "run scripts/papers"
    # A paper without a title does not pass unseen.
    package = tmp_path / "src" / "moe_replay"
    package.mkdir(parents=True)
    (package / "loss.py").write_text('def f():\n    """Do.\n\n    Source: arXiv 9999.00001."""')
    with pytest.raises(KeyError, match=r"9999\.00001"):
        script.page(tmp_path)
