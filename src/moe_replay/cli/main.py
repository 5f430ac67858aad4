"""The `moe-replay` command: subcommands, overrides, and readable errors.

In: arguments. Out: an exit code: 0 done, 2 a mistake that the message explains, 75 a run or server
that was stopped and continues when it is started again, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence

from moe_replay import __version__
from moe_replay.cli.options import WIDTH, Overrides, read_options
from moe_replay.cli.stages import say
from moe_replay.errors import MoeReplayError
from moe_replay.recipe.bearer import without_secrets


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options, overrides = read_options(sys.argv[1:] if argv is None else argv)
    try:
        return _RUN[options.command](options, overrides)
    except MoeReplayError as error:
        if options.traceback:
            traceback.print_exc()
        print(_error_block(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _run_serve(options: argparse.Namespace, _: Overrides) -> int:
    from moe_replay.cli.serve import run_serve

    return run_serve(options)


def _run_train(options: argparse.Namespace, overrides: Overrides) -> int:
    say(f"moe-replay {__version__}: reading {options.recipe} ...")
    from moe_replay.cli.train import run_train

    return run_train(
        options.recipe,
        overrides,
        dry_run=options.dry_run,
        restart=options.restart,
        allow_changed=options.allow_changed,
    )


def _run_rollout(options: argparse.Namespace, overrides: Overrides) -> int:
    say(f"moe-replay {__version__}: reading {options.recipe} ...")
    from moe_replay.cli.rollout import run_rollout

    return run_rollout(
        options.recipe,
        overrides,
        options.output,
        num_prompts=options.num_prompts,
        first_prompt=options.first_prompt,
        policy_version=options.policy_version,
    )


def _run_record(options: argparse.Namespace, overrides: Overrides) -> int:
    say(f"moe-replay {__version__}: reading {options.recipe} ...")
    from moe_replay.cli.record import run_record

    return run_record(options.recipe, overrides, options.source, options.output, by=options.by)


def _run_doctor(options: argparse.Namespace, overrides: Overrides) -> int:
    from moe_replay.cli.doctor import run_doctor

    return run_doctor(options.recipe, overrides, as_json=options.json)


def _run_compare(options: argparse.Namespace, _: Overrides) -> int:
    from moe_replay.cli.compare import run_compare

    return run_compare(options.first, options.second, as_json=options.json)


def _run_inspect(options: argparse.Namespace, _: Overrides) -> int:
    from moe_replay.cli.inspect_traces import run_inspect

    return run_inspect(options.file, as_json=options.json)


_RUN: dict[str, Callable[[argparse.Namespace, Overrides], int]] = {
    "train": _run_train,
    "doctor": _run_doctor,
    "rollout": _run_rollout,
    "record": _run_record,
    "compare": _run_compare,
    "inspect": _run_inspect,
    "serve": _run_serve,
}


def _error_block(error: MoeReplayError) -> str:
    """Return an error as one block: its kind and its wrapped message."""
    kinds = (_KINDS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _KINDS)
    lines = [f"moe-replay: {next(kinds, 'the run stopped')}"]
    for line in without_secrets(str(error)).splitlines():
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
    "UnsupportedError": "the recipe asks for something that is not supported",
    "RewardError": "a reward function failed",
    "EngineError": "the inference engine failed",
    "DivergedError": "training has diverged",
    "CheckpointError": "a checkpoint cannot be used",
    "CodecError": "a trace file cannot be used",
    "TokenMismatchError": "routes belong to other tokens",
    "TraceError": "routes are invalid",
}


if __name__ == "__main__":
    sys.exit(main())
