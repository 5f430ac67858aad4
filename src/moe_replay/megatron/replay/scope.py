"""Replay and recording scopes for Megatron-Core routers.

A scope owns the routers of the model it was given and nothing else in the process. While it is
open, each of its routers asks it which experts to use; the answer depends on the microbatch that is
running, by key, never on the order of calls. Recomputation gets the routes of its own forward pass,
because the key travels inside the checkpointed function, whatever the pipeline schedule does in
between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import megatron.core.tensor_parallel as tensor_parallel
import numpy as np
import torch
from jaxtyping import Float, Float32, Integer
from megatron.core.transformer.moe.router import TopKRouter

from moe_replay.errors import ReplayScopeError, UnsupportedError
from moe_replay.megatron.replay.expert_groups import OwnChoice
from moe_replay.megatron.replay.live import Chosen, LiveChoice
from moe_replay.megatron.replay.overlap import OverlapCounter, RowOwners, WatchedRoutes
from moe_replay.megatron.replay.refusals import refuse_bypasses, refuse_foreign_routes
from moe_replay.megatron.replay.upload import DeviceRoutes
from moe_replay.routing import RouteSlice


class _RouterSeat:
    """Sits where Megatron expects its RouterReplay, and lets the scope choose the experts."""

    def __init__(self, scope: RouterScope, layer: int, router: TopKRouter) -> None:
        self.scope = scope
        self.layer = layer
        self.router = router
        self.displaced: Any = None

    def get_replay_topk(
        self,
        scores: Float[torch.Tensor, "rows experts"],
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., Chosen] | None = None,
    ) -> Chosen:
        assert default_compute_topk is not None

        own = self.displaced if isinstance(self.displaced, OwnChoice) else None
        live = LiveChoice(
            scores,
            topk,
            num_groups=num_groups,
            group_topk=group_topk,
            compute_topk=default_compute_topk,
            own=own,
        )
        return self.scope.choose(self.layer, scores, live)


class RouterScope(ABC):
    """What replaying and recording share: owning routers, the microbatch, the count of calls."""

    def __init__(
        self, routers: Mapping[int, TopKRouter], keys: Iterable[int], *, may_be_empty: bool
    ) -> None:
        """Prepare to own ``routers`` (global layer -> TopKRouter); `open` takes them over.

        Each runs once for each microbatch of ``keys``. ``may_be_empty`` is for a pipeline stage
        that holds dense layers only.

        Raises:
            UnsupportedError: when a router's configuration chooses experts without asking the
                scope, or there is no router.
        """
        if not routers and not may_be_empty:
            raise UnsupportedError(
                "the model has no router on this rank, so there is nothing to replay: the checkpoint is dense "
                "(set replay.router_replay_mode = 'disabled'), or the chunks given are not the policy's"
            )
        for layer, router in routers.items():
            refuse_bypasses(layer, router)
        self._keys = tuple(keys)
        self._seats = [_RouterSeat(self, layer, router) for layer, router in routers.items()]
        self._key: int | None = None
        self._recomputing = False
        self._inside_checkpoint = False
        self._is_open = False
        self._forwards: Counter[tuple[int, int]] = Counter()
        self._checkpointed: set[tuple[int, int]] = set()
        self._recomputes: Counter[tuple[int, int]] = Counter()

    @property
    def layers(self) -> tuple[int, ...]:
        """Global layers of the routers that the scope owns, in increasing order."""
        return tuple(sorted(seat.layer for seat in self._seats))

    @contextmanager
    def open(self) -> Iterator[RouterScope]:
        """Own the routers for the time of the block; check on a normal exit that each did its part.

        Raises:
            ReplayScopeError: when another open scope owns a router, or a router did not run exactly
                once for each microbatch.
        """
        for seat in self._seats:
            held = getattr(seat.router, "router_replay", None)
            if isinstance(held, _RouterSeat):
                raise ReplayScopeError(
                    f"the router of layer {seat.layer} already belongs to an open scope; close it first"
                )
        for seat in self._seats:
            seat.displaced, seat.router.router_replay = seat.router.router_replay, seat
        plain_checkpoint = tensor_parallel.checkpoint
        tensor_parallel.checkpoint = self._checkpoint_with_key(plain_checkpoint)
        self._is_open = True
        try:
            yield self
            self._check_complete()
        finally:
            self._is_open = False
            tensor_parallel.checkpoint = plain_checkpoint
            for seat in self._seats:
                seat.router.router_replay = seat.displaced

    @contextmanager
    def microbatch(self, key: int) -> Iterator[None]:
        """Mark the forward pass inside the block as that of microbatch ``key``."""
        before, self._key = self._key, key
        try:
            yield
        finally:
            self._key = before

    def choose(
        self, layer: int, scores: Float[torch.Tensor, "rows experts"], live: LiveChoice
    ) -> Chosen:
        """Return the experts that the router of ``layer`` uses for the rows of this call."""
        if self._key is None:
            raise ReplayScopeError(
                f"the router of layer {layer} ran outside `scope.microbatch(key)`: the scope cannot know whose "
                "routes to use; run every forward pass of the model inside it, and evaluate after the scope is closed"
            )
        called = (layer, self._key)
        if self._recomputing:
            self._recomputes[called] += 1
        else:
            self._forwards[called] += 1
            if self._inside_checkpoint:
                self._checkpointed.add(called)
        return self._experts(self._key, layer, scores, live)

    @abstractmethod
    def _experts(self, key: int, layer: int, scores: torch.Tensor, live: LiveChoice) -> Chosen: ...

    def _checkpoint_with_key(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def checkpoint(function: Callable[..., Any], distribute: bool, *args: Any) -> Any:
            if self._key is None:
                return plain(function, distribute, *args)
            return plain(_KeyedFunction(self, self._key, function), distribute, *args)

        return checkpoint

    def _check_complete(self) -> None:
        expected = {(layer, key) for layer in self.layers for key in self._keys}
        wrong = {call: n for call, n in self._forwards.items() if n != 1}
        wrong |= {call: 0 for call in expected - self._forwards.keys()}
        if wrong:
            (layer, key), count = min(wrong.items())
            raise ReplayScopeError(
                f"{len(wrong)} of {len(expected)} (layer, microbatch) pairs did not run exactly once; the first is layer "
                f"{layer}, microbatch {key}, which ran {count} times: a microbatch was left out or run twice, or a "
                "repeated layer shares one router"
            )
        twice = {
            call: n
            for call, n in self._recomputes.items()
            if n != 1 or call not in self._checkpointed
        }
        if twice:
            (layer, key), count = min(twice.items())
            raise ReplayScopeError(
                f"layer {layer}, microbatch {key} was recomputed {count} times, expected once for each checkpointed "
                "forward pass"
            )


class _KeyedFunction:
    """A checkpointed function that knows its microbatch: its second call is the recomputation."""

    def __init__(self, scope: RouterScope, key: int, function: Callable[..., Any]) -> None:
        self.scope = scope
        self.key = key
        self.function = function
        self.ran = False

    def __call__(self, *args: Any) -> Any:
        scope = self.scope
        if not scope._is_open:
            raise ReplayScopeError(
                f"microbatch {self.key} is recomputed after its replay scope was closed, so its routers would run "
                "live; run the backward pass inside the scope"
            )
        before = (scope._key, scope._recomputing, scope._inside_checkpoint)
        scope._key, scope._recomputing, scope._inside_checkpoint = self.key, self.ran, True
        self.ran = True
        try:
            return self.function(*args)
        finally:
            scope._key, scope._recomputing, scope._inside_checkpoint = before


class ReplayScope(RouterScope):
    """Forces the experts of every valid row; other rows are routed by the current weights.

    The scores are always the model's own, gathered at the replayed ids, so the router keeps its
    gradient.

    Source: R3, arXiv 2510.11370, the replayed gate.
    """

    def __init__(
        self,
        routers: Mapping[int, TopKRouter],
        routes: Mapping[int, RouteSlice],
        *,
        owners: Mapping[int, RowOwners] | None = None,
        keeps_live: bool = False,
        may_be_empty: bool = False,
    ) -> None:
        """Prepare to replay ``routes`` (microbatch key -> routes of this rank's router rows).

        With ``owners`` (key -> whose token each of these rows holds) live and replayed routes are
        counted for `watched`; ``keeps_live`` keeps the live ids of every row too, [rows, layers,
        topk] for each microbatch on the device.

        Raises:
            TraceError: when routes lack a layer of the model, or are of a model of another shape.
        """
        super().__init__(routers, routes, may_be_empty=may_be_empty)
        self._routes = dict(routes)
        self._owners = dict(owners or {})
        self._keeps_live = keeps_live
        self._entry: dict[int, dict[int, int]] = {}
        self._counters: dict[int, OverlapCounter] = {}
        self._kept: dict[tuple[int, int], torch.Tensor] = {}
        # Of the microbatch that is running and, while a recomputation interrupts it, of the
        # recomputed one.
        self._uploaded: dict[bool, tuple[int, DeviceRoutes]] = {}
        for key, held in self._routes.items():
            if routers:
                refuse_foreign_routes(key, held, routers)
            self._entry[key] = {layer: i for i, layer in enumerate(held.layers)}

    def watched(self, key: int) -> WatchedRoutes | None:
        """Return the counts of microbatch ``key``, once; None when this rank replays no row.

        Raises:
            ReplayScopeError: when it was not counted, did not run, or was taken before.
        """
        if not self.layers or not self._routes[key].valid.any():
            return None
        counter = self._counters.pop(key, None)
        if counter is None:
            raise ReplayScopeError(
                f"nothing was counted of microbatch {key}; give the scope its owners, run its forward pass inside, and take "
                "its counts once"
            )
        kept = None
        if self._keeps_live:
            per_layer = [self._kept.pop((layer, key)) for layer in self.layers]
            kept = torch.stack(per_layer, dim=1).cpu().numpy()
        counts, use = counter.finish()
        return WatchedRoutes(counts=counts, use=use, live_ids=kept)

    def _experts(self, key: int, layer: int, scores: torch.Tensor, live: LiveChoice) -> Chosen:
        routes = self._routes.get(key)
        if routes is None:
            raise ReplayScopeError(
                f"microbatch {key} has no routes in this scope, which holds {sorted(self._routes)}"
            )
        if scores.shape[0] != len(routes.valid):
            raise ReplayScopeError(
                f"layer {layer}, microbatch {key}: the router sees {scores.shape[0]} rows, the routes have "
                f"{len(routes.valid)}; tokens and routes were cut for different ranks or padded differently"
            )
        uploaded = self._upload_once(key, routes, scores.device)
        ids = uploaded.expert_ids[self._entry[key][layer]].long()
        rows = uploaded.live_rows
        with torch.no_grad():
            if key in self._owners and not self._recomputing:
                # One top-k of all rows serves the rows without a route and the guard.
                every = live(None)[1]
                self._count(key, layer, every, uploaded.expert_ids)
                if rows is not None:
                    ids.index_copy_(0, rows, every.index_select(0, rows))
            elif rows is not None:
                ids.index_copy_(0, rows, live(rows)[1])
        return scores.gather(1, ids), ids

    def _count(self, key: int, layer: int, live: torch.Tensor, expert_ids: torch.Tensor) -> None:
        routes = self._routes[key]
        if not routes.valid.any():
            return
        if key not in self._counters:
            self._counters[key] = OverlapCounter(
                routes, expert_ids, self._owners[key], layers=self.layers
            )
        self._counters[key].add(layer, live)
        if self._keeps_live:
            self._kept[layer, key] = live.to(_narrow(routes.num_experts))

    def _upload_once(self, key: int, routes: RouteSlice, device: torch.device) -> DeviceRoutes:
        held = self._uploaded.get(self._recomputing)
        if held is None or held[0] != key:
            held = key, DeviceRoutes(routes, device)
            self._uploaded[self._recomputing] = held
        return held[1]


class RecordScope(RouterScope):
    """Records the experts of each microbatch, routed live; recomputation is not recorded again."""

    def __init__(
        self,
        routers: Mapping[int, TopKRouter],
        keys: Sequence[int],
        *,
        with_margins: bool = False,
        may_be_empty: bool = False,
    ) -> None:
        """Prepare to record the microbatches ``keys``, and how close each choice was."""
        super().__init__(routers, keys, may_be_empty=may_be_empty)
        self._recorded: dict[tuple[int, int], torch.Tensor] = {}
        self._margins: dict[tuple[int, int], torch.Tensor] | None = {} if with_margins else None

    def expert_ids(self, key: int) -> Integer[np.ndarray, "layers rows topk"]:
        """Return the routes of microbatch ``key`` in this rank's rows and `layers`; once each.

        Raises:
            ReplayScopeError: when the scope owns no router, or the microbatch did not run or was
                taken before.
        """
        missing = [layer for layer in self.layers if (layer, key) not in self._recorded]
        if missing or not self.layers:
            raise ReplayScopeError(
                f"no recorded routes of microbatch {key} in layers {missing} (of {list(self.layers)}); run its forward "
                "pass inside the scope, and take its routes once"
            )
        per_layer = [self._recorded.pop((layer, key)) for layer in self.layers]
        return torch.stack(per_layer).cpu().numpy()

    def margins(self, key: int) -> Float32[np.ndarray, "rows layers"]:
        """Return by how much the last chosen expert of each row scored above the first left out.

        As `LiveChoice.margins`; once for each microbatch.
        """
        assert self._margins is not None
        found = [self._margins.pop((layer, key)) for layer in self.layers]
        return torch.stack(found, dim=1).float().cpu().numpy()

    def _experts(self, key: int, layer: int, scores: torch.Tensor, live: LiveChoice) -> Chosen:
        values, ids = live(None)
        if not self._recomputing:
            self._recorded[layer, key] = ids.detach().to(_narrow(scores.shape[1]))
            if self._margins is not None:
                self._margins[layer, key] = live.margins(ids)
        return values, ids


def _narrow(num_experts: int) -> torch.dtype:
    """Return the dtype of stored ids, as `expert_dtype` does for arrays."""
    return torch.uint8 if num_experts <= 256 else torch.uint16
