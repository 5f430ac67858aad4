"""What each command of a page would meet: the parser, the recipe loader, or the file that it names.

Nothing is trained, sampled or installed. A command is wrong if the program that it names would
refuse it before it starts to work.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

from moe_replay.cli.options import read_options
from moe_replay.errors import MoeReplayError
from moe_replay.plan.machine import read_machine
from moe_replay.recipe.load import load_recipe

from .pages import ROOT

MINIMAL = """
[run]
output_dir = "runs/first"
max_steps = 200
[model]
path = "checkpoints/model"
[data]
train = "train.jsonl"
max_prompt_length = 512
[[rewards]]
function = "rewards.py:accuracy"
[rollout]
max_completion_length = 1024
num_generations = 8
[replay]
router_replay_mode = "R3"
[batch]
global_batch_size = 128
max_tokens_per_microbatch = 16384
[optimizer]
lr = 1e-6
"""
"""Stands for the recipe of a reader, which pages call recipe.toml or RECIPE."""
_OF_THE_READER = ("recipe.toml", "RECIPE")

# Programs and modules that are not ours, and why their commands are not checked further.
NOT_OURS = {
    "[": "a test of the shell, on the exit code of the command before it",
    "hf": "downloads a checkpoint",
    "scontrol": "talks to a Slurm controller",
    "vllm": "vLLM's own server, whose options are vLLM's",
    "venv": "the standard library's; .ci/pip-lines runs the line",
    "sglang.launch_server": "SGLang is in no environment of ours",
}
_OPERATORS = re.compile(r"[();<>|&]+")
_ASSIGNMENT = re.compile(r"([A-Z_][A-Z0-9_]*)=(.*)", re.DOTALL)


class WrongCommandError(Exception):
    """A command of a page that would be refused."""


def commands_of(code: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the words of each command, with its line in the block from 0, as the shell splits them.

    Example: ``a=1 b \\`` and ``c && d # e`` are ``(0, ["a=1", "b", "c"])`` and ``(0, ["d"])``.
    """
    lines = code.splitlines()
    at = 0
    while at < len(lines):
        first, line = at, lines[at]
        while line.endswith("\\") and at + 1 < len(lines):
            at += 1
            line = line[:-1] + lines[at]
        at += 1
        reader = shlex.shlex(line, posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        command: list[str] = []
        words = list(reader)
        while words:
            word = words.pop(0)
            if not _OPERATORS.fullmatch(word):
                command.append(word)
            elif "<" in word or ">" in word:
                words = words[1:]  # the file
            elif command:
                yield first, command
                command = []
        if command:
            yield first, command


def check_command(words: Sequence[str], folder: Path) -> str | None:
    """Raise `WrongCommandError` for a command that its program would refuse.

    Return the name in `NOT_OURS` of what was not checked further. ``folder`` is an empty one, for
    the recipe that stands for the reader's.
    """
    environment = {}
    rest = list(words)
    while rest and (match := _ASSIGNMENT.fullmatch(rest[0])):
        environment[match[1]] = match[2]
        rest.pop(0)
    if not rest:
        return None
    program, arguments = rest[0].removeprefix(".venv/bin/"), rest[1:]
    if program in NOT_OURS:
        return program
    if program in ("python", "python3"):
        return _python(arguments, folder)
    if program.startswith("scripts/"):
        _script(program, arguments, folder)
    elif program == "sbatch":
        _sbatch(arguments, environment, folder)
    elif program in _PROGRAMS:
        _PROGRAMS[program](arguments, folder)
    else:
        raise WrongCommandError(
            f"no check for the program {program!r}: add one, or a line with the reason to NOT_OURS"
        )
    return None


def _moe_replay(arguments: Sequence[str], folder: Path) -> None:
    options = _parsed(lambda: read_options(arguments))
    if options is None:  # --help
        return
    try:
        if hasattr(options, "recipe"):
            load_recipe(_recipe(options.recipe, folder), options.overrides)
        if getattr(options, "plan", None) is not None:
            read_machine(options.plan)
    except MoeReplayError as error:
        raise WrongCommandError(str(error)) from error
    model = getattr(options, "model", None)
    if model is not None and str(model).startswith("recipes/"):
        _exists(str(model))


def _recipe(named: str, folder: Path) -> Path:
    if named in _OF_THE_READER:
        path = folder / "recipe.toml"
        path.write_text(MINIMAL)
        return path
    return _exists(named)


def _python(arguments: Sequence[str], folder: Path) -> str | None:
    if not arguments:
        raise WrongCommandError("python without a script")
    if arguments[0] != "-m":
        _own_parser(_exists(arguments[0]), arguments[1:])
        return None
    module, rest = arguments[1], arguments[2:]
    if module in NOT_OURS:
        return module
    if module == "moe_replay.cli.main":
        _moe_replay(rest, folder)
    elif module == "pip":
        _pip(rest, folder)
    elif module == "pytest":
        for word in rest:
            if word.startswith("tests"):
                _exists(word)
    else:
        raise WrongCommandError(f"no check for python -m {module}")
    return None


def _own_parser(script: Path, arguments: Sequence[str]) -> None:
    """Give the arguments to the parser that the script's own main() makes, and stop it there."""
    if "argparse" not in script.read_text():
        if arguments:
            raise WrongCommandError(f"{script.name} takes no arguments, got {' '.join(arguments)}")
        return

    class Read(Exception):
        """The script has read its arguments."""

    real = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        real(parser, list(arguments))
        raise Read

    # Scripts find their neighbours beside them, and some set variables for what they start.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "environ", os.environ.copy())
        patched.setattr(sys, "path", [str(script.parent), *sys.path])
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        main = _module(script).main
        try:
            _parsed(main)
        except Read:
            return
    raise WrongCommandError(f"{script.name} ends before it reads its arguments")


def _module(script: Path) -> ModuleType:
    name = "of_pages_" + "_".join(script.relative_to(ROOT).with_suffix("").parts).replace("-", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, script)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Where dataclasses look up the annotations of their fields.
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _parsed(read: Callable[[], Any]) -> Any:
    """Return what a parser gives, or None if it has shown its help; raise what it says is wrong."""
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            return read()
    except SystemExit as end:
        if end.code in (0, None):
            return None
        raise WrongCommandError(said.getvalue().partition("error: ")[2].strip()) from end


def _torchrun(arguments: Sequence[str], folder: Path) -> None:
    from torch.distributed.run import get_args_parser

    options = _parsed(lambda: get_args_parser().parse_args(list(arguments)))
    if not options.module or options.training_script != "moe_replay.cli.main":
        raise WrongCommandError(f"torchrun starts {options.training_script}, not our command")
    _moe_replay(options.training_script_args, folder)


def _sbatch(arguments: Sequence[str], environment: dict[str, str], folder: Path) -> None:
    """Read ``sbatch OPTIONS recipes/slurm/train.sbatch RECIPE OUTPUT [KEY VALUE ...]``."""
    at = next((n for n, word in enumerate(arguments) if word.endswith(".sbatch")), None)
    if at is None or len(arguments) < at + 3:
        raise WrongCommandError("sbatch needs a script, a recipe and an output directory")
    text = _exists(arguments[at]).read_text()
    if unknown := [name for name in environment if name not in text]:
        raise WrongCommandError(f"{arguments[at]} reads no {', '.join(unknown)}")
    recipe, output, *pairs = arguments[at + 1 :]
    _moe_replay(["train", recipe, "--run.output_dir", output, *pairs], folder)
    if "SERVE_OPTIONS" in environment:
        options = shlex.split(environment["SERVE_OPTIONS"])
        _moe_replay(["serve", environment["MODEL"], *options], folder)


def _script(program: str, arguments: Sequence[str], folder: Path) -> None:
    if not os.access(_exists(program), os.X_OK):
        raise WrongCommandError(f"{program} cannot be executed")
    if program == "scripts/demo":
        _moe_replay(["train", "recipes/demo/recipe.toml", *arguments], folder)


def _make(arguments: Sequence[str], folder: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in arguments:
        if target not in targets:
            raise WrongCommandError(f"make has no target {target!r}, only {', '.join(targets)}")


def _pip(arguments: Sequence[str], folder: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = {re.split(r"[\[<>=~;]", line)[0].strip() for lines in extras.values() for line in lines}
    if arguments[:1] != ["install"]:
        raise WrongCommandError(f"pip {' '.join(arguments)}: expected install")
    rest = list(arguments[1:])
    while rest:
        word = rest.pop(0)
        if word in ("-c", "-r"):
            _exists(rest.pop(0))
        elif match := re.fullmatch(r"(?:\.|moe-replay)(?:\[(.*)\])?", word):
            for extra in (match[1] or "").split(",") if match[1] else ():
                if extra not in extras:
                    raise WrongCommandError(f"pyproject.toml has no extra {extra!r}")
        elif word not in known:
            raise WrongCommandError(f"no extra of pyproject.toml holds {word!r}")


def _exists(path: str) -> Path:
    if not (ROOT / path).exists():
        raise WrongCommandError(f"{path} does not exist")
    return ROOT / path


_PROGRAMS: dict[str, Callable[[Sequence[str], Path], None]] = {
    "moe-replay": _moe_replay,
    "torchrun": _torchrun,
    "make": _make,
    "pip": _pip,
}

COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?"
    r"(?:moe-replay|python3?|torchrun|make|pip|sbatch|scripts/[\w-]+)(?: |$)"
)
"""How a line, or a piece of code in prose, begins that is one of our commands."""


def names_only(code: str) -> bool:
    """Whether a piece of code in prose names a command, without what it needs to run."""
    words = code.split()
    if words[0] == "moe-replay":
        return all(word.startswith("--") for word in words[2:])
    return len(words) == 1 or (words[:2] == ["python", "-m"] and len(words) == 3)
