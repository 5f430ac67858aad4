"""Modules say where they stand, data says what each field holds. (Public docstrings as such are ruff's D rules.)"""

import ast

import pytest

REQUIRED = ("In:", "Out:")
DATA = {"frozen", "slots", "kw_only"}

# Objects with a lifetime, whose fields change while they live.
STATEFUL = {"grpo/run.py": ["Run"], "tasks/prompts.py": ["GeneratedPrompts"]}


def missing_headings(tree: ast.Module) -> list[str]:
    """Return the parts of the module docstring that are missing; a package that only names a folder needs none."""
    text = ast.get_docstring(tree) or ""
    if len(tree.body) == 1 and text:
        return []
    return [heading for heading in REQUIRED if heading not in text]


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
    """Return ``Class.field`` for fields of public, frozen dataclasses without a string under them."""
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


def test_modules_say_what_goes_in_and_out(package):
    modules = {path: tree for path, tree in package.items() if path != "__init__.py"}
    assert complaints(modules, missing_headings) == {}


def test_data_is_frozen_slotted_and_keyword_only(package):
    assert complaints(package, loose_dataclasses) == STATEFUL


def test_fields_are_described(package):
    assert complaints(package, silent_fields) == {}


def test_missing_headings_finds_the_missing_one():
    assert missing_headings(ast.parse('"""Why.\n\nIn: a.\n"""\nX = 1')) == ["Out:"]


@pytest.mark.parametrize(
    "decorator", ["@dataclass", "@dataclass(frozen=True)", "@dataclass(frozen=False, slots=True)"]
)
def test_loose_dataclasses_finds_one(decorator):
    assert loose_dataclasses(ast.parse(f"{decorator}\nclass A: ...")) == ["A"]


def test_silent_fields_finds_the_one_without_a_string():
    source = '@dataclass(frozen=True)\nclass A:\n    x: int\n    """Rows."""\n    y: int\n    z: int\n    """Columns."""'
    assert silent_fields(ast.parse(source)) == ["A.y"]
