"""The `moe-replay` command: subcommands, overrides, and errors as a person wants to read them.

In: arguments. Out: an exit code: 0 done, 2 a mistake that the message explains, 130 interrupted.
Called by: the installed command, and `torchrun -m moe_replay.cli.main`.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any

from moe_replay import __version__
from moe_replay.cli import serve as serve_command
from moe_replay.errors import MoeReplayError

_WIDTH = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
        if overrides and options.command not in ("train", "rollout", "doctor"):
            parser.error(
                f"unrecognized argument --{overrides[0][0]}: only train, rollout and doctor take recipe keys"
            )
    except BrokenPipeError:
        # Whoever read the help has seen enough; without this the interpreter complains once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    try:
        return options.run(options, overrides)
    except MoeReplayError as error:
        if options.traceback:
            traceback.print_exc()
        print(_error_block(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ninterrupted; the same command resumes the run from its last checkpoint",
            file=sys.stderr,
        )
        return 130


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Take ``--section.key value`` and ``--section.key=value`` out of the arguments; None stands for no value.

    Example:
        >>> split_overrides(["train", "--grpo.beta", "-0.1", "r.toml"])
        (['train', 'r.toml'], [('grpo.beta', '-0.1')])
    """
    arguments: list[str] = []
    overrides: list[tuple[str, str | None]] = []
    rest = iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or "." not in name:
            arguments.append(argument)
        elif equals:
            overrides.append((name[2:], value))
        else:
            overrides.append((name[2:], next(rest, None)))
    return arguments, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-replay",
        description="GRPO for mixture-of-experts models, trained through the experts that the rollout used.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moe-replay {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train by a recipe",
        description="Train by a recipe. A run whose output directory holds checkpoints is resumed.",
        usage="moe-replay train RECIPE [--section.key VALUE ...] [--dry-run] [--restart] [--traceback]",
        add_help=False,
        allow_abbrev=False,
    )
    train.add_argument("recipe", metavar="RECIPE", help="TOML file")
    train.add_argument(
        "--dry-run", action="store_true", help="check everything, show the resolved recipe and stop"
    )
    train.add_argument(
        "--restart",
        action="store_true",
        help="discard what the output directory holds and start anew",
    )
    train.add_argument(
        "-h", "--help", action=_HelpWithKeys, help="show this and every key of a recipe"
    )
    train.set_defaults(run=_run_train)
    rollout = _add_rollout(commands)
    doctor = commands.add_parser(
        "doctor",
        help="tell whether a recipe can run here, and what it replays",
        description="Examine a recipe without its weights: what is on, what it covers, what each rank holds, the versions "
        "that were found, and what is refused and why. Exits with 2 when the recipe cannot run here.",
        usage="moe-replay doctor RECIPE [--section.key VALUE ...] [--json] [--traceback]",
        allow_abbrev=False,
    )
    doctor.add_argument("recipe", metavar="RECIPE", help="TOML file")
    doctor.add_argument("--json", action="store_true", help="print JSON in place of tables")
    doctor.set_defaults(run=_run_doctor)
    compare, inspect = _add_trace_commands(commands)
    serve = commands.add_parser(
        "serve",
        help="serve a model to trainers",
        description="Serve a checkpoint to trainers whose recipe has rollout.engine = 'vllm-server': routes are recorded, "
        "and weights are taken over HTTP. Listens on loopback; elsewhere a bearer token is required.",
        allow_abbrev=False,
    )
    serve_command.add_options(serve)
    serve.set_defaults(run=_run_serve)
    for command in (train, rollout, doctor, compare, inspect, serve):
        command.add_argument(
            "--traceback", action="store_true", help="show where in the program an error arose"
        )
    return parser


