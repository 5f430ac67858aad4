"""Replay and recording scopes for Megatron-Core routers.

A scope owns the routers of the model it was given and nothing else in the process. While it is open, each of its
routers asks it which experts to use; the answer depends on the microbatch that is running, by key, never on the order
of calls. Recomputation gets the routes of its own forward pass, because the key travels inside the checkpointed
function, whatever the pipeline schedule does in between.

In: routers by global layer, routes by microbatch key. Out: forced or recorded experts.
Called by: megatron.actor, and other trainers on Megatron-Core.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import megatron.core.tensor_parallel as tensor_parallel
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Integer
from megatron.core.transformer.moe.router import TopKRouter

from moe_replay.errors import ReplayScopeError, TraceError, UnsupportedError
from moe_replay.routing import expert_dtype

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicrobatchRoutes:
    """Routes of one microbatch in the rows in which this rank's routers see it (after CP and SP)."""

    expert_ids: Integer[np.ndarray, "rows layers topk"]
    """``[rows, layers, topk]``, uint8 or uint16; rows with ``valid=False`` are never read."""
    valid: Bool[np.ndarray, " rows"]
    """``[rows]``; False where the row is routed live."""
    layers: tuple[int, ...]
    """Global decoder index of each entry of the layer dim; must include every layer of this rank."""
    watched_rows: Int64[np.ndarray, " watched"]
    """Rows whose live experts are kept beside the replayed ones, for the guard; all valid; may be empty."""


class _RouterSeat:
    """Sits where Megatron expects its RouterReplay, and passes the choice of experts on to the scope."""

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
        default_compute_topk: TopK | None = None,
    ) -> tuple[Float[torch.Tensor, "rows topk"], Int64[torch.Tensor, "rows topk"]]:
        assert default_compute_topk is not None

        def live() -> tuple[torch.Tensor, torch.Tensor]:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)

        return self.scope.choose(self.layer, scores, topk, live)


