"""The tail of file and function lengths is capped."""

import ast

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Exceptions, by path or path:function. One that is no longer needed fails.
LONG_ON_PURPOSE: frozenset[str] = frozenset()


def long_places(files: dict[str, tuple[int, ast.Module]]) -> set[str]:
    """Return the files and functions over the cap of ``{path: (number of lines, tree)}``."""
    places = {path for path, (num_lines, _) in files.items() if num_lines > MAX_FILE_LINES}
    for path, (_, tree) in files.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
                    places.add(f"{path}:{node.name}")
    return places


def test_files_and_functions_stay_short(texts):
    files = {
        path: (text.count("\n"), ast.parse(text))
        for path, text in texts.items()
        if path.endswith(".py") and path.startswith(("src/", "tests/"))
    }
    assert long_places(files) == LONG_ON_PURPOSE


def test_long_places_finds_a_long_file():
    assert long_places({"a.py": (401, ast.parse("")), "b.py": (400, ast.parse(""))}) == {"a.py"}


def test_long_places_finds_a_long_function():
    body = "\n".join(f"    x{i} = {i}" for i in range(60))
    tree = ast.parse(f"def long():\n{body}\ndef short():\n    pass\n")
    assert long_places({"a.py": (63, tree)}) == {"a.py:long"}
