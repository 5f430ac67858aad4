"""Every id in docs/defects.md starts the name of a test, and every such id is in the page.

A page of two halves: the tests of the first are in tests/defects, those of the second ("Found by
use") elsewhere.
"""

import ast
import re

import pytest

SECOND_HALF = "## Found by use"
ROW = re.compile(r"^\| ([A-Z]\d+) \|.*\| `(test_\w+)` \|$", re.MULTILINE)
# Chapters of the second half.
FOUND = "tedr"

Names = dict[str, set[str]]


def ids_of(name: str, chapters: str) -> list[str]:
    """Return the ids that a test's name starts with: ``test_t24_d11_a_run`` has two."""
    match = re.match(rf"test((?:_[{chapters}]\d+)+)_[a-z]", name)
    return match[1].strip("_").split("_") if match else []


def named_tests(tests: dict[str, ast.Module], *, in_defects: bool) -> Names:
    """Return id -> names of its tests, of one half."""
    found: Names = {}
    for path, tree in tests.items():
        if path.startswith("meta/test_defects") or path.startswith("defects/") != in_defects:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                for one in ids_of(node.name, "a-z" if in_defects else FOUND):
                    found.setdefault(one, set()).add(node.name)
    return found


def catalogue(page: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return id -> named test of each half of the page."""
    first, _, second = page.partition(SECOND_HALF)
    ours, theirs = ({i.lower(): name for i, name in ROW.findall(half)} for half in (first, second))
    return ours, theirs


def disagreements(rows: dict[str, str], tests: Names) -> dict[str, str]:
    """Return id -> what is wrong between a half of the page and its tests."""
    wrong = {one: "has tests, and no line in docs/defects.md" for one in tests.keys() - rows.keys()}
    for one, name in rows.items():
        if one not in tests:
            wrong[one] = "has no test"
        elif name not in tests[one]:
            wrong[one] = f"names {name}, which is not there; its tests: {sorted(tests[one])}"
    return wrong


@pytest.fixture(scope="module")
def page(root) -> str:
    return (root / "docs" / "defects.md").read_text()


@pytest.mark.parametrize("half", [0, 1])
def test_every_id_is_in_the_catalogue_and_has_its_test(page, tests, half):
    rows = catalogue(page)[half]
    assert rows
    assert disagreements(rows, named_tests(tests, in_defects=half == 0)) == {}


def test_every_line_of_the_catalogue_is_read(page):
    lines = [line for line in page.splitlines() if re.match(r"\| [A-Z]\d", line)]
    assert len(lines) == sum(map(len, catalogue(page)))


def test_tests_of_defects_start_with_an_id(tests):
    names = [
        node.name
        for path, tree in tests.items()
        if path.startswith("defects/")
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert [name for name in names if not ids_of(name, "a-z")] == []


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        ({"a1": "test_a1_raises"}, {}),
        ({}, {"a1": "has tests"}),
        ({"a1": "test_a1_raises", "a2": "test_a2_raises"}, {"a2": "has no test"}),
        ({"a1": "test_a1_was_renamed"}, {"a1": "names test_a1_was_renamed"}),
    ],
)
def test_disagreements_finds_them(rows, wrong):
    found = disagreements(rows, {"a1": {"test_a1_raises"}})
    assert found.keys() == wrong.keys()
    assert all(found[one].startswith(start) for one, start in wrong.items())


def test_named_tests_keeps_the_halves_apart():
    tree = ast.parse("def test_d3_a(): ...\ndef test_t24_d11_b(): ...\ndef test_k3_is_small(): ...")
    tests = {"grpo/test_a.py": tree, "defects/test_b.py": ast.parse("def test_d4_c(): ...")}
    assert named_tests(tests, in_defects=False).keys() == {"d3", "t24", "d11"}
    assert named_tests(tests, in_defects=True).keys() == {"d4"}


def test_catalogue_reads_the_halves():
    line = "| A1 | Wrong. | `test_a1_raises` |\n"
    assert catalogue(line + SECOND_HALF + "\n" + line.replace("1", "2")) == (
        {"a1": "test_a1_raises"},
        {"a2": "test_a2_raises"},
    )
