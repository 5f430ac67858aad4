"""`moe-replay compare`: how often and where two recordings of the same tokens differ in experts."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from moe_replay.cli.trace_files import open_traces
from moe_replay.errors import CodecError, TokenMismatchError, TraceError
from moe_replay.routing import RoutingTrace, TraceComparison, TraceFile, compare_traces

_NUM_TOKENS_SHOWN = 5
_NUM_RANGES = 8
_BAR_WIDTH = 24
_RECORD = (
    "Engines that sample by themselves write different tokens; to see how another engine or number format routes the "
    "tokens of a rollout, use `moe-replay record RECIPE --from ROLLOUT --output FOLDER`, and compare with its output"
)


def run_compare(options: argparse.Namespace) -> int:
    """Compare the traces with equal names in two files and print the result.

    Raises:
        TraceError: the files hold traces with other names, tokens or models, or cannot be read.
    """
    files = open_traces(options.first), open_traces(options.second)
    names = _shared_names(*files)
    reading: list[str] = []
    try:
        found = compare_traces(_pairs(*files, names, reading))
    except CodecError:
        raise  # names its file and trace
    except TraceError as error:
        advice = f". {_RECORD}" if isinstance(error, TokenMismatchError) else ""
        raise type(error)(
            f"trace {reading[-1]!r} of {options.first} and {options.second}: {error}{advice}"
        ) from error
    if options.json:
        print(json.dumps(comparison_report(found, names), indent=2))
    else:
        _show(found, names)
    return 0


def comparison_report(found: TraceComparison, names: tuple[str, ...]) -> dict[str, Any]:
    """Return a comparison as plain JSON: arrays as lists, nan as null."""
    arrays = {
        name: [_plain(value) for value in np.asarray(getattr(found, name)).tolist()]
        for name in (
            *("layers", "flip_frac_by_layer", "slot_overlap_by_layer"),
            *("flip_frac_by_position", "num_tokens_by_position"),
            *("token_ids", "flip_frac_by_token_id", "num_tokens_by_token_id"),
            "num_tokens_by_flips",
        )
    }
    single = {
        name: _plain(getattr(found, name))
        for name in (
            *("num_tokens", "num_skipped", "flip_frac", "slot_overlap", "mean_flips_per_token"),
            *("tokens_with_flip_frac", "tokens_with_flip_if_independent_frac"),
        )
    }
    by_sequence = dict(zip(names, map(_plain, found.flip_frac_by_sequence.tolist()), strict=True))
    return {**single, "flip_frac_by_sequence": by_sequence, **arrays}


def _shared_names(first: TraceFile, second: TraceFile) -> tuple[str, ...]:
    ours, theirs = set(first.names), set(second.names)
    if not ours or ours != theirs:
        only = [sorted(ours - theirs)[:4], sorted(theirs - ours)[:4]]
        raise TraceError(
            f"{first.path} holds {len(ours)} traces and {second.path} {len(theirs)}; only in the first: {only[0]}, only in "
            f"the second: {only[1]}; expected the same names in both, and at least one: record both over the same samples. {_RECORD}"
        )
    return first.names


def _pairs(
    first: TraceFile, second: TraceFile, names: tuple[str, ...], reading: list[str]
) -> Iterator[tuple[RoutingTrace, RoutingTrace]]:
    for name in names:
        reading.append(name)
        yield first.read(name), second.read(name)


def _plain(value: float) -> float | None:
    return None if isinstance(value, float) and math.isnan(value) else value


def _show(found: TraceComparison, names: tuple[str, ...]) -> None:
    console = Console(highlight=False)
    console.print(
        f"{found.num_tokens} tokens of {len(names)} sequences in {len(found.layers)} layers; "
        f"{found.num_skipped} rows are missing in one of them"
    )
    console.print(totals_table(found))
    console.print(layer_table(found))
    console.print(position_table(found))
    console.print(worst_table(found, names))


def totals_table(found: TraceComparison) -> Table:
    """Return the shares over all tokens and layers."""
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_row("flips, of (token, layer) pairs", percent(found.flip_frac))
    table.add_row("expert slots in common", percent(found.slot_overlap))
    table.add_row("tokens with a flip in some layer", percent(found.tokens_with_flip_frac))
    table.add_row(
        "the same, if layers flipped independently",
        percent(found.tokens_with_flip_if_independent_frac),
    )
    table.add_row("layers that flip, per token", f"{found.mean_flips_per_token:.3f}")
    return table


def layer_table(found: TraceComparison) -> Table:
    """Return flips and common slots by layer."""
    table = Table("layer", "flips", "", "slots in common", box=box.SIMPLE)
    rows = zip(found.layers, found.flip_frac_by_layer, found.slot_overlap_by_layer, strict=True)
    for layer, flips, overlap in rows:
        table.add_row(str(layer), percent(flips), _bar(flips), percent(overlap))
    return table


def position_table(found: TraceComparison) -> Table:
    """Return flips over ranges of positions, weighted by tokens."""
    table = Table("positions", "flips", "", "tokens", box=box.SIMPLE)
    positions = np.arange(len(found.num_tokens_by_position))
    for part in np.array_split(positions, min(_NUM_RANGES, len(positions))):
        counts = found.num_tokens_by_position[part]
        if not counts.sum():
            continue
        flips = np.average(np.nan_to_num(found.flip_frac_by_position[part]), weights=counts)
        table.add_row(
            f"{part[0]} to {part[-1]}", percent(flips), _bar(flips), str(int(counts.sum()))
        )
    return table


def worst_table(found: TraceComparison, names: tuple[str, ...]) -> Table:
    """Return the sequences and token ids with the most flips."""
    table = Table("most flips in", "", "flips", "tokens", box=box.SIMPLE)
    held = np.flatnonzero(np.isfinite(found.flip_frac_by_sequence))
    order = held[np.argsort(-found.flip_frac_by_sequence[held], kind="stable")]
    for index in order[:_NUM_TOKENS_SHOWN]:
        table.add_row("sequence", names[index], percent(found.flip_frac_by_sequence[index]), "")
    flips = found.flip_frac_by_token_id * found.num_tokens_by_token_id
    for index in np.argsort(-flips, kind="stable")[:_NUM_TOKENS_SHOWN]:
        table.add_row(
            "token id",
            str(found.token_ids[index]),
            percent(found.flip_frac_by_token_id[index]),
            str(found.num_tokens_by_token_id[index]),
        )
    return table


def percent(share: float) -> str:
    """Return a share in percent; nan is a dash."""
    return "-" if math.isnan(share) else f"{100 * share:.2f} %"


def _bar(share: float) -> str:
    return "" if math.isnan(share) else "#" * round(_BAR_WIDTH * share)