class RouterScope(ABC):
    """What replaying and recording share: taking the routers over, knowing the microbatch, counting the calls."""

    def __init__(self, routers: Mapping[int, TopKRouter]) -> None:
        """Prepare to own ``routers`` (global layer -> TopKRouter); `open` takes them over.

        Raises:
            UnsupportedError: when a router's configuration chooses experts without asking the scope.
        """
        if not routers:
            raise UnsupportedError(
                "the model has no router on this rank, so there is nothing to replay: the checkpoint is dense "
                "(set replay.router_replay_mode = 'disabled'), or the chunks given are not the policy's"
            )
        for layer, router in routers.items():
            _refuse_bypasses(layer, router)
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
        """Own the routers for the time of the block; on a normal exit, check that the contract was kept.

        Raises:
            ReplayScopeError: when another open scope owns a router, or a router did not run exactly once for each
                microbatch.
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
        """Say that the forward pass inside the block is that of microbatch ``key``."""
        before, self._key = self._key, key
        try:
            yield
        finally:
            self._key = before

    def choose(
        self,
        layer: int,
        scores: torch.Tensor,
        topk: int,
        live: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores and ids of the experts that ``layer`` uses for the rows of ``scores``."""
        if self._key is None:
            raise ReplayScopeError(
                f"the router of layer {layer} ran outside `scope.microbatch(key)`: the scope cannot know whose routes "
                "to use; run every forward pass of the model inside it, and evaluate after the scope is closed"
            )
        called = (layer, self._key)
        if self._recomputing:
            self._recomputes[called] += 1
        else:
            self._forwards[called] += 1
            if self._inside_checkpoint:
                self._checkpointed.add(called)
        return self._experts(layer, self._key, scores, topk, live)

    @abstractmethod
    def _experts(
        self,
        layer: int,
        key: int,
        scores: torch.Tensor,
        topk: int,
        live: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    @abstractmethod
    def _keys(self) -> Sequence[int]: ...

    def _checkpoint_with_key(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def checkpoint(function: Callable[..., Any], distribute: bool, *args: Any) -> Any:
            if self._key is None:
                return plain(function, distribute, *args)
            return plain(_KeyedFunction(self, self._key, function), distribute, *args)

        return checkpoint

    def _check_complete(self) -> None:
        expected = {(layer, key) for layer in self.layers for key in self._keys()}
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
    """A checkpointed function that remembers its microbatch: its second call is the recomputation of the first."""

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

    The scores are always the model's own, gathered at the replayed ids, so the router keeps its gradient.
    """

    def __init__(
        self, routers: Mapping[int, TopKRouter], routes: Mapping[int, MicrobatchRoutes]
    ) -> None:
        """Prepare to replay ``routes`` (microbatch key -> its routes).

        Raises:
            TraceError: when routes lack a layer of the model, or have another number of experts per token.
        """
        super().__init__(routers)
        self._routes = dict(routes)
        self._place: dict[int, dict[int, int]] = {}
        self._watched: dict[tuple[int, int], torch.Tensor] = {}
        for key, held in self._routes.items():
            _check_routes(key, held, routers)
            self._place[key] = {layer: i for i, layer in enumerate(held.layers)}

    def _keys(self) -> Sequence[int]:
        return tuple(self._routes)

    def watched_rows(self, key: int) -> Int64[np.ndarray, " watched"]:
        """Return the watched rows of microbatch ``key``."""
        return self._routes[key].watched_rows

    def live_ids(self, key: int) -> Int64[np.ndarray, "watched layers topk"]:
        """Return the live experts of the watched rows of microbatch ``key``, in the order of `layers`."""
        return np.stack([self._watched[layer, key].cpu().numpy() for layer in self.layers], axis=1)

    def _experts(
        self,
        layer: int,
        key: int,
        scores: torch.Tensor,
        topk: int,
        live: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
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
        ids = _upload(routes.expert_ids[:, self._place[key][layer]], scores.device).long()
        watched = routes.watched_rows if not self._recomputing else routes.watched_rows[:0]
        if len(watched) or not routes.valid.all():
            with torch.no_grad():
                _, live_ids = live()
            if len(watched):
                self._watched[layer, key] = live_ids[_upload(watched, scores.device)]
            ids = torch.where(_upload(routes.valid, scores.device)[:, None], ids, live_ids)
        return scores.gather(1, ids), ids


class RecordScope(RouterScope):
    """Records the experts that each microbatch uses, routed live; recomputation is not recorded again."""

    def __init__(self, routers: Mapping[int, TopKRouter], keys: Sequence[int]) -> None:
        """Prepare to record the microbatches ``keys``."""
        super().__init__(routers)
        self._wanted = tuple(keys)
        self._recorded: dict[tuple[int, int], torch.Tensor] = {}
        num_experts = next(iter(routers.values())).config.num_moe_experts
        self._dtype = torch.from_numpy(np.empty(0, dtype=expert_dtype(num_experts))).dtype

    def _keys(self) -> Sequence[int]:
        return self._wanted

    def expert_ids(self, key: int) -> Integer[np.ndarray, "rows layers topk"]:
        """Return the routes of microbatch ``key`` in this rank's rows, in the order of `layers`; each key once."""
        per_layer = [self._recorded.pop((layer, key)) for layer in self.layers]
        return torch.stack(per_layer, dim=1).cpu().numpy()

    def _experts(
        self,
        layer: int,
        key: int,
        scores: torch.Tensor,
        topk: int,
        live: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values, ids = live()
        if not self._recomputing:
            self._recorded[layer, key] = ids.detach().to(self._dtype)
        return values, ids


def _upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return ``array`` on ``device``; from pinned memory and without waiting when that is a GPU."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def _check_routes(key: int, routes: MicrobatchRoutes, routers: Mapping[int, TopKRouter]) -> None:
    missing = sorted(routers.keys() - set(routes.layers))
    if missing:
        raise TraceError(
            f"microbatch {key}: the routes hold layers {list(routes.layers)}, the model also routes in {missing}; the "
            "engine's model and this one differ, or the engine numbers MoE layers only"
        )
    config = next(iter(routers.values())).config
    rows, _, topk = routes.expert_ids.shape
    if topk != config.moe_router_topk:
        raise TraceError(
            f"microbatch {key}: routes name {topk} experts per token, the model uses {config.moe_router_topk}"
        )
    if routes.expert_ids.dtype != expert_dtype(config.num_moe_experts) or len(routes.valid) != rows:
        raise TraceError(
            f"microbatch {key}: routes are {routes.expert_ids.dtype} with {rows} rows and {len(routes.valid)} valid "
            f"flags, expected {expert_dtype(config.num_moe_experts)} and one flag a row for a model of "
            f"{config.num_moe_experts} experts"
        )
    if not routes.valid[routes.watched_rows].all():
        raise TraceError(f"microbatch {key}: watched rows must be valid rows")


def _refuse_bypasses(layer: int, router: TopKRouter) -> None:
    config = router.config
    reasons = {
        "moe_router_fusion": (config.moe_router_fusion, "the fused kernel picks experts itself"),
        "moe_router_load_balancing_type = sinkhorn": (
            getattr(router, "routing_type", None) == "sinkhorn",
            "sinkhorn balancing returns before the top-k",
        ),
        "moe_expert_capacity_factor": (
            config.moe_expert_capacity_factor is not None,
            "tokens over capacity are dropped after the replay",
        ),
        "moe_router_topk = num_moe_experts": (
            config.moe_router_topk >= config.num_moe_experts,
            "every expert runs for every token, so there is no choice to replay",
        ),
        "a router without router_replay": (
            not hasattr(router, "router_replay"),
            "Megatron-Core before 0.16 has no place to replay at",
        ),
    }
    for option, (is_set, why) in reasons.items():
        if is_set:
            raise UnsupportedError(
                f"layer {layer}: replay cannot be exact with {option}: {why}; turn it off or set "
                "replay.router_replay_mode = 'disabled'"
            )