def _add_rollout(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    rollout = commands.add_parser(
        "rollout",
        help="sample by a recipe and keep the completions with their routes",
        description="Sample completions of a recipe's first training prompts by its engine, and write them with their traces. "
        "A recipe with rollout.engine = 'files' trains from them.",
        usage="moe-replay rollout RECIPE --output FOLDER [--num-prompts N] [--section.key VALUE ...] [--traceback]",
        allow_abbrev=False,
    )
    rollout.add_argument("recipe", metavar="RECIPE", help="TOML file")
    rollout.add_argument("--output", metavar="FOLDER", required=True, help="where to write")
    rollout.add_argument("--num-prompts", metavar="N", type=int, help="prompts; those of a step")
    rollout.set_defaults(run=_run_rollout)
    return rollout


def _add_trace_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    compare = commands.add_parser(
        "compare",
        help="compare two recordings of the same tokens",
        description="Compare two trace files that were recorded over the same samples: how often the experts differ, in "
        "which layers, positions, sequences and tokens.",
        allow_abbrev=False,
    )
    compare.add_argument("first", metavar="A", help="trace file")
    compare.add_argument("second", metavar="B", help="trace file")
    compare.add_argument("--json", action="store_true", help="print JSON in place of tables")
    compare.set_defaults(run=_run_compare)
    inspect = commands.add_parser(
        "inspect",
        help="show what a trace file holds",
        description="Check every byte of a trace file and show its traces, sizes, origins and the load of the experts.",
        allow_abbrev=False,
    )
    inspect.add_argument("file", metavar="FILE", help="trace file")
    inspect.add_argument("--json", action="store_true", help="print JSON in place of tables")
    inspect.set_defaults(run=_run_inspect)
    return compare, inspect


class _HelpWithKeys(argparse.Action):
    """Print the help, then every key of a recipe; pydantic is loaded only for that."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from moe_replay.grpo.recipe_file import recipe_keys

        print(parser.format_help())
        print("keys of a recipe, each also an option --section.key VALUE:")
        for key in recipe_keys():
            print(f"  {key.path} (default: {key.default})")
            print(textwrap.indent(textwrap.fill(key.text.replace("``", ""), _WIDTH - 6), " " * 6))
        parser.exit()


def _run_serve(options: argparse.Namespace, overrides: Sequence[tuple[str, str | None]]) -> int:
    return serve_command.run_serve(options)


def _run_train(options: argparse.Namespace, overrides: Sequence[tuple[str, str | None]]) -> int:
    from moe_replay.cli.train import run_train

    return run_train(options.recipe, overrides, dry_run=options.dry_run, restart=options.restart)


def _run_rollout(options: argparse.Namespace, overrides: Sequence[tuple[str, str | None]]) -> int:
    from moe_replay.cli.rollout import run_rollout

    return run_rollout(options.recipe, overrides, options.output, num_prompts=options.num_prompts)


def _run_doctor(options: argparse.Namespace, overrides: Sequence[tuple[str, str | None]]) -> int:
    from moe_replay.cli.doctor import run_doctor

    return run_doctor(options.recipe, overrides, as_json=options.json)


def _run_compare(options: argparse.Namespace, _: Sequence[tuple[str, str | None]]) -> int:
    from moe_replay.cli.compare import run_compare

    return run_compare(options.first, options.second, as_json=options.json)


def _run_inspect(options: argparse.Namespace, _: Sequence[tuple[str, str | None]]) -> int:
    from moe_replay.cli.inspect_traces import run_inspect

    return run_inspect(options.file, as_json=options.json)


def _error_block(error: MoeReplayError) -> str:
    """Return an error as one block: its kind, its message wrapped, and what caused it."""
    lines = [f"moe-replay: {_KINDS.get(type(error).__name__, 'the run stopped')}"]
    for line in str(error).splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        lines.append(
            textwrap.fill(
                line.strip(),
                _WIDTH,
                initial_indent=indent,
                subsequent_indent=f"{indent}  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    return "\n".join(lines)


_KINDS = {
    "RecipeError": "the recipe, or something that it points to, is wrong",
    "UnsupportedError": "the recipe asks for something that is not supported",
    "RewardError": "a reward function failed",
    "EngineError": "the inference engine failed",
    "CheckpointError": "a checkpoint cannot be used",
    "CodecError": "a trace file cannot be used",
    "TokenMismatchError": "routes belong to other tokens",
    "TraceError": "routes are not what they should be",
}


if __name__ == "__main__":
    sys.exit(main())
