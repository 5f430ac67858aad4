"""The options of every command, and what a wrong one probably meant, without a heavy import."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from moe_replay import __version__
from moe_replay.cli import diagnose_options
from moe_replay.cli import serve as serve_command

WIDTH = 100
"""Characters of a line of help or of an error message."""

_TAKE_KEYS = ("train", "rollout", "record", "doctor")


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line; ``overrides`` are its pairs of recipe key and text.

    Raises:
        SystemExit: after help and version (0), and after a usage error (2), which names the nearest
            option or key.
    """
    arguments, overrides = split_overrides(argv)
    parser = _parser()
    try:
        options, unknown = parser.parse_known_args(arguments)
    except BrokenPipeError:
        # The reader of the help has closed the pipe; without this the interpreter complains again
        # when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    if overrides and options.command not in _TAKE_KEYS:
        unknown = [f"--{key}" for key, _ in overrides] + unknown
    if unknown:
        _refuse(options.parser, options.command, unknown)
    for key, value in overrides:
        if value is None:
            options.parser.error(
                f"--{key} has no value: write --{key} VALUE (true or false for a switch)"
            )
    if options.command == "train" and options.elsewhere and not options.dry_run:
        options.parser.error("--elsewhere is for a dry run: add --dry-run")
    options.overrides = overrides
    return options


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Take ``--section.key value`` and ``--section.key=value`` out of the arguments.

    None stands for no value. A value that begins with ``--`` needs the second form.

    Examples:
        >>> split_overrides(["train", "--grpo.beta", "-0.1", "r.toml"])
        (['train', 'r.toml'], [('grpo.beta', '-0.1')])
    """
    arguments: list[str] = []
    overrides: list[tuple[str, str | None]] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or "." not in name:
            arguments.append(argument)
        elif equals:
            overrides.append((name[2:], value))
        elif not rest or rest[0].startswith("--"):
            # An option taken for a value, such as --dry-run, would be lost without a word.
            overrides.append((name[2:], None))
        else:
            overrides.append((name[2:], rest.pop(0)))
    return arguments, overrides


def _refuse(parser: argparse.ArgumentParser, command: str, unknown: Sequence[str]) -> NoReturn:
    """End with a usage error that names what each unknown option may have meant."""
    own = [text for action in parser._actions for text in action.option_strings]
    lines = [f"unrecognized arguments: {' '.join(unknown)}"]
    for argument in unknown:
        name = argument.partition("=")[0]
        if not name.startswith("-"):
            continue
        close = difflib.get_close_matches(name, own, n=1, cutoff=0.7)
        if not close and command in _TAKE_KEYS:
            from moe_replay.recipe.keys import nearest_keys

            close = [f"--{key}" for key in nearest_keys(name.lstrip("-"))]
        elif "." in name:
            lines.append(
                f"  {name}: only {', '.join(_TAKE_KEYS[:-1])} and {_TAKE_KEYS[-1]} take recipe keys"
            )
            continue
        if close:
            lines.append(f"  {name}: did you mean {' or '.join(close)}?")
    if command in _TAKE_KEYS:
        lines.append("`moe-replay train --help` lists every key of a recipe")
    parser.error("\n".join(lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-replay",
        description="GRPO for mixture-of-experts models, trained through the experts that the rollout used.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moe-replay {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (purpose, description, add_options) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=purpose,
            description=description,
            add_help=name != "train",
            allow_abbrev=False,
        )
        if name in _TAKE_KEYS:
            command.add_argument("recipe", metavar="RECIPE", help="TOML file")
            command.add_argument(
                "--section.key",
                metavar="VALUE",
                dest="overrides",
                help="value of a recipe key; any number of them",
            )
        add_options(command)
        command.add_argument(
            "--traceback", action="store_true", help="show where in the program an error arose"
        )
        command.set_defaults(parser=command)
    return parser


def _train(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, show the resolved recipe and stop"
    )
    command.add_argument(
        "--elsewhere",
        action="store_true",
        help="with --dry-run: for a run on another machine with GPUs; packages, servers and the output directory are "
        "left to that one and listed",
    )
    command.add_argument(
        "--restart",
        action="store_true",
        help="discard what the output directory holds and start from the beginning",
    )
    command.add_argument(
        "--allow-changed",
        metavar="KEY",
        action="append",
        default=[],
        help="resume although this key, or what it points to, is not what the run was trained with; may be repeated",
    )
    command.add_argument(
        "-h", "--help", action=_HelpWithKeys, help="show this and every key of a recipe"
    )


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _doctor(command: argparse.ArgumentParser) -> None:
    _json(command)
    command.add_argument(
        "--plan",
        metavar="NAME=VALUE",
        nargs="+",
        help="compute what the recipe needs of a machine, from config.json alone: gpus=8x80GB or nodes=2x8x80GB, and "
        "servers=8x80GB for rollout servers; further names are rates",
    )


def _rollout(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", metavar="FOLDER", required=True, help="where to write")
    command.add_argument("--num-prompts", metavar="N", type=int, help="prompts; those of a step")
    command.add_argument(
        "--first-prompt",
        metavar="N",
        type=int,
        default=0,
        help="position of the first of them among the training prompts",
    )
    command.add_argument(
        "--policy-version",
        metavar="N",
        type=int,
        default=0,
        help="weight pushes after which model.path was written, such as the export of a run after N steps",
    )


def _record(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--from",
        metavar="ROLLOUT",
        required=True,
        dest="source",
        help="what moe-replay rollout wrote",
    )
    command.add_argument("--output", metavar="FOLDER", required=True, help="where to write")
    command.add_argument(
        "--by",
        choices=("engine", "trainer"),
        default="engine",
        help="whose routes: rollout.engine's",
    )


def _report(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", metavar="RUN", nargs="+", help="run.output_dir of a run")
    command.add_argument(
        "--out", metavar="FILE.html", help="where to write; by default report.html in the first RUN"
    )


def _compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("first", metavar="A", help="trace file")
    command.add_argument("second", metavar="B", help="trace file")
    _json(command)


def _inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="trace file")
    _json(command)


_COMMANDS: Mapping[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "train": (
        "train by a recipe",
        "Train by a recipe. A run whose output directory holds checkpoints is resumed.",
        _train,
    ),
    "doctor": (
        "tell whether a recipe can run here, and what it replays",
        "Examine a recipe without its weights: what is on, what it covers, what each rank holds, the versions "
        "that were found, and what is refused and why. Exits with 2 when the recipe cannot run here. With --plan: what "
        "it needs of another machine; exits with 2 when it does not fit.",
        _doctor,
    ),
    "rollout": (
        "sample by a recipe and keep the completions with their routes",
        "Sample completions of a recipe's training prompts by its engine, and write them with their traces. "
        "A recipe with rollout.engine = 'files' trains from them. Started again, it goes on with what a kill has left; under "
        "torchrun every rank samples its share.",
        _rollout,
    ),
    "record": (
        "record the routes that another engine or number format takes for the same tokens",
        "Run the tokens of a rollout through a recipe's engine and write the routes that it takes for them, so "
        "that compare can tell how two engines, or two number formats, route the same tokens.",
        _record,
    ),
    "report": (
        "write a page of one or more runs, to look at in a browser",
        "Write one HTML file, which loads nothing from anywhere: how each run went and whether its "
        "routes were its own, reward, engine gap, flips, agreement by sample, time, memory and samples. "
        "Several runs share each figure. Runs that go on, or were killed, are shown as far as they came.",
        _report,
    ),
    "compare": (
        "compare two recordings of the same tokens",
        "Compare two trace files that were recorded over the same tokens: how often the experts differ, in "
        "which layers, positions, sequences and tokens. A folder stands for the trace file in it.",
        _compare,
    ),
    "inspect": (
        "show what a trace file holds",
        "Check every byte of a trace file and show its traces, sizes, origins and the load of the experts.",
        _inspect,
    ),
    "diagnose": (
        "say where the gap between an engine and a trainer comes from",
        "Sample with an engine, or read what was sampled, run the same tokens through a trainer, live and under "
        "replay of the engine's routes, and say what the gap is made of: misaligned routes or log-probabilities, "
        "routing, precision or kernels.",
        diagnose_options.add_options,
    ),
    "serve": (
        "serve a model to trainers",
        "Serve a checkpoint to trainers whose recipe has rollout.engine = 'vllm-server': routes are recorded, "
        "and weights are taken over HTTP. Listens on loopback; elsewhere a bearer token is required.",
        serve_command.add_options,
    ),
}
"""Command -> one line for the list of commands, its description, and what adds its options."""


class _HelpWithKeys(argparse.Action):
    """Print the help, then every key of a recipe; pydantic is loaded only for that."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from moe_replay.recipe.keys import recipe_keys

        print(parser.format_help())
        print("keys of a recipe, each also an option --section.key VALUE:")
        for key in recipe_keys():
            print(f"  {key.path} (default: {key.default})")
            if key.choices:
                several = "any of" if key.is_list else "one of"
                print(f"      {several}: {', '.join(key.choices)}")
            elif key.is_list:
                print("      a list; a single value needs no brackets")
            print(textwrap.indent(textwrap.fill(key.text.replace("``", ""), WIDTH - 6), " " * 6))
        parser.exit()
