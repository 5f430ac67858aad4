"""The `moe-replay` command: subcommands, overrides, and readable errors.

Its exit code: 0 done, 2 a mistake that the message explains, 75 a run or server that was stopped
and continues when it is started again, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import traceback
from collections.abc import Sequence
from importlib import import_module

from moe_replay import __version__
from moe_replay.cli.options import WIDTH, read_options
from moe_replay.cli.stages import say
from moe_replay.errors import MoeReplayError
from moe_replay.recipe.bearer import without_secrets


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = read_options(sys.argv[1:] if argv is None else argv)
    try:
        return _run(options)
    except MoeReplayError as error:
        if options.traceback:
            traceback.print_exc()
        print(_error_block(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    """Run a command, whose module is imported only now: some take seconds."""
    command = options.command
    if command in ("train", "rollout", "record"):
        say(f"moe-replay {__version__}: reading {options.recipe} ...")
    module = "inspect_traces" if command == "inspect" else command
    return getattr(import_module(f"moe_replay.cli.{module}"), f"run_{command}")(options)


def _error_block(error: MoeReplayError) -> str:
    """Return an error as one block: its kind and its wrapped message."""
    kinds = (_KINDS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _KINDS)
    lines = [f"moe-replay: {next(kinds, 'the run stopped')}"]
    notes = getattr(error, "__notes__", [])
    for line in without_secrets("\n".join([str(error), *notes])).splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        lines.append(
            textwrap.fill(
                line.strip(),
                WIDTH,
                initial_indent=indent,
                subsequent_indent=f"{indent}  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    return "\n".join(lines)


_KINDS = {
    "RecipeError": "the recipe, or something it points to, is wrong",
    "MachineError": "this machine lacks what the recipe needs",
    "UnsupportedError": "the recipe asks for something that is not supported",
    "RewardError": "a reward function failed",
    "EngineError": "the inference engine failed",
    "DivergedError": "training has diverged",
    "CheckpointError": "a checkpoint cannot be used",
    "RunDirectoryError": "a run directory cannot be read",
    "CodecError": "a trace file cannot be used",
    "TokenMismatchError": "routes belong to other tokens",
    "TraceError": "routes are invalid",
}


if __name__ == "__main__":
    sys.exit(main())
