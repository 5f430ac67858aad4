"""A diagnosis on a terminal of 80 columns, and as JSON."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from moe_replay.cli.compare import (
    comparison_report,
    layer_table,
    percent,
    position_table,
    totals_table,
    worst_table,
)
from moe_replay.diagnose.diagnosis import Diagnosis, Gap
from moe_replay.diagnose.statistics import Estimate, bound_of_unseen
from moe_replay.diagnose.verdict import Cause
from moe_replay.routing.guard import Fault, Finding, with_names

_WIDTH = 78
_MOST_LAYERS = 16


def show(found: Diagnosis) -> None:
    """Print a diagnosis: the verdict first, then the figures that it rests on."""
    console = Console(highlight=False)
    setting = found.setting
    _say(
        console,
        f"{found.num_sequences} samples, {found.num_tokens} sampled tokens; {setting.engine} in {setting.engine_dtype}, "
        f"{setting.trainer} in {setting.trainer_dtype}",
    )
    _verdict(console, found)
    if found.live is not None:
        console.print(_gaps(found))
        for note in _gap_notes(found):
            _say(console, note)
    if found.flips is not None:
        console.print("\nThe engine's experts beside the trainer's own choice", style="bold")
        console.print(totals_table(found.flips))
        if found.margins is not None:
            _say(console, _margin_words(found))
        if len(found.flips.layers) <= _MOST_LAYERS:
            console.print(layer_table(found.flips))
        else:
            _say(console, _layer_words(found))
        console.print(position_table(found.flips))
        console.print(worst_table(found.flips, found.compared))
    if found.largest and found.largest[0][1] > 0:
        shown = ", ".join(f"{name} {k3:.2g}" for name, k3 in found.largest)
        _say(console, f"Largest mean k3 of a sample: {shown}.")


def _say(console: Console, text: str, *, indent: str = "") -> None:
    console.print(
        textwrap.fill(
            text,
            _WIDTH,
            initial_indent=indent,
            subsequent_indent=" " * len(indent),
            break_long_words=False,
            break_on_hyphens=False,
        ),
        markup=False,
    )


def _verdict(console: Console, found: Diagnosis) -> None:
    conclusion = found.conclusion
    console.print(f"\nVerdict: {conclusion.cause.value}", style="bold")
    _say(console, conclusion.text, indent="  ")
    for cause in conclusion.causes:
        _say(console, cause, indent="  - ")
    if conclusion.defects:
        _say(
            console, f"Looks like {', '.join(conclusion.defects)} of docs/defects.md.", indent="  "
        )
    for step in conclusion.next_steps:
        _say(console, f"Next: {step}", indent="  ")
    for limit in conclusion.limits:
        _say(console, f"Not covered: {limit}", indent="  ")
    if found.routes is not None and conclusion.cause is not Cause.MISALIGNMENT:
        rows = found.rows
        _say(
            console,
            f"Routes: {rows.compared} of {rows.compared + rows.unrecorded} rows compared. {found.routes.summary(found.names)}",
            indent="  ",
        )


def _gaps(found: Diagnosis) -> Table:
    columns = {"live": found.live, "replayed": found.replayed}
    if found.twin is not None:
        columns["dense twin"] = found.twin.live
    held = {name: gap for name, gap in columns.items() if gap is not None}
    table = Table("gap", *held, box=box.SIMPLE)
    every = [_gap_cells(gap) for gap in held.values()]
    for row in every[0]:
        table.add_row(row, *(cells.get(row, "-") for cells in every))
    return table


def _gap_cells(gap: Gap) -> dict[str, str]:
    cells = {"tokens": str(gap.num_tokens), "k1": _cell(gap.k1), "k3": _cell(gap.k3)}
    if gap.kl is not None:
        cells["KL, exact"] = _cell(gap.kl)
    for tau, share in gap.beyond.items():
        unseen = f"none, < {100 * bound_of_unseen(gap.num_tokens):.2g} %"
        cells[f"F({tau:g})"] = unseen if share.value == 0 else _share(share)
    return cells


def _gap_notes(found: Diagnosis) -> list[str]:
    notes = [
        f'In brackets: 95 % bootstrap intervals over samples, seed {found.seed}. "none, <" is 3/n, the 95 % bound where '
        "nothing was seen."
    ]
    if found.removed is not None and found.conclusion.cause is not Cause.NONE:
        kl = f", {_share(found.removed_kl)} of the exact KL" if found.removed_kl is not None else ""
        notes.append(f"Replay removes {_share(found.removed)} of k3{kl}, paired by token.")
    if found.setting.no_kl:
        notes.append(f"No exact KL: {found.setting.no_kl}.")
    if found.engine_again is not None:
        notes.append(
            "The engine's side of the exact KL is one pass of its model over the finished sample; from decoding it "
            f"differs by k3 = {_cell(found.engine_again)}."
        )
    if found.twin is not None and found.twin.live is not None:
        best = found.replayed or found.live
        assert best is not None
        floor = found.twin.live.k3.value
        ratio = best.k3.value / floor if floor else math.inf
        notes.append(
            f"k3 {'under replay' if found.replayed else ''} is {ratio:.2g} x the dense twin's."
        )
    return notes


def _margin_words(found: Diagnosis) -> str:
    margins = found.margins
    assert margins is not None
    if math.isnan(margins.median_flipped):
        return f"Runners-up: no flip; the median margin is {margins.median_kept:.2g} of the router's scores."
    return (
        f"Runners-up: where routes flip, the trainer's last expert scored {margins.median_flipped:.2g} above the first one left "
        f"out, elsewhere {margins.median_kept:.2g} (medians, router's own scores); {margins.near_ties_frac:.0%} of the flips are "
        "among the closest tenth of all choices."
    )


def _layer_words(found: Diagnosis) -> str:
    flips = found.flips
    assert flips is not None
    shares = flips.flip_frac_by_layer
    order = np.argsort(-np.nan_to_num(shares), kind="stable")[:8]
    shown = ", ".join(f"{flips.layers[at]} ({percent(float(shares[at]))})" for at in order)
    return f"Layers with the most flips, of {len(flips.layers)}: {shown}. --json lists all."


def _cell(estimate: Estimate) -> str:
    if not estimate.has_interval:
        return _number(estimate.value)
    return f"{_number(estimate.value)} [{_number(estimate.low)}, {_number(estimate.high)}]"


def _number(value: float) -> str:
    """Return a figure in two digits, such as ``4.9e-4``."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if int(exponent) else mantissa


