"""A chain of imports inside a folder has at most five floors, and none is a circle.

The nodes of a folder are its own modules and its sub-folders, each sub-folder one node whatever
lies in it (it is measured by itself). Every import counts: late ones, and those for type checkers.
A name that a package only passes on counts as an import of the module that defines it. The folders
below src/moe_replay itself are layers, which import-linter holds.
"""

import ast
import itertools

import pytest

MAX_FLOORS = 5

# Folder -> circles. These may only shrink; an entry that is not needed fails.
CIRCLES: dict[str, list[tuple[str, ...]]] = {}

Graph = dict[str, set[str]]


def module_name(path: str) -> str:
    """Return ``routing.trace`` for ``routing/trace.py``, ``routing`` for its ``__init__``."""
    return path.removesuffix(".py").replace("/", ".").removesuffix("__init__").strip(".")


def imported_names(tree: ast.Module) -> list[tuple[str, str]]:
    """Return (module, name) of each import of this package; '' for a whole module."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [(node.module, alias.name) for alias in node.names]
    ours = [(module, name) for module, name in found if module.split(".")[0] == "moe_replay"]
    return [(module.removeprefix("moe_replay").strip("."), name) for module, name in ours]


def import_graph(package: dict[str, ast.Module]) -> Graph:
    """Return path -> paths that it imports, with names traced to the modules that define them."""
    paths = {module_name(path): path for path in package}
    names = {path: imported_names(tree) for path, tree in package.items()}

    def origin(module: str, name: str) -> str | None:
        inner = f"{module}.{name}".strip(".")
        if name and inner in paths:
            return paths[inner]
        path = paths.get(module)
        if name and path and path.endswith("__init__.py"):
            passed_on = [m for m, n in names[path] if n == name and m != module]
            if passed_on:
                return origin(passed_on[0], name)
        return path

    return {
        path: {found for each in pairs if (found := origin(*each))} - {path}
        for path, pairs in names.items()
    }


def inside(folder: str, graph: Graph) -> Graph:
    """Return the graph of a folder's own modules and sub-folders."""

    def node(path: str) -> str | None:
        below = path.removeprefix(f"{folder}/")
        if below == path or below == "__init__.py":
            return None
        first, slash, _ = below.partition("/")
        return first.removesuffix(".py") + slash

    found: Graph = {here: set() for path in graph if (here := node(path))}
    for path, imported in graph.items():
        if here := node(path):
            found[here] |= {there for other in imported if (there := node(other))} - {here}
    return found


def reached(start: str, graph: Graph) -> set[str]:
    """Return what can be reached from a node by at least one import."""
    found, left = set(), [start]
    while left:
        new = graph[left.pop()] - found
        found |= new
        left += new
    return found


def circles(graph: Graph) -> list[tuple[str, ...]]:
    """Return the groups of nodes that reach one another."""
    reach = {node: reached(node, graph) for node in graph}
    groups = {
        tuple(sorted(other for other in reach[node] if node in reach[other]))
        for node in graph
        if node in reach[node]
    }
    return sorted(groups)


def floors(graph: Graph) -> list[str]:
    """Return the longest chain of imports, top first; a circle counts all its nodes."""
    circle_of = {node: group for group in circles(graph) for node in group}
    longest: dict[tuple[str, ...], list[str]] = {}

    def chain(group: tuple[str, ...]) -> list[str]:
        if group not in longest:
            below = {circle_of.get(n, (n,)) for node in group for n in graph[node]} - {group}
            longest[group] = [*group, *max(map(chain, sorted(below)), key=len, default=[])]
        return longest[group]

    return max((chain(circle_of.get(node, (node,))) for node in sorted(graph)), key=len, default=[])


@pytest.fixture(scope="module")
def folders(package) -> dict[str, Graph]:
    graph = import_graph(package)
    names = {path.rpartition("/")[0] for path in package} - {""}
    return {name: inside(name, graph) for name in sorted(names)}


def test_no_folder_has_more_than_five_floors(folders):
    chains = {name: floors(graph) for name, graph in folders.items()}
    tall = {name: " > ".join(chain) for name, chain in chains.items() if len(chain) > MAX_FLOORS}
    assert tall == {}


def test_no_folder_has_a_circle(folders):
    assert {name: found for name, graph in folders.items() if (found := circles(graph))} == CIRCLES


def planted(sources: dict[str, str]) -> dict[str, ast.Module]:
    """Return a package of the given modules."""
    return {path: ast.parse(source) for path, source in sources.items()}


def test_floors_counts_a_planted_tower():
    tower = {
        f"x/{above}.py": f"def late():\n    import moe_replay.x.{below}"
        for above, below in itertools.pairwise("abcdef")
    }
    graph = import_graph(planted({**tower, "x/f.py": ""}))
    assert floors(inside("x", graph)) == list("abcdef")


def test_floors_counts_a_sub_folder_once_and_not_the_packages_own_door():
    package = planted(
        {
            "x/a.py": "from moe_replay.x.room.b import B",
            "x/room/b.py": "import moe_replay.x.room.c",
            "x/room/c.py": "from moe_replay.x.d import D",
            "x/d.py": "import moe_replay.y",
            "y/__init__.py": "import moe_replay.x.e",
            "x/e.py": "",
            "x/__init__.py": "from moe_replay.x.a import A",
        }
    )
    assert floors(inside("x", import_graph(package))) == ["a", "room/", "d"]


def test_floors_sees_through_a_name_that_a_package_passes_on():
    package = planted(
        {
            "x/__init__.py": "from moe_replay.x.b import B",
            "x/a.py": "from moe_replay.x import B",
            "x/b.py": "",
        }
    )
    assert floors(inside("x", import_graph(package))) == ["a", "b"]


@pytest.mark.parametrize(
    "late", ["def f():\n    ", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "]
)
def test_circles_finds_a_planted_one_between_a_module_and_a_room(late):
    package = planted(
        {
            "x/a.py": "from moe_replay.x.room import b",
            "x/room/b.py": f"{late}from moe_replay.x.a import A",
            "x/c.py": "import moe_replay.x.a",
        }
    )
    graph = inside("x", import_graph(package))
    assert circles(graph) == [("a", "room/")]
    assert floors(graph) == ["c", "a", "room/"]
