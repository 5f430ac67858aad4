"""Tests that cannot fail, cannot be repeated or test a stand-in are refused."""

import ast
import re

import pytest

# Unseeded generators: what they find cannot be found again.
UNSEEDED = {"random.random", "random.randint", "random.choice", "random.shuffle", "random.sample"}
LEGACY = re.compile(r"(np|numpy)\.random\.(rand|randn|randint|random|choice|permutation|shuffle)")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def cases_of(tree: ast.Module) -> list[Function]:
    """Return the test functions of a module."""
    return [
        node for node in tree.body if isinstance(node, Function) and node.name.startswith("test_")
    ]


def idle_tests(tree: ast.Module) -> list[str]:
    """Return tests without an ``assert``, ``raises``, or call of a ``check`` or ``assert_``."""
    words = ("raises", "warns", "check", "assert", "expect")
    found = []
    for test in cases_of(tree):
        calls = [ast.unparse(node.func) for node in ast.walk(test) if isinstance(node, ast.Call)]
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(test))
        if not asserts and not any(word in call for call in calls for word in words):
            found.append(test.name)
    return found


def classes_of(tree: ast.Module) -> list[str]:
    """Return test classes; tests are plain functions."""
    return [n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name.startswith("Test")]


def forbidden_calls(tree: ast.Module) -> list[str]:
    """Return sleeps, mocks and unseeded randomness."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            found += [
                name for name in names if name.startswith(("unittest.mock", "mock", "pytest_mock"))
            ]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            unseeded = (
                name.endswith(("default_rng", "torch.seed", "random.Random")) and not node.args
            )
            legacy = LEGACY.fullmatch(name) is not None
            if unseeded or legacy or name in UNSEEDED or name in {"time.sleep", "sleep"}:
                found.append(name)
    return found


def test_every_test_file_holds_a_test(tests):
    files = {path: tree for path, tree in tests.items() if path.split("/")[-1].startswith("test_")}
    assert [path for path, tree in files.items() if not cases_of(tree)] == []


def test_every_test_asserts(tests):
    found = {path: idle_tests(tree) for path, tree in tests.items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_tests_are_plain_functions(tests):
    found = {path: classes_of(tree) for path, tree in tests.items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_tests_are_repeatable_and_real(tests):
    found = {path: forbidden_calls(tree) for path, tree in tests.items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_idle_tests_finds_one():
    tree = ast.parse(
        "def test_a():\n    run()\ndef test_b():\n    assert run()\ndef test_c():\n    check(1)"
    )
    assert idle_tests(tree) == ["test_a"]


def test_classes_of_finds_one():
    assert classes_of(ast.parse("class TestA: ...\nclass Model: ...")) == ["TestA"]


@pytest.mark.parametrize(
    "source",
    [
        "import unittest.mock",
        "from unittest import mock",
        "time.sleep(1)",
        "np.random.default_rng()",
        "np.random.rand(3)",
        "random.shuffle(rows)",
    ],
)
def test_forbidden_calls_finds_them(source):
    assert len(forbidden_calls(ast.parse(source))) == 1


def test_forbidden_calls_accepts_a_seeded_generator():
    assert forbidden_calls(ast.parse("np.random.default_rng(7).random()")) == []
