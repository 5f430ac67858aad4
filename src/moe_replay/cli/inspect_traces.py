"""`moe-replay inspect`: what a trace file holds, after checking every byte of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_replay.cli.doctor_tables import ranges
from moe_replay.cli.trace_files import open_traces
from moe_replay.routing import RoutingTrace, TraceFile
from moe_replay.routing.slots import row_chunks

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64

_NUM_TRACES_SHOWN = 20
_NUM_EXPERTS_SHOWN = 4
_NARROW = 72


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelLoad:
    """How often each expert was chosen, over all traces of a file with the same model shape."""

    layers: tuple[int, ...]
    """Global decoder indices."""
    num_experts: int
    """Routed experts in each layer."""
    topk: int
    """Experts per token and layer."""
    counts: Int64[np.ndarray, "layers experts"]
    """``[layers, experts]``, rows that chose the expert."""

    @property
    def num_tokens(self) -> int:
        """Rows that hold routes."""
        return int(self.counts[0].sum()) // self.topk

    def by_layer(self) -> Iterator[tuple[int, Float64[np.ndarray, " experts"]]]:
        """Yield each layer with its load: 1 is even routing, ``experts / topk`` is every token."""
        even = max(1, self.num_tokens * self.topk) / self.num_experts
        yield from zip(self.layers, self.counts / even, strict=True)


def run_inspect(options: argparse.Namespace) -> int:
    """Print headers, sizes, checksums and expert loads of a trace file.

    Raises:
        CodecError: the file cannot be read, or any of its bytes was altered.
    """
    file = open_traces(options.file)
    traces, loads = _read(file)
    if options.json:
        print(json.dumps(_file_report(file, traces, loads), indent=2))
    else:
        _show(file, traces, loads)
    return 0


def _read(file: TraceFile) -> tuple[list[dict[str, Any]], list[ModelLoad]]:
    """Read, and so check, every trace; return their descriptions and the loads per model shape."""
    traces: list[dict[str, Any]] = []
    counts: dict[tuple[tuple[int, ...], int, int], np.ndarray] = {}
    for name, trace in file.items():
        traces.append(_trace_report(file, name, trace))
        kind = trace.layers, trace.num_experts, trace.topk
        counts[kind] = counts.get(kind, 0) + _load(trace)
    return traces, [
        ModelLoad(layers=layers, num_experts=experts, topk=topk, counts=total)
        for (layers, experts, topk), total in counts.items()
    ]


def _trace_report(file: TraceFile, name: str, trace: RoutingTrace) -> dict[str, Any]:
    header, extent = file.header(name), file.place(name)
    num_bytes = extent.stop - extent.start
    return {
        "name": name,
        "encoding": header.encoding.value,
        "num_rows": len(trace),
        "num_valid": trace.num_valid,
        "layers": list(trace.layers),
        "num_experts": trace.num_experts,
        "topk": trace.topk,
        "engine": trace.origin.engine,
        "engine_version": trace.origin.engine_version,
        "spans": [
            {"start": span.start, "stop": span.stop, "policy_version": span.policy_version}
            for span in trace.origin.spans
        ],
        "num_bytes": num_bytes,
        "bytes_per_token": num_bytes / len(trace) if len(trace) else None,
        "raw_bytes_per_token": header.row_bytes,
        "token_digest": f"{int(trace.token_digest[-1]):016x}" if len(trace) else None,
        "checksum": extent.checksum.hex(),
    }


def _load(trace: RoutingTrace) -> Int64[np.ndarray, "layers experts"]:
    shape = len(trace.layers), trace.num_experts
    total = np.zeros(shape[0] * shape[1], dtype=np.int64)
    first = np.arange(shape[0])[:, None] * shape[1]
    for rows in row_chunks(*trace.expert_ids.shape):
        chosen = trace.expert_ids[rows][trace.valid[rows]] + first
        total += np.bincount(chosen.reshape(-1), minlength=len(total))
    return total.reshape(shape)


def _file_report(
    file: TraceFile, traces: list[dict[str, Any]], loads: list[ModelLoad]
) -> dict[str, Any]:
    rows = sum(trace["num_rows"] for trace in traces)
    return {
        "path": str(file.path),
        "num_bytes": file.num_bytes,
        "num_traces": len(file),
        "num_rows": rows,
        "num_valid": sum(trace["num_valid"] for trace in traces),
        "bytes_per_token": file.num_bytes / rows if rows else None,
        "traces": traces,
        "loads": [
            {
                "num_experts": load.num_experts,
                "topk": load.topk,
                "num_tokens": load.num_tokens,
                "by_layer": [
                    {
                        "layer": layer,
                        "max_relative_load": float(relative.max()),
                        "hottest_experts": _hottest(relative),
                        "unused_experts": np.flatnonzero(relative == 0).tolist(),
                    }
                    for layer, relative in load.by_layer()
                ],
            }
            for load in loads
        ],
    }


def _hottest(relative: Float64[np.ndarray, " experts"]) -> list[int]:
    order = np.argsort(-relative, kind="stable")[:_NUM_EXPERTS_SHOWN]
    return [int(expert) for expert in order if relative[expert]]


def _show(file: TraceFile, traces: list[dict[str, Any]], loads: list[ModelLoad]) -> None:
    report = _file_report(file, traces, loads)
    console = Console(highlight=False)
    console.print(
        f"{_printable(str(file.path))}: {len(file)} traces, {report['num_rows']} rows, {report['num_valid']} of them valid, "
        f"{file.num_bytes} bytes, {_per_token(report['bytes_per_token'])} a token; every checksum matches"
    )
    if traces:
        console.print(_traces_table(traces, console.width))
    if len(traces) > _NUM_TRACES_SHOWN:
        console.print(f"and {len(traces) - _NUM_TRACES_SHOWN} more; --json lists all of them")
    engines = {_printable(f"{trace['engine']} {trace['engine_version']}") for trace in traces}
    if engines:
        console.print(f"recorded by {', '.join(sorted(engines))}")
    for load in loads:
        console.print(
            f"top-{load.topk} of {load.num_experts} experts in layers {ranges(load.layers)}, {load.num_tokens} tokens; "
            f"load 1 is even, {load.num_experts / load.topk:.1f} is every token"
        )
        console.print(_load_table(load))


def _traces_table(traces: list[dict[str, Any]], width: int) -> Table:
    """Return a table of the first traces; a narrow screen shows only the left columns."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "trace": lambda trace: _printable(trace["name"]),
        "rows": lambda trace: str(trace["num_rows"]),
        "valid": lambda trace: str(trace["num_valid"]),
        "policy versions": lambda trace: _spans(trace["spans"]),
        "form": lambda trace: trace["encoding"],
        "bytes a token": lambda trace: _per_token(trace["bytes_per_token"]),
        "token digest": lambda trace: (trace["token_digest"] or "-")[:8],
        "checksum": lambda trace: trace["checksum"][:8],
    }
    shown = list(columns)[: 3 if width < _NARROW else None]
    table = Table(*shown, box=box.SIMPLE)
    for trace in traces[:_NUM_TRACES_SHOWN]:
        table.add_row(*(columns[name](trace) for name in shown))
    return table


def _load_table(load: ModelLoad) -> Table:
    table = Table("layer", "hottest experts (load)", "unused experts", box=box.SIMPLE)
    for layer, relative in load.by_layer():
        hottest = ", ".join(f"{expert} ({relative[expert]:.2f})" for expert in _hottest(relative))
        table.add_row(str(layer), hottest or "-", str(int((relative == 0).sum())))
    return table


def _printable(text: str) -> str:
    """Return text from a file without control codes that a terminal would obey."""
    return escape(text if text.isprintable() else ascii(text))


def _per_token(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes:.1f}"


def _spans(spans: list[dict[str, int]]) -> str:
    if len(spans) == 1:
        return str(spans[0]["policy_version"])
    return ", ".join(f"{s['policy_version']} (rows {s['start']}:{s['stop']})" for s in spans) or "-"
