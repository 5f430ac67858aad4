"""Replay routes in a Hugging Face model, whose routers keep their scores and their gradient.

The forward methods of these models accept any keyword, so routes passed as one are dropped without
a word. Here the choice inside the routers is replaced, and a scope that ends without having
replayed is an error.

In: a transformers model, routes. Out: replay_routes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import nn

from moe_replay.errors import ReplayScopeError, TraceError, UnsupportedError
from moe_replay.routing.arrays import as_array, check_holds_ids
from moe_replay.transformers.record import in_backward
from moe_replay.transformers.routers.sites import RouterSite, find_routers
from moe_replay.transformers.routers.station import tapped
from moe_replay.transformers.shared_batch import require_same_routes, require_whole_model


@contextmanager
def replay_routes(
    model: nn.Module,
    expert_ids: Any,
    valid: Any,
    *,
    layers: Sequence[int],
) -> Iterator[None]:
    """Force the experts of every forward pass of ``model`` inside the scope.

    ``expert_ids`` is ``[rows, layers, topk]`` and ``valid`` ``[rows]``, arrays or tensors. Rows are
    the tokens of ``input_ids`` flattened, batch first, padding included; `replay_traces` makes them
    of traces. ``layers`` names the global decoder-layer index of each entry of the layer dim, as
    `RoutingTrace.layers` does; the model's routers must be among them. Rows with ``valid=False``
    are routed live, and their ids are never read. The weights of the experts come from the model's
    current logits by the router's own code, so it keeps its gradient. Every kind of router proves
    itself at its first call in a scope. With gradient checkpointing the backward pass must run
    inside the scope too, since it recomputes the forward.

    Examples:
        >>> with replay_routes(model, trace.expert_ids, trace.valid, layers=trace.layers):
        ...     logits = model(torch.from_numpy(token_ids)[None]).logits

    Raises:
        UnsupportedError: when the model is dense or split into pipeline stages, or a router fails
            its proof, so that the weights of replayed experts would be wrong.
        TraceError: when the routes cannot be routes of this model.
        ReplayScopeError: when a forward has another number of rows, a router never ran,
            recomputation happened outside the scope, another replay scope is open, or ranks that
            share a batch have different routes.
    """
    scope = _Scope(model, as_array(expert_ids), as_array(valid), tuple(layers))
    with ExitStack() as stack:
        # The modules around the layers, since the scope may be on a wrapper that does not run.
        for path, module in model.named_modules():
            if not any(part.isdigit() for part in path.split(".")):
                stack.enter_context(module.register_forward_pre_hook(scope.note_forward))
        stack.enter_context(tapped(model, scope.sites, scope))
        yield
        scope.check_consumed()


class _Scope:
    """The routes of one scope, and how often each router took them."""

    replaces = True

    def __init__(
        self, model: nn.Module, expert_ids: np.ndarray, valid: np.ndarray, layers: tuple[int, ...]
    ) -> None:
        require_whole_model(model)
        # Before all that may raise on one rank alone: the others would wait for it.
        require_same_routes(model, expert_ids, valid, layers)
        self.sites = find_routers(model)
        if not self.sites:
            raise UnsupportedError(f"{type(model).__name__} is dense: it has no routes to replay")
        _check_routes(expert_ids, valid, layers, self.sites)
        # Copies: torch shares memory with an array, and those of a trace are read-only.
        self._ids = torch.from_numpy(np.array(expert_ids))
        self._valid = torch.from_numpy(np.array(valid))
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._column = {layer: column for column, layer in enumerate(layers)}
        self._num_forwards = {site.layer: 0 for site in self.sites}
        self._num_recomputed = 0
        self._checkpointed = False

    def note_forward(self, module: nn.Module, args: Any) -> None:
        """See whether this forward will be recomputed; a pre-hook of modules around the layers."""
        # Asked here, because reentrant checkpointing runs the layers themselves without gradients.
        if torch.is_grad_enabled() and not self._checkpointed:
            self._checkpointed = any(
                getattr(part, "gradient_checkpointing", False) and part.training
                for part in module.modules()
            )

    def choose(
        self, site: RouterSite, ids: Integer[torch.Tensor, "rows topk"]
    ) -> Integer[torch.Tensor, "rows topk"]:
        """Return the replayed ids of one router's call; rows without a route keep their own."""
        if len(ids) != len(self._ids):
            raise ReplayScopeError(
                f"router {site.path} got {len(ids)} rows, the scope holds routes for {len(self._ids)}; one scope "
                "replays one batch: open a new one for another, and count padding rows in (valid=False)"
            )
        if in_backward():
            self._num_recomputed += 1
        else:
            self._num_forwards[site.layer] += 1
        recorded, valid = self._routes_on(ids.device)
        column = recorded[:, self._column[site.layer]].to(ids.dtype)
        return torch.where(valid[:, None], column, ids)

    def _routes_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._on_device:
            self._on_device[device] = (self._ids.to(device), self._valid.to(device))
        return self._on_device[device]

    def check_consumed(self) -> None:
        """Raise `ReplayScopeError` unless every router replayed, forward and recomputed."""
        idle = [layer for layer, count in self._num_forwards.items() if count == 0]
        if idle:
            raise ReplayScopeError(
                f"the routers of layers {idle} never ran inside the replay scope, so nothing was replayed there; run "
                "the forward pass of the very model that the scope was opened for inside the scope"
            )
        if self._checkpointed and self._num_recomputed == 0:
            raise ReplayScopeError(
                "gradient checkpointing is on, but no backward pass ran inside the replay scope; it would recompute "
                "the forward with live routes: call backward() inside the scope"
            )


def _check_routes(
    expert_ids: np.ndarray,
    valid: np.ndarray,
    layers: tuple[int, ...],
    sites: tuple[RouterSite, ...],
) -> None:
    topk, num_experts = sites[0].topk, sites[0].num_experts
    if expert_ids.ndim != 3 or not np.issubdtype(expert_ids.dtype, np.integer):
        raise TraceError(
            f"expert_ids is {expert_ids.dtype}{list(expert_ids.shape)}, expected integers of [rows, layers, {topk}]"
        )
    check_holds_ids(expert_ids, num_experts)
    rows, num_layers, got_topk = expert_ids.shape
    if valid.shape != (rows,) or valid.dtype != np.bool_:
        raise TraceError(
            f"valid is {valid.dtype}{list(valid.shape)}, expected bool[{rows}]: one entry a row"
        )
    if got_topk != topk or len(layers) != num_layers or len(set(layers)) != num_layers:
        raise TraceError(
            f"expert_ids is [rows, {num_layers}, {got_topk}] with layers {list(layers)}, expected one layer number an "
            f"entry and {topk} experts a token, as the model has"
        )
    missing = [site.layer for site in sites if site.layer not in layers]
    if missing:
        raise TraceError(
            f"no routes for the model's layers {missing}; the routes hold layers {list(layers)}: the recording model "
            "numbers its layers differently, or has fewer of them"
        )
    held = np.sort(expert_ids[:, [layers.index(site.layer) for site in sites]][valid], axis=-1)
    if held.size and (held.min() < 0 or held.max() >= num_experts):
        raise TraceError(
            f"expert ids of valid rows reach from {held.min()} to {held.max()}, expected 0 to {num_experts - 1}; mark "
            "rows without routes valid=False"
        )
    if (held[..., 1:] == held[..., :-1]).any():
        raise TraceError(
            "a valid row names one expert twice, which no router does: the buffer is zero-filled or padded; mark "
            "those rows valid=False"
        )
