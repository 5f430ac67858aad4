"""Data says what each field holds. (That docstrings are there at all is ruff's D rules.)"""

import ast

import pytest

DATA = {"frozen", "slots", "kw_only"}

# Objects with a lifetime, whose fields change while they live.
STATEFUL = {"grpo/run.py": ["Run"], "tasks/prompts.py": ["GeneratedPrompts"]}


def dataclasses_of(tree: ast.Module) -> list[tuple[ast.ClassDef, set[str]]]:
    """Return every dataclass with the flags that its decorator switches on."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            call = decorator if isinstance(decorator, ast.Call) else ast.Call(decorator, [], [])
            if ast.unparse(call.func) in {"dataclass", "dataclasses.dataclass"}:
                on = {k.arg for k in call.keywords if ast.unparse(k.value) == "True" and k.arg}
                found.append((node, on))
    return found


def loose_dataclasses(tree: ast.Module) -> list[str]:
    """Return dataclasses that are not frozen, slotted and keyword-only."""
    return [node.name for node, on in dataclasses_of(tree) if not on >= DATA]


def silent_fields(tree: ast.Module) -> list[str]:
    """Return ``Class.field`` for fields of public data without a string under them."""
    found = []
    for node, on in dataclasses_of(tree):
        if node.name.startswith("_") or "frozen" not in on:
            continue
        for line, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign) and not ast.unparse(line.target).startswith("_"):
                described = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                if not described:
                    found.append(f"{node.name}.{ast.unparse(line.target)}")
    return found


def complaints(package, check):
    return {path: found for path, tree in package.items() if (found := check(tree))}


def test_data_is_frozen_slotted_and_keyword_only(package):
    assert complaints(package, loose_dataclasses) == STATEFUL


def test_fields_are_described(package):
    assert complaints(package, silent_fields) == {}


@pytest.mark.parametrize(
    "decorator", ["@dataclass", "@dataclass(frozen=True)", "@dataclass(frozen=False, slots=True)"]
)
def test_loose_dataclasses_finds_one(decorator):
    assert loose_dataclasses(ast.parse(f"{decorator}\nclass A: ...")) == ["A"]


def test_silent_fields_finds_the_one_without_a_string():
    source = '@dataclass(frozen=True)\nclass A:\n    x: int\n    """Rows."""\n    y: int\n    z: int\n    """Columns."""'
    assert silent_fields(ast.parse(source)) == ["A.y"]
