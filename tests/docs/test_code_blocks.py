"""Every code block of every page is run, or read by what a reader would give it to.

A block's label says what happens to it:

- ``python``: a test of this folder runs it; `RUN_BY` names the test's file.
- ``py``: lines inside another program; they are parsed.
- ``bash``: each command is given to the parser, recipe loader or file that it names (`commands`).
- ``toml``: loaded as a recipe, or put into a complete one and loaded.
- ``json``: parsed. ``hex``: compared with the codec by ``tests/routing/format``.
- ``text``: what a program prints, a formula, a picture; no command may hide in it.
"""

from __future__ import annotations

import ast
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports
from moe_replay.errors import MoeReplayError
from moe_replay.recipe.load import load_recipe

from .commands import (
    COMMAND,
    MINIMAL,
    NOT_OURS,
    WrongCommandError,
    check_command,
    commands_of,
    names_only,
)
from .pages import Block, blocks_of, pages, spans_of

PAGES = pages()
# Page -> file of this folder whose tests run its examples, all of one marker in one namespace.
RUN_BY = {
    "README.md": "test_python_blocks.py",
    "docs/alignment.md": "test_library.py",
    "docs/check-your-routes.md": "test_check_your_routes.py",
    "docs/diagnose.md": "test_diagnose.py",
    "docs/environments.md": "test_python_blocks.py",
    "docs/first-run.md": "test_python_blocks.py",
    "docs/library.md": "test_library.py",
    "docs/megatron.md": "test_python_blocks.py",
    "docs/migration.md": "test_python_blocks.py",
    "docs/rewards.md": "test_python_blocks.py",
    "docs/transformers.md": "test_library.py",
    "docs/trl.md": "test_python_blocks.py",
}
# A script of 15 lines that trains: tests/cli/test_from_python.py runs the block in it.
RUN_ELSEWHERE = {("docs/first-run.md", "a recipe")}
HEX = "docs/trace-format.md"


def problems_of(page: str, text: str, folder: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, what is wrong) of a page's blocks and of the commands in its prose."""
    for block in blocks_of(page, text):
        for line, problem in _problems(block, folder):
            yield block.line + line, problem
    for span in spans_of(page, text):
        if COMMAND.match(span.code) and not names_only(span.code):
            for _, problem in _shell(span, folder):
                yield span.line, problem


def _problems(block: Block, folder: Path) -> Iterator[tuple[int, str]]:
    match block.label.split():
        case ["python"]:
            yield from _python(block)
        case ["py"]:
            yield from _parses(block)
        case ["bash"]:
            yield from _shell(block, folder)
        case ["toml"]:
            yield from _toml(block)
        case ["json"]:
            yield from _json(block)
        case ["text"]:
            for number, line in enumerate(block.code.splitlines()):
                if COMMAND.match(line):
                    yield number, f"a command in a block of text: {line}"
        case ["hex", "raw" | "compact"] if block.page == HEX:
            return
        case _:
            yield (
                -1,
                f"a block labelled {block.label!r}: expected python, py, bash, toml, json or text",
            )


