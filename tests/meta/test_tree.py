"""What the repository says about itself is true: its map, its errors, its links, its version."""

import re
from pathlib import Path

import pytest

import moe_replay
from moe_replay import errors

MACHINE = re.compile(
    r"/(?:work|root|opt)/\w|file:///|/home/\w|\.pyenv"
    r"|https?://[^/\s]*(?:pypi|pythonhosted|registry|artifactory|nexus)"
)
NOT_OURS = {"site", "runs", "build", "dist"}


def errors_drawn_wrongly(module) -> set[str]:
    """Return classes whose place in the drawn tree is not their place in the code."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for indent, name in re.findall(r"^([ │├└─]*)([A-Z]\w+Error)\b", module.__doc__, re.MULTILINE):
        depth = (len(indent) - 4) // 4
        parents[name] = path[depth - 1] if depth else None
        path[depth:] = [name]
    classes = {
        name: kind
        for name, kind in vars(module).items()
        if isinstance(kind, type) and kind.__module__ == module.__name__
    }
    real = {
        name: kind.__bases__[0].__name__ if kind.__bases__[0].__name__ in classes else None
        for name, kind in classes.items()
    }
    return {
        name for name in parents.keys() | real.keys() if parents.get(name, 0) != real.get(name, 0)
    }


def unmapped(readme: str, names: set[str]) -> set[str]:
    """Return folders that a README does not name as ``name/``."""
    return {name for name in names if not re.search(rf"\b{re.escape(name)}/", readme)}


def dead_links(page: Path) -> list[str]:
    """Return the relative links of a Markdown page that lead nowhere."""
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    return [link for link in links if "://" not in link and not (page.parent / link).exists()]


def missing_paths(text: str, root: Path) -> list[str]:
    """Return the paths that a page names in backticks and that do not exist."""
    named = re.findall(
        r"`((?:src/moe_replay|tests|docs|scripts|examples|benchmarks|recipes)/[\w./-]+)`", text
    )
    return [path for path in named if not (root / path).exists()]


def machine_places(text: str) -> list[str]:
    """Return traces of one machine: absolute paths and addresses of package registries."""
    return MACHINE.findall(text)


def open_ends(text: str) -> list[str]:
    """Return reminders that name no issue; ``TODO(#12)`` names one."""
    return re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b(?!\(#\d+\))", text)


def newest_version(changelog: str) -> str | None:
    """Return the version of the first dated or upcoming release of a changelog."""
    match = re.search(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    return match[1] if match else None


def test_error_tree_is_drawn_as_it_is():
    assert errors_drawn_wrongly(errors) == set()


def test_readme_maps_every_folder(root, package):
    packages = {path.split("/")[0] for path in package if "/" in path}
    top = {path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."} - NOT_OURS
    assert unmapped((root / "README.md").read_text(), packages | top) == set()


def test_readme_names_every_make_target(root):
    targets = re.findall(r"^(\w+):", (root / "Makefile").read_text(), re.MULTILINE)
    readme = (root / "README.md").read_text()
    assert [target for target in targets if f"make {target}" not in readme] == []


def test_links_between_pages_lead_somewhere(root):
    pages = [*root.glob("*.md"), *(root / "docs").rglob("*.md")]
    assert {page.name: dead for page in pages if (dead := dead_links(page))} == {}


def test_pages_name_files_that_exist(root):
    pages = [root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").rglob("*.md")]
    found = {page.name: missing_paths(page.read_text(), root) for page in pages}
    assert {page: paths for page, paths in found.items() if paths} == {}


def test_every_page_is_in_the_navigation(root):
    pages = [path.relative_to(root / "docs").as_posix() for path in (root / "docs").rglob("*.md")]
    navigation = (root / "mkdocs.yml").read_text().split("\nnav:")[1]
    assert [page for page in pages if page not in navigation] == []


def test_no_file_knows_the_machine_it_was_written_on(texts):
    own = "tests/meta/test_tree.py"
    found = {path: machine_places(text) for path, text in texts.items() if path != own}
    assert {path: places for path, places in found.items() if places} == {}


def test_no_file_leaves_an_open_end(texts):
    own = "tests/meta/test_tree.py"
    found = {path: open_ends(text) for path, text in texts.items() if path != own}
    assert {path: ends for path, ends in found.items() if ends} == {}


def test_changelog_leads_to_the_version(root):
    assert newest_version((root / "CHANGELOG.md").read_text()) == moe_replay.__version__


def test_scripts_can_be_executed(root):
    scripts = [*(root / "scripts").iterdir(), root / ".ci" / "run"]
    assert [path.name for path in scripts if not path.stat().st_mode & 0o100] == []


def test_constraints_name_no_place_and_no_build(root):
    lines = (root / "constraints.txt").read_text().splitlines()[1:]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_errors_drawn_wrongly_finds_a_class_that_is_not_drawn(monkeypatch):
    forgotten = type("ForgottenError", (errors.TraceError,), {"__module__": errors.__name__})
    monkeypatch.setattr(errors, "ForgottenError", forgotten, raising=False)
    assert errors_drawn_wrongly(errors) == {"ForgottenError"}


def test_errors_drawn_wrongly_finds_a_class_under_the_wrong_parent(monkeypatch):
    moved = type("CodecError", (errors.MoeReplayError,), {"__module__": errors.__name__})
    monkeypatch.setattr(errors, "CodecError", moved)
    assert errors_drawn_wrongly(errors) == {"CodecError"}


def test_unmapped_finds_a_folder():
    assert unmapped("routing/ is the core", {"routing", "sync"}) == {"sync"}


def test_dead_links_finds_one(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](page.md) [b](https://example.org) [c](#here) [d](gone.md#there)")
    assert dead_links(page) == ["gone.md"]


def test_missing_paths_finds_one(tmp_path):
    (tmp_path / "docs").mkdir()
    assert missing_paths("`docs/` and `src/moe_replay/gone.py`, not `other/x`", tmp_path) == [
        "src/moe_replay/gone.py"
    ]


@pytest.mark.parametrize(
    "text", ["cd /opt/project", "--find-links file:///wheels", "https://pypi.example/simple"]
)
def test_machine_places_finds_them(text):
    assert machine_places(text)


def test_open_ends_finds_one_without_an_issue():
    assert open_ends("# TODO: later\n# TODO(#12): later") == ["TODO"]


def test_newest_version_skips_what_is_unreleased():
    assert newest_version("## [Unreleased]\n\n## [0.2.0] - 2027-01-02\n\n## [0.1.0]") == "0.2.0"
