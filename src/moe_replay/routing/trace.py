"""RoutingTrace: the experts that a sequence of tokens used, bound to these tokens and layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_replay.errors import TokenMismatchError, TraceError
from moe_replay.routing.arrays import as_array, check_holds_ids, kept, owned
from moe_replay.routing.digest import (
    crop_digest,
    digest_tokens,
    first_difference,
    num_different_tokens,
)
from moe_replay.routing.form import RouteForm, expert_dtype
from moe_replay.routing.origin import Origin
from moe_replay.routing.slots import repeating_sets, row_chunks

if TYPE_CHECKING:
    from jaxtyping import Bool, Integer, UInt64

# A layer that gives this many different tokens the same experts has a collapsed router, or its
# buffer was never written. Fewer can be chance, and one repeated token, however often, rightly has
# constant routes.
MIN_TOKENS_FOR_CONSTANT_CHECK = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingTrace:
    """Routes of consecutive tokens in some layers of one model.

    Row ``t`` holds the experts that ran when token ``t`` was fed to the model. The token sampled
    last was never fed, so the last row of a rollout exists and is ``valid=False``.

    Everything is checked when a trace is made: shapes, dtype, ids in range, no expert twice in a
    row. ``RoutingTrace(...)`` therefore raises `TraceError` instead of holding nonsense. What only
    live routes can judge is left to the guard: see `constant_layers`. Arrays are read-only, and are
    copied unless nobody else can write to them (see `arrays.kept`), so what was checked stays as it
    was.
    """

    expert_ids: Integer[np.ndarray, "tokens layers topk"]
    """``[tokens, layers, topk]``, uint8 up to 256 experts, uint16 above.

    Rows with ``valid=False`` hold anything.
    """
    valid: Bool[np.ndarray, " tokens"]
    """``[tokens]``; False where no route was recorded. Nothing may read the ids of such a row."""
    layers: tuple[int, ...]
    """Global decoder-layer index (from 0) of each entry of the layer dim, strictly increasing."""
    num_experts: int
    """Routed experts in each layer of the model, not the largest id seen."""
    token_digest: UInt64[np.ndarray, " tokens"]
    """``[tokens]``, rolling digest of the token ids of rows ``0..t`` (see `digest_tokens`)."""
    origin: Origin
    """Who recorded the routes, and under which weights."""

    def __post_init__(self) -> None:
        for name in ("expert_ids", "valid", "token_digest"):
            object.__setattr__(self, name, kept(getattr(self, name)))
        self._check_form()
        self._check_routes()

    def __len__(self) -> int:
        return self.expert_ids.shape[0]

    @property
    def topk(self) -> int:
        """Experts per token and layer."""
        return self.expert_ids.shape[2]

    @property
    def form(self) -> RouteForm:
        """Layers, experts and top-k."""
        return RouteForm(layers=self.layers, num_experts=self.num_experts, topk=self.topk)

    @property
    def num_valid(self) -> int:
        """Rows that hold routes."""
        return int(self.valid.sum())

    @classmethod
    def record(
        cls,
        expert_ids: Any,
        *,
        token_ids: Any,
        valid: Any,
        layers: Sequence[int],
        num_experts: int,
        origin: Origin,
    ) -> RoutingTrace:
        """Bind freshly recorded routes to the tokens that they were recorded for.

        ``expert_ids`` may come in any integer dtype that can hold every expert; ids outside the
        model's experts raise before they are narrowed. All three may be numpy arrays, lists, or
        tensors of torch, and may be reused once this returns.

        Raises:
            TraceError: when rows, tokens and ``valid`` differ in length, or a valid row is not a
                possible route.
        """
        ids, token_ids, valid = as_array(expert_ids), as_array(token_ids), as_array(valid)
        if not np.issubdtype(ids.dtype, np.integer):
            raise TraceError(
                f"expert_ids is {ids.dtype}, expected integers: a cast would round ids silently"
            )
        check_holds_ids(ids, num_experts)
        if ids.ndim != 3 or not len(ids) == len(token_ids) == len(valid):
            raise TraceError(
                f"routes of shape {list(ids.shape)}, {len(token_ids)} tokens and {len(valid)} flags, expected "
                "[tokens, layers, topk] and one row and flag for each token; an engine that leaves the last row out "
                "gives one row too few: add it with valid=False, after checking which row is missing"
            )
        dtype = expert_dtype(num_experts)
        if ids.dtype != dtype:
            _check_range(ids, valid, layers, num_experts)
            ids = owned(ids.astype(dtype, order="C"))
        elif not ids.flags.c_contiguous:
            ids = owned(np.array(ids, order="C"))
        return cls(
            expert_ids=ids,
            valid=np.asarray(valid, dtype=bool),
            layers=tuple(int(layer) for layer in layers),
            num_experts=num_experts,
            token_digest=owned(digest_tokens(token_ids)),
            origin=origin,
        )

    def check_tokens(self, token_ids: Any, *, where: str) -> None:
        """Raise `TokenMismatchError` unless this trace was recorded for exactly these tokens.

        ``where`` names the sample in the message. A row count proves nothing: a rollout of 7 tokens
        has 6 routed rows, and so has the same rollout after one token was lost to re-tokenisation.
        """
        ids = as_array(token_ids)
        if len(ids) != len(self):
            raise TokenMismatchError(
                f"{where}: routes were recorded for {len(self)} tokens, the sample has {len(ids)}; "
                "the text was probably re-tokenised or truncated after the rollout: keep the engine's token ids, "
                "and crop trace and tokens together"
            )
        row = first_difference(self.token_digest, digest_tokens(ids))
        if row is not None:
            raise TokenMismatchError(
                f"{where}: the sample's tokens differ from the recorded ones from row {row} of {len(self)} on "
                f"(token id {int(ids[row])} there); the routes belong to another sample or to shifted tokens: "
                "check that samples kept their order and that no token was inserted or dropped"
            )

    def crop(self, start: int, stop: int) -> RoutingTrace:
        """Return the rows ``start:stop``, still bound to their tokens.

        Indices must lie inside the trace.
        """
        if not 0 <= start <= stop <= len(self):
            raise TraceError(f"cannot crop rows {start}:{stop} of a trace of {len(self)} rows")
        return replace(
            self,
            expert_ids=self.expert_ids[start:stop],
            valid=self.valid[start:stop],
            token_digest=owned(crop_digest(self.token_digest, start, stop)),
            origin=self.origin.crop(start, stop),
        )

    def constant_layers(self) -> tuple[int, ...]:
        """Return the layers in which all valid rows, of at least 32 tokens, hold the same experts.

        The router of such a layer has collapsed, which is legal and happens in reinforcement
        learning, or the engine never wrote the layer. The routes cannot show which. `Guard` can:
        the live routes of a collapsed router are the same.
        """
        held = np.flatnonzero(self.valid)
        if len(held) < MIN_TOKENS_FOR_CONSTANT_CHECK:
            return ()
        # Nearly every layer differs within its first rows; only what is left is worth a look at
        # every row.
        first = self.expert_ids[held[0]]
        some = self.expert_ids[held[:MIN_TOKENS_FOR_CONSTANT_CHECK]]
        constant = [
            entry
            for entry in np.flatnonzero((some == first).all(axis=(0, 2)))
            if (self.expert_ids[held, entry] == first[entry]).all()
        ]
        if not constant or (
            num_different_tokens(self.token_digest, self.valid) < MIN_TOKENS_FOR_CONSTANT_CHECK
        ):
            return ()
        return tuple(self.layers[entry] for entry in constant)

    def select_layers(self, layers: Sequence[int]) -> RoutingTrace:
        """Return the trace of some ``layers`` (global decoder indices, increasing)."""
        entry = {layer: index for index, layer in enumerate(self.layers)}
        missing = [layer for layer in layers if layer not in entry]
        if missing:
            raise TraceError(
                f"layers {missing} are not in the trace, which holds {list(self.layers)}; the recording model and "
                "this one number their layers differently, or dense layers were asked for"
            )
        if tuple(layers) == self.layers:
            return self
        ids = np.array(self.expert_ids[:, [entry[layer] for layer in layers]], order="C")
        return replace(self, expert_ids=owned(ids), layers=tuple(layers))

    def _check_form(self) -> None:
        ids, expected = self.expert_ids, expert_dtype(self.num_experts)
        if ids.ndim != 3:
            raise TraceError(f"expert_ids has shape {ids.shape}, expected [tokens, layers, topk]")
        if ids.dtype != expected:
            raise TraceError(
                f"expert_ids is {ids.dtype}, expected {expected} for a model of {self.num_experts} experts; "
                "use RoutingTrace.record to narrow an engine's payload"
            )
        tokens, num_layers, topk = ids.shape
        if len(self.layers) != num_layers or num_layers == 0:
            raise TraceError(
                f"expert_ids holds {num_layers} layers, `layers` names {len(self.layers)}: {list(self.layers)}; "
                "an engine that reports dense layers too has more rows of layers than the model has routers"
            )
        if (
            any(b <= a for a, b in zip(self.layers, self.layers[1:], strict=False))
            or self.layers[0] < 0
        ):
            raise TraceError(f"layers must be increasing indices from 0, got {list(self.layers)}")
        if not 1 <= topk < self.num_experts:
            raise TraceError(
                f"topk is {topk} of {self.num_experts} experts, expected at least 1 and fewer than all"
            )
        for name, array, dtype in (
            ("valid", self.valid, np.bool_),
            ("token_digest", self.token_digest, np.uint64),
        ):
            if array.shape != (tokens,) or array.dtype != dtype:
                raise TraceError(
                    f"{name} is {array.dtype}{list(array.shape)}, expected {np.dtype(dtype)}[{tokens}]: one entry a row"
                )
        spans = self.origin.spans
        edges = [0, *(span.stop for span in spans)]
        in_order = all(
            span.start == edge < span.stop for span, edge in zip(spans, edges, strict=False)
        )
        if not in_order or edges[-1] != tokens:
            raise TraceError(
                f"policy spans {self.origin.spans} must cover the {tokens} rows in order without a gap or overlap"
            )

    def _check_routes(self) -> None:
        _check_range(self.expert_ids, self.valid, self.layers, self.num_experts)
        for rows in row_chunks(*self.expert_ids.shape):
            held = self.valid[rows]
            repeats = repeating_sets(_valid_rows(self.expert_ids[rows], held))
            if repeats.any():
                at, layer = (int(x[0]) for x in np.nonzero(repeats))
                row = rows.start + int(np.flatnonzero(held)[at])
                raise TraceError(
                    f"row {row}, layer {self.layers[layer]}: experts {self.expert_ids[row, layer].tolist()} name one "
                    f"twice ({int(repeats.any(axis=1).sum())} such rows in {rows.start}:{rows.stop}); a router never "
                    "does: the buffer is zero-filled or padded, so mark those rows valid=False"
                )


def _valid_rows(
    ids: Integer[np.ndarray, "rows layers topk"], held: Bool[np.ndarray, " rows"]
) -> Integer[np.ndarray, "valid layers topk"]:
    return ids if held.all() else ids[held]


def _check_range(
    ids: Integer[np.ndarray, "tokens layers topk"],
    valid: Bool[np.ndarray, " tokens"],
    layers: Sequence[int],
    num_experts: int,
) -> None:
    for rows in row_chunks(*ids.shape):
        held = _valid_rows(ids[rows], valid[rows])
        if held.size == 0:
            continue
        low, high = int(held.min()), int(held.max())
        if low < 0 or high >= num_experts:
            worst = high if high >= num_experts else low
            at, layer, _ = (int(x[0]) for x in np.nonzero(held == worst))
            row = rows.start + int(np.flatnonzero(valid[rows])[at])
            raise TraceError(
                f"expert id {worst} in row {row}, layer entry {layer} of {list(layers)}, expected 0 to "
                f"{num_experts - 1}; a sentinel, a narrowed integer or another expert-id space (physical ids under "
                "expert load balancing): mark missing rows valid=False, map physical ids first"
            )
