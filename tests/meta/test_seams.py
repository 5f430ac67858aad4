"""What may happen only in a named place: environment, pickle, broad excepts; and what may happen nowhere."""

import ast
import re

import pytest

ENVIRONMENT = ("cli/",)
# Values move between a test process and its own forked children, never over a wire or a disk.
PICKLE = ("testing/ranks.py",)

UPPER = re.compile(r"_?_?[A-Z][A-Z0-9_]*|__all__")


def environment_reads(tree: ast.Module) -> list[int]:
    """Return lines that touch the process environment."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv"}
    ]


def pickles(tree: ast.Module) -> list[int]:
    """Return lines that import a pickler, or call ``torch.load`` without ``weights_only=True``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        if any(name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib"} for name in names):
            found.append(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if keywords.get("weights_only") != "True":
                found.append(node.lineno)
    return found


def mutable_globals(tree: ast.Module) -> list[str]:
    """Return names at module level that hold a list, dict or set without being spelled as a constant."""
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


def written_globals(tree: ast.Module) -> list[str]:
    """Return names that a function rebinds at module level."""
    return [name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names]


def unexplained_broad_excepts(text: str) -> list[str]:
    """Return lines that silence ruff's BLE001 without naming the seam."""
    return [
        line.strip() for line in text.splitlines() if re.search(r"noqa:.*BLE001(?!.*seam)", line)
    ]


def outside(package, check, seams=()):
    return {
        path: found
        for path, tree in package.items()
        if not path.startswith(tuple(seams)) and (found := check(tree))
    }


def test_the_environment_is_read_by_the_command_line(package):
    assert outside(package, environment_reads, ENVIRONMENT) == {}


def test_nothing_is_pickled(package):
    assert outside(package, pickles, PICKLE) == {}


def test_state_lives_in_objects(package):
    assert outside(package, mutable_globals) == {}


def test_no_function_rebinds_a_global(package):
    assert outside(package, written_globals) == {}


def test_broad_excepts_name_their_seam(texts):
    sources = {path: text for path, text in texts.items() if path.startswith("src/")}
    found = {path: unexplained_broad_excepts(text) for path, text in sources.items()}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_pickle_seams_are_still_needed(package):
    assert set(outside(package, pickles)) == set(PICKLE)


@pytest.mark.parametrize(
    "source", ["import os\nx = os.environ['A']", "import os\nx = os.getenv('A')"]
)
def test_environment_reads_finds_them(source):
    assert environment_reads(ast.parse(source)) == [2]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
    ],
)
def test_pickles_finds_them(source):
    assert pickles(ast.parse(source)) == [1]


def test_pickles_accepts_weights_only():
    assert pickles(ast.parse("torch.load(path, weights_only=True)")) == []


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


def test_written_globals_finds_one():
    assert written_globals(ast.parse("def f():\n    global active\n    active = 1")) == ["active"]


def test_unexplained_broad_excepts_finds_one():
    bare, named = (
        "except Exception:  # noqa: BLE001",
        "except Exception:  # noqa: BLE001 - seam: a reward",
    )
    assert unexplained_broad_excepts(f"{bare}\n{named}") == [bare]
