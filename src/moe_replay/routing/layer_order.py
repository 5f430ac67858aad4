"""Whether a payload of all decoder layers is in order or shifted by one, which no count shows.

A model with one dense layer in front whose engine leaves that layer out and appends the routes of a
multi-token-prediction layer sends as many layers as the model has decoder layers, each of them one
position too early. Then a column that should belong to a dense layer holds routes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import TraceError

if TYPE_CHECKING:
    from jaxtyping import Int64, Integer

# A payload of so many rows is judged by itself, whatever others of the engine looked like: a server
# may be replaced.
_ROWS_TO_JUDGE_ALONE = 32
# Minimum share of the written rows in which the column of a dense layer holds what a router could
# have chosen.
_SHARE_OF_ROUTES = 0.5
# Minimum share of those rows that differ from one of them: tokens are routed differently, a
# constant filler is not.
_SHARE_OF_OTHERS = 0.1


def _holds_routes(num_written: int, num_possible: int, num_other: int) -> bool:
    """Whether a router wrote the column of a dense layer.

    Of the rows that the engine wrote, some hold a possible route here (different experts of the
    model), and of those some another one than the first. Example: zeros are possible in no row; 0,
    1, 2, 3 in every row never differ; 199 routes of 200 rows, of which one was not written and 150
    differ from the first, are routes.
    """
    return (
        num_other > 0
        and num_possible >= _SHARE_OF_ROUTES * num_written
        and num_other >= _SHARE_OF_OTHERS * num_possible
    )


class LayerOrder:
    """What the columns of dense layers have held in an engine's payloads; threads may share it.

    One row proves nothing, and a short payload whose tokens are all routed alike does not either:
    such rows add up, so the first rows that differ refuse the engine. A reader of single payloads
    needs none of this: each is then judged by its own rows.
    """

    def __init__(self) -> None:
        # Dense layer -> what `_holds_routes` takes, over all rows so far.
        self._counts: dict[int, Int64[np.ndarray, " 3"]] = {}
        self._firsts: dict[int, Integer[np.ndarray, " topk"]] = {}
        self._lock = threading.Lock()

    def check(
        self,
        rows: Integer[np.ndarray, "rows layers topk"],
        *,
        moe_layers: Sequence[int],
        num_experts: int,
        where: str,
    ) -> None:
        """Raise `TraceError` when a column of a dense layer holds what only a router writes."""
        num_layers = rows.shape[1]
        dense = sorted(set(range(num_layers)) - set(moe_layers))
        if not dense or not len(rows):
            return
        first = rows[:, moe_layers[0]]
        is_written = (first != first[:, :1]).any(axis=1) | (rows.shape[2] == 1)
        for layer in dense:
            routes = np.sort(rows[is_written, layer], axis=1)
            possible = (routes[:, 0] >= 0) & (routes[:, -1] < num_experts)
            possible &= (routes[:, 1:] != routes[:, :-1]).all(axis=1)
            routes, num_written = routes[possible], len(routes)
            with self._lock:
                known = self._firsts.setdefault(layer, routes[0]) if len(routes) else None
                more = (num_written, len(routes), _num_other(routes, known))
                pooled = self._counts.get(layer, 0) + np.array(more)
                self._counts[layer] = pooled
            if not len(routes):
                continue
            alone = (num_written, len(routes), _num_other(routes, routes[0]))
            for counts, is_enough in ((alone, num_written >= _ROWS_TO_JUDGE_ALONE), (pooled, True)):
                if is_enough and _holds_routes(*map(int, counts)):
                    raise TraceError(
                        f"{where}: decoder layer {layer} is dense, but the payload holds possible routes for it in "
                        f"{counts[1]} of {counts[0]} rows, which differ; its layers are not the decoder layers in order: as "
                        "many draft or multi-token-prediction layers as the model has dense ones were appended, which gives "
                        "the same count"
                    )


def _num_other(
    routes: Integer[np.ndarray, "rows topk"], first: Integer[np.ndarray, " topk"] | None
) -> int:
    return 0 if first is None else int((routes != first).any(axis=1).sum())