def _share(estimate: Estimate) -> str:
    if not estimate.has_interval:
        return percent(estimate.value)
    return f"{percent(estimate.value)} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def plain_report(found: Diagnosis) -> dict[str, Any]:
    """Return a diagnosis as plain JSON: arrays as lists, nan as null."""
    own = {
        field.name: getattr(found, field.name)
        for field in dataclasses.fields(found)
        if field.name not in ("flips", "routes", "twin")
    }
    report = _plain(own)
    report["flips"] = None
    if found.flips is not None:
        report["flips"] = comparison_report(found.flips, found.compared)
    report["unseen_bound"] = _plain(bound_of_unseen(found.num_tokens))
    report["schema"] = 1
    report["coverage"] = found.rows.coverage
    report["routes"] = None
    if found.routes is not None:
        report["routes"] = {
            "misaligned": [_named(each, found.names) for each in found.routes.misaligned],
            "faults": [_named(each, found.names) for each in found.routes.faults],
            "margin_nats": found.routes.margin_nats,
            "agreement": dict(
                zip(
                    (found.names[number] for number in found.routes.sample_ids.tolist()),
                    found.routes.agreement.tolist(),
                    strict=True,
                )
            ),
        }
    report["twin"] = None if found.twin is None else plain_report(found.twin)
    return report


def _named(found: Finding | Fault, names: Sequence[str]) -> dict[str, Any]:
    return {**_plain(found), "cause": with_names(found.cause, names)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
