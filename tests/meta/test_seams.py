"""State lives in objects, and a broad except names its seam; ruff bans the rest."""

import ast
import re

import pytest

UPPER = re.compile(r"_?_?[A-Z][A-Z0-9_]*|__all__")


def mutable_globals(tree: ast.Module) -> list[str]:
    """Return names at module level of a list, dict or set not spelled as a constant."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        made = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
        called = isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in {
            *("list", "dict", "set", "defaultdict", "deque", "OrderedDict", "Counter"),
            *("WeakKeyDictionary", "WeakValueDictionary", "WeakSet"),
        }
        if isinstance(value, made) or called:
            names = [ast.unparse(target) for target in targets]
            # An empty container is there to be filled, whatever its name.
            is_empty = not value.args if called else ast.unparse(value) in {"[]", "{}"}
            found += [name for name in names if is_empty or not UPPER.fullmatch(name)]
    return found


def unexplained_broad_excepts(text: str) -> list[str]:
    """Return lines that silence ruff's BLE001 without naming the seam."""
    return [
        line.strip() for line in text.splitlines() if re.search(r"noqa:.*BLE001(?!.*seam)", line)
    ]


def test_state_lives_in_objects(package):
    found = {path: mutable_globals(tree) for path, tree in package.items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_broad_excepts_name_their_seam(texts):
    sources = {path: text for path, text in texts.items() if path.startswith("src/")}
    found = {path: unexplained_broad_excepts(text) for path, text in sources.items()}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source", ["routers = ['a']", "seen: set[int] = {1}", "CACHE = {}", "Q = deque()"]
)
def test_mutable_globals_finds_them(source):
    assert len(mutable_globals(ast.parse(source))) == 1


def test_mutable_globals_accepts_constants():
    assert (
        mutable_globals(ast.parse("SIZES = {'a': 1}\n__all__ = ['A']\nMODES = frozenset({1})"))
        == []
    )


def test_unexplained_broad_excepts_finds_one():
    bare, named = (
        "except Exception:  # noqa: BLE001",
        "except Exception:  # noqa: BLE001 - seam: a reward",
    )
    assert unexplained_broad_excepts(f"{bare}\n{named}") == [bare]
