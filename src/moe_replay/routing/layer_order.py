"""Whether a payload of all decoder layers is in order or shifted by one, which no count shows.

A model with one dense layer in front whose engine leaves that layer out and appends the routes of a
multi-token-prediction layer sends as many layers as the model has decoder layers, each of them one
position too early. Then a column that should belong to a dense layer holds routes.

In: the columns of dense layers. Out: `TraceError`, or nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import TraceError

if TYPE_CHECKING:
    from jaxtyping import Integer

# A payload of so many rows is judged by itself, whatever others of the engine looked like: a server
# may be replaced.
_ROWS_TO_JUDGE_ALONE = 32
# Minimum share of the written rows in which the column of a dense layer holds what a router could
# have chosen.
_SHARE_OF_ROUTES = 0.5
# Minimum share of those rows that differ from one of them: tokens are routed differently, a
# constant filler is not.
_SHARE_OF_OTHERS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """What the column of one dense layer held, over some rows."""

    num_written: int = 0
    """Rows that the engine wrote: their first MoE layer names different experts."""
    num_possible: int = 0
    """Those in which this column holds a possible route: different experts of the model."""
    num_other: int = 0
    """Those of which the route is not the first one."""

    def __add__(self, more: _Column) -> _Column:
        return _Column(
            num_written=self.num_written + more.num_written,
            num_possible=self.num_possible + more.num_possible,
            num_other=self.num_other + more.num_other,
        )

    @property
    def holds_routes(self) -> bool:
        """Whether a router wrote this column.

        Example: zeros are possible in no row; 0, 1, 2, 3 in every row never differ; 199 routes of
        200 rows, of which one was not written and 150 differ from the first, are routes.
        """
        return (
            self.num_other > 0
            and self.num_possible >= _SHARE_OF_ROUTES * self.num_written
            and self.num_other >= _SHARE_OF_OTHERS * self.num_possible
        )


class LayerOrder:
    """What the columns of dense layers have held in an engine's payloads; threads may share it.

    One row proves nothing, and a short payload whose tokens are all routed alike does not either:
    such rows add up, so the first rows that differ refuse the engine. A reader of single payloads
    needs none of this: each is then judged by its own rows.
    """

    def __init__(self) -> None:
        self._columns: dict[int, _Column] = {}
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
            if not len(routes):
                self._add(layer, _Column(num_written=num_written))
                continue
            with self._lock:
                known = self._firsts.setdefault(layer, routes[0])
            alone, pooled = (
                _Column(
                    num_written=num_written,
                    num_possible=len(routes),
                    num_other=int((routes != reference).any(axis=1).sum()),
                )
                for reference in (routes[0], known)
            )
            pooled = self._add(layer, pooled)
            for column, is_enough in ((alone, num_written >= _ROWS_TO_JUDGE_ALONE), (pooled, True)):
                if is_enough and column.holds_routes:
                    raise TraceError(
                        f"{where}: decoder layer {layer} is dense, but the payload holds possible routes for it in "
                        f"{column.num_possible} of {column.num_written} rows, which differ; its layers are not the decoder "
                        "layers in order: as many draft or multi-token-prediction layers as the model has dense ones were "
                        "appended, which gives the same count"
                    )

    def _add(self, layer: int, more: _Column) -> _Column:
        with self._lock:
            self._columns[layer] = self._columns.get(layer, _Column()) + more
            return self._columns[layer]
