"""No loader of transformers is called without saying that code of a checkpoint is not to be run."""

import ast

import pytest

_LOADERS = ("from_pretrained", "from_config")
# Configs of generation are data: transformers runs no code for them.
_HARMLESS = ("GenerationConfig",)


def trusting_calls(tree: ast.Module) -> list[int]:
    """Return the lines of calls of a loader without ``trust_remote_code=False``."""
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        if node.func.attr in _LOADERS and owner not in _HARMLESS and owner.startswith("Auto"):
            refused = any(
                keyword.arg == "trust_remote_code"
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is False
                for keyword in node.keywords
            )
            if not refused:
                found.append(node.lineno)
    return found


def test_r4_no_loader_trusts_the_code_of_a_checkpoint(package):
    found = {path: trusting_calls(tree) for path, tree in package.items()}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("AutoConfig.from_pretrained(p)", [1]),
        ("AutoTokenizer.from_pretrained(p, trust_remote_code=True)", [1]),
        ("AutoModelForCausalLM.from_config(c, trust_remote_code=False)", []),
        ("GenerationConfig.from_pretrained(p)", []),
    ],
)
def test_trusting_calls_finds_them(source, lines):
    assert trusting_calls(ast.parse(source)) == lines
