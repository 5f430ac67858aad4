"""The report of `moe-replay doctor` as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_MARKS = {"ok": "[green]ok[/]", "refused": "[bold red]refused[/]", "not applicable": "[dim]-[/]"}


def show(report: Mapping[str, Any]) -> None:
    """Print the report."""
    console = Console(highlight=False)
    console.print(_pairs("settings", report["settings"].items()))
    console.print(_pairs("pass", [(row["pass"], row["routes"]) for row in report["passes"]]))
    if report["live_rows"]:
        reasons = [(row["reason"], row["why"]) for row in report["live_rows"]]
        console.print(_pairs("live rows", reasons))
    if report["model"]:
        console.print(_pairs("model", _model_lines(report["model"])))
    if report["layout"]:
        console.print(_pairs("layout", _layout_lines(report["layout"])))
    if report["routes"]:
        console.print(_pairs("routes", _route_lines(report["routes"])))
    console.print(_versions(report["versions"]))
    if report["options"]:
        console.print(_options(report["options"]))
    for note in report["notes"]:
        console.print(escape(note))
    if report["can_run"]:
        console.print("[green]this recipe can run here[/]")
        return
    console.print("[bold red]this recipe cannot run here[/]")
    for problem in report["problems"]:
        console.print(f"  - {escape(problem)}")


def _pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title, "", box=box.SIMPLE)
    for name, text in rows:
        table.add_row(name, escape(text))
    return table


def _model_lines(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("checkpoint", f"{model['path']}, {model['family']}"),
        ("decoder layers", str(model["num_layers"])),
        ("with experts", ranges(model["moe_layers"])),
        ("dense", ranges(model["dense_layers"])),
        (
            "prediction layers",
            f"{model['num_mtp_layers']}, not trained" if model["num_mtp_layers"] else "none",
        ),
        ("experts", f"top-{model['topk']} of {model['num_experts']}"),
    ]


def _layout_lines(layout: Mapping[str, Any]) -> list[tuple[str, str]]:
    stages = layout["stages"]
    lines = [
        ("parallel", layout["description"]),
        ("ranks", f"a multiple of {layout['multiple_of']}"),
        (
            f"{layout['num_ranks']} of them",
            f"{layout['num_replicas']} replica(s) of {layout['ranks_per_replica']}; a copy of all experts on "
            f"{layout['ranks_per_copy_of_experts']}",
        ),
    ]
    if len(stages) > 1:
        lines += [
            (
                f"stage {index}",
                f"layers {ranges(stage['layers'])}; experts in {ranges(stage['moe_layers'])}",
            )
            for index, stage in enumerate(stages)
        ]
    own = "Transformer Engine's" if layout["transformer_engine"] else "Megatron's local"
    return [*lines, ("here", f"{layout['device']}, {own} layers")]


def _route_lines(routes: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            "a token",
            f"{routes['bytes_per_token']} bytes, {routes['id_bytes']} for each expert id",
        ),
        ("a rank's microbatch", f"at most {size(routes['max_bytes_per_rank_and_microbatch'])}"),
        ("a rank's step", f"at most {size(routes['max_bytes_per_rank_and_step'])}"),
    ]


def _versions(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("version", "found", "supported", "", box=box.SIMPLE)
    for row in rows:
        mark = _MARKS["ok" if row["is_ok"] else "refused"]
        table.add_row(row["name"], row["found"] or "none", row["supported"], mark)
    return table


def _options(rows: Sequence[Mapping[str, str]]) -> Table:
    table = Table("refused with replay", "here", "why", box=box.SIMPLE)
    for row in rows:
        table.add_row(row["option"], _MARKS[row["state"]], escape(row["why"]))
    return table


def ranges(layers: Sequence[int]) -> str:
    """Return increasing integers as ranges: ``0-2, 5`` for 0, 1, 2, 5."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    text = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    return ", ".join(text) or "none"


def size(num_bytes: int) -> str:
    """Return a size in readable units: ``1.5 MiB``."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"
