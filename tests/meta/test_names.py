"""Names that say nothing, or could mean several things, are refused."""

import ast

import pytest

EMPTY_NAMES = {"data", "info", "process"}
EMPTY_WORDS = {"utils", "util", "helpers", "helper", "manager"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def empty_names(path: str, tree: ast.Module) -> list[str]:
    """Return modules, functions and classes whose name says nothing."""
    names = [part.removesuffix(".py") for part in path.split("/")]
    names += [node.name for node in ast.walk(tree) if isinstance(node, Function | ast.ClassDef)]
    return [
        name
        for name in names
        if name.strip("_").lower() in EMPTY_NAMES
        or EMPTY_WORDS & set(name.lower().split("_"))
        or name.endswith(("Manager", "Helper", "Utils"))
    ]


def bare_logprobs(tree: ast.Module) -> list[str]:
    """Return public functions and classes with a parameter or field named just ``logprobs``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, Function) and not node.name.startswith("_"):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            found += [node.name for arg in every if arg.arg == "logprobs"]
        elif isinstance(node, ast.ClassDef):
            fields = [line.target for line in node.body if isinstance(line, ast.AnnAssign)]
            found += [
                node.name
                for field in fields
                if isinstance(field, ast.Name) and field.id == "logprobs"
            ]
    return found


def test_names_say_something(package):
    found = {path: empty_names(path, tree) for path, tree in package.items()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("grpo/utils.py", "", ["utils"]),
        ("grpo/loop.py", "def process(): ...", ["process"]),
        ("grpo/loop.py", "class ReplayManager: ...", ["ReplayManager"]),
        ("grpo/loop.py", "def _math_helper(): ...", ["_math_helper"]),
        ("grpo/loop.py", "def process_group(): ...", []),
    ],
)
def test_empty_names_finds_them(path, source, expected):
    assert empty_names(path, ast.parse(source)) == expected


def test_logprobs_say_whose_they_are(package):
    found = {path: bare_logprobs(tree) for path, tree in package.items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_bare_logprobs_finds_a_parameter_and_a_field():
    tree = ast.parse(
        "def loss(logprobs): ...\nclass Batch:\n    logprobs: int\n    old_logprobs: int"
    )
    assert bare_logprobs(tree) == ["loss", "Batch"]
