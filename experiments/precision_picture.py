"""The figure of the four cells: k3 of twin, live and replayed, with intervals, on a log scale.

In: rows of precision.jsonl. Out: docs/assets/precisions.svg.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from picture import STYLE, box, text

OUT = Path(__file__).resolve().parent.parent / "docs" / "assets" / "precisions.svg"
LOWEST, HIGHEST = 1e-5, 1e-2
LEFT, RIGHT, TOP, LINE, WIDTH = 250, 40, 64, 22, 760
KINDS = (("dense twin", "none"), ("MoE, live", "more"), ("MoE, replayed", "same"))


def at(value: float) -> float:
    """Return the x of a value."""
    share = math.log10(value / LOWEST) / math.log10(HIGHEST / LOWEST)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def picture_of(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the figure as SVG; cells without a bfloat16 side have no gap to draw."""
    cells = [(e, t) for e in ("bfloat16", "float32") for t in ("bfloat16", "float32")][:3]
    parts = [
        text(20, 26, "k3 between vLLM and Megatron, with 95 % intervals; log scale", "head"),
        *(_tick(10.0**power, len(cells)) for power in range(-5, -1)),
    ]
    y = TOP + 20
    for engine, trainer in cells:
        parts.append(text(20, y + LINE, f"vLLM {engine}", ""))
        parts.append(text(20, y + 2 * LINE, f"Megatron {trainer}", ""))
        moe, twin = rows[f"moe {engine} {trainer}"], rows[f"twin {engine} {trainer}"]
        gaps = (twin["live"]["k3"], moe["live"]["k3"], moe["replayed"]["k3"])
        for (name, kind), gap in zip(KINDS, gaps, strict=True):
            y += LINE
            parts.append(_bar(name, kind, gap, y))
        y += LINE
    label = "k3 of the dense twin, of the MoE live and replayed, in three pairs of number formats"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 20}" role="img" '
        f'aria-label="{label}"><style>{STYLE}.end {{ text-anchor: end }} '
        ".middle { text-anchor: middle }</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _tick(value: float, num_cells: int) -> str:
    height = num_cells * (len(KINDS) + 1) * LINE
    line = box(at(value), TOP, 1, height, "none")
    return text(at(value), TOP - 8, f"{value:.0e}".replace("e-0", "e-"), "small dim middle") + line


def _bar(name: str, kind: str, gap: list[float], y: float) -> str:
    value, low, high = gap
    interval = box(at(low), y - 6, max(at(high) - at(low), 2), 4, "dim")
    return (
        text(LEFT - 10, y, name, "small end")
        + box(LEFT, y - 11, at(value) - LEFT, 14, kind)
        + interval
        + text(at(high) + 6, y, f"{value:.1e}".replace("e-0", "e-"), "small")
    )