def _python(block: Block) -> Iterator[tuple[int, str]]:
    if (block.page, block.needs) in RUN_ELSEWHERE:
        return
    file = RUN_BY.get(block.page)
    if file is None:
        yield 0, "no test runs the Python blocks of this page: add it to RUN_BY, and run it there"
        return
    tree = ast.parse((Path(__file__).parent / file).read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    if block.page.removeprefix("docs/") not in texts:
        yield 0, f"{file} does not name the page"
    if block.needs is not None and block.needs not in texts:
        yield 0, f"{file} runs no block with the marker {block.needs!r}"


def _parses(block: Block) -> Iterator[tuple[int, str]]:
    try:
        ast.parse(block.code)
    except SyntaxError as error:
        yield (error.lineno or 1) - 1, error.msg


def _shell(block: Block, folder: Path) -> Iterator[tuple[int, str]]:
    try:
        for line, words in commands_of(block.code):
            try:
                check_command(words, folder)
            except WrongCommandError as error:
                yield line, f"{' '.join(words)}: {error}"
    except ValueError as error:
        yield 0, f"the shell would not read it: {error}"


def _toml(block: Block) -> Iterator[tuple[int, str]]:
    try:
        load_recipe(_merged(tomllib.loads(block.code)))
    except (tomllib.TOMLDecodeError, MoeReplayError) as error:
        yield 0, str(error)


def _merged(part: dict[str, Any]) -> dict[str, Any]:
    """Put the tables of a page into a complete recipe; a list of tables replaces the recipe's."""
    recipe = tomllib.loads(MINIMAL)
    for section, keys in part.items():
        if isinstance(keys, dict):
            recipe.setdefault(section, {}).update(keys)
        else:
            recipe[section] = keys
    if "mixture" in part:
        del recipe["data"]["train"]
    return recipe


def _json(block: Block) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(block.code.splitlines()):
        try:
            json.loads(line)
        except ValueError as error:
            yield number, str(error)


@pytest.mark.parametrize("page", [name for name in PAGES if "`" in PAGES[name]])
def test_every_block_and_command_of_a_page_is_right(page, tmp_path):
    found = [
        f"{page}:{line}: {problem}" for line, problem in problems_of(page, PAGES[page], tmp_path)
    ]
    assert not found, "\n".join(found)


def test_tables_name_only_what_pages_have(tmp_path):
    with_python = {
        page
        for page, text in PAGES.items()
        if any(block.label == "python" for block in blocks_of(page, text))
    }
    assert with_python == RUN_BY.keys()
    programs = {
        word
        for page, text in PAGES.items()
        for block in [*blocks_of(page, text), *spans_of(page, text)]
        if block.label == "bash"
        for _, words in commands_of(block.code)
        for word in words
    }
    assert NOT_OURS.keys() - programs == set()


@pytest.mark.parametrize(
    ("block", "line", "problem"),
    [
        ("```bash\nmake demo\nmoe-replay train recipe.toml --dryrun\n```", 5, "did you mean --dry"),
        ("```bash\nmoe-replay train recipe.toml \\\n  --run.steps 3\n```", 4, "run.max_steps"),
        ("```bash\nmoe-replay serve MODEL --prot 1\n```", 4, "did you mean --port"),
        ("```bash\nmoe-replay train recipes/none.toml\n```", 4, "recipes/none.toml does not exist"),
        ("```bash\nmoe-replay doctor RECIPE --plan gpus=8\n```", 4, "expected a form like"),
        ("```bash\ntorchrun -m moe_replay.cli.main train RECIPE --x.y 1\n```", 4, "x.y"),
        (
            "```bash\ntorchrun --nnodes 8 --nonodes 1 -m a b\n```",
            4,
            "unrecognized arguments: --nonod",
        ),
        ("```bash\nmake demo && python benchmarks/balance.py --quik\n```", 4, "arguments: --quik"),
        ("```bash\npython benchmarks/none.py\n```", 4, "benchmarks/none.py does not exist"),
        ("```bash\npython experiments/picture.py --x\n```", 4, "takes no arguments"),
        ("```bash\nscripts/none\n```", 4, "scripts/none does not exist"),
        ("```bash\nA=1 make tset\n```", 4, "make has no target 'tset'"),
        ("```bash\npip install 'moe-replay[vlm]'\n```", 4, "no extra 'vlm'"),
        ("```bash\nWIDTH=3 sbatch recipes/slurm/train.sbatch RECIPE out\n```", 4, "no WIDTH"),
        ("```bash\ncurl https://example.org\n```", 4, "no check for the program 'curl'"),
        ("```bash\nmake 'demo\n```", 4, "No closing quotation"),
        ("Run `make demo`, then\n`python benchmarks/none.py\n--quick`.", 4, "does not exist"),
        ("```text\nfine\nmake demo\n```", 5, "a command in a block of text"),
        ("```toml\n[grpo]\nbetta = 0.1\n```", 4, "did you mean"),
        ("```toml\n[grpo\n```", 4, "Expected"),
        ('```json\n{"a": 1}\n{a: 1}\n```', 5, "Expecting property name"),
        ("```py\nx = 1\nx = = 1\n```", 5, "invalid syntax"),
        ("```python\nassert True\n```", 4, "no test runs the Python blocks of this page"),
        ("```\nmake demo\n```", 3, "a block labelled ''"),
        ("text\n\n    make demo", 4, "a block labelled 'indented'"),
    ],
)
def test_a_wrong_block_is_named_with_its_line(block, line, problem, tmp_path):
    found = list(problems_of("made.md", f"# A page\n\n{block}\n", tmp_path))
    assert len(found) == 1, found
    assert problem in found[0][1]
    assert found[0][0] == line


def test_a_marker_that_no_test_runs_is_named(tmp_path):
    text = "<!-- run with: a million GPUs -->\n```python\nassert True\n```\n"
    ((line, problem),) = problems_of("docs/library.md", text, tmp_path)
    assert line == 3
    assert "no block with the marker 'a million GPUs'" in problem
