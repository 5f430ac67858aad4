"""Replay routes in a Hugging Face model, whose routers keep their scores and their gradient.

The forward methods of these models accept any keyword, so routes passed as one are dropped without
a word. Here the routers' outputs are replaced, and a scope that ends without having replayed is an
error.

In: a transformers model, routes. Out: replay_routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import nn

from moe_replay.errors import ReplayScopeError, TraceError, UnsupportedError
from moe_replay.routing.arrays import as_array, check_holds_ids
from moe_replay.transformers.record import RouterSite, chosen_ids, find_routers, in_backward

Weigh = Callable[
    [Any, Float[torch.Tensor, "rows experts"], Int64[torch.Tensor, "rows topk"]],
    Float[torch.Tensor, "rows topk"],
]


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
    current logits by its own score function, so the router keeps its gradient. With gradient
    checkpointing the backward pass must run inside the scope too, since it recomputes the forward.

    Example:
        >>> with replay_routes(model, trace.expert_ids, trace.valid, layers=trace.layers):
        ...     logits = model(torch.from_numpy(token_ids)[None]).logits

    Raises:
        UnsupportedError: when the model is dense, or of a family whose score function is not known
            here.
        TraceError: when the routes cannot be routes of this model.
        ReplayScopeError: when a forward has another number of rows, a router never ran, or
            recomputation happened outside the scope.
    """
    scope = _Scope(model, as_array(expert_ids), as_array(valid), tuple(layers))
    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(scope.note_forward))
        for site in scope.sites:
            hooks.enter_context(site.module.register_forward_hook(partial(scope.force, site)))
        yield
        scope.check_consumed()


class _Scope:
    """The routes of one scope, and how often each router took them."""

    def __init__(
        self, model: nn.Module, expert_ids: np.ndarray, valid: np.ndarray, layers: tuple[int, ...]
    ) -> None:
        self.sites = find_routers(model)
        if not self.sites:
            raise UnsupportedError(f"{type(model).__name__} is dense: it has no routes to replay")
        for site in self.sites:
            if type(site.module).__name__ not in _WEIGHTS:
                raise UnsupportedError(
                    f"router {site.path} is a {type(site.module).__name__}, replay knows {sorted(_WEIGHTS)}; without "
                    "its score function the weights of replayed experts would be guessed"
                )
        _check_routes(expert_ids, valid, layers, self.sites)
        # Copies: torch shares memory with an array, and those of a trace are read-only.
        self._ids = torch.from_numpy(np.array(expert_ids))
        self._valid = torch.from_numpy(np.array(valid))
        self._column = {layer: column for column, layer in enumerate(layers)}
        self._num_forwards = {site.layer: 0 for site in self.sites}
        self._num_recomputed = 0
        self._checkpointed = False

    def note_forward(self, model: nn.Module, args: Any) -> None:
        """See whether this forward will be recomputed; a forward pre-hook of the model."""
        # Asked here, because reentrant checkpointing runs the layers themselves without gradients.
        checkpointing = any(
            getattr(module, "gradient_checkpointing", False) for module in model.modules()
        )
        self._checkpointed |= checkpointing and model.training and torch.is_grad_enabled()

    def force(self, site: RouterSite, module: nn.Module, args: Any, output: Any) -> Any:
        """Return a router's output with the replayed experts and their weights; a forward hook."""
        live = chosen_ids(site, output)
        logits, live_weights, _ = output
        if len(live) != len(self._ids):
            raise ReplayScopeError(
                f"router {site.path} got {len(live)} rows, the scope holds routes for {len(self._ids)}; one scope "
                "replays one batch: open a new one for another, and count padding rows in (valid=False)"
            )
        weigh = _WEIGHTS[type(module).__name__]
        if not torch.equal(weigh(module, logits.detach(), live), live_weights.detach()):
            raise UnsupportedError(
                f"router {site.path} ({type(module).__name__}) no longer weighs its experts as this version of "
                "moe-replay knows it; replayed weights would be wrong"
            )
        recorded = self._ids[:, self._column[site.layer]].to(live.device, torch.int64)
        ids = torch.where(self._valid.to(live.device)[:, None], recorded, live)
        if in_backward():
            self._num_recomputed += 1
        else:
            self._num_forwards[site.layer] += 1
        return logits, weigh(module, logits, ids), ids

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


def _weigh_softmax(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Softmax in float32, renormalised if the config says so, in the model's dtype.

    Source: transformers 5, `Qwen3MoeTopKRouter.forward`; the Qwen2-MoE and OLMoE routers are the
    same.
    """
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(1, ids)
    if router.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype)


def _weigh_mixtral(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Softmax in float32, always renormalised, left in float32.

    Source: transformers 5, `MixtralTopKRouter.forward`.
    """
    weights = torch.softmax(logits.float(), dim=-1).gather(1, ids)
    return weights / weights.sum(dim=-1, keepdim=True)


def _weigh_scaled_softmax(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Softmax in float32, scaled, never renormalised.

    Source: transformers 5, `DeepseekV2TopkRouter.forward`; groups limit the choice, not the
    weights.
    """
    weights = logits.softmax(dim=-1, dtype=torch.float32).gather(1, ids)
    return weights * router.routed_scaling_factor


def _weigh_sigmoid(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sigmoid without the expert bias, which only takes part in the choice; renormalised if set so.

    Source: transformers 5, `DeepseekV3TopkRouter.forward`; the GLM-4-MoE router is the same.
    """
    weights = logits.sigmoid().gather(1, ids)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * router.routed_scaling_factor


_WEIGHTS: dict[str, Weigh] = {
    "Qwen3MoeTopKRouter": _weigh_softmax,
    "Qwen2MoeTopKRouter": _weigh_softmax,
    "OlmoeTopKRouter": _weigh_softmax,
    "MixtralTopKRouter": _weigh_mixtral,
    "DeepseekV2TopkRouter": _weigh_scaled_softmax,
    "DeepseekV3TopkRouter": _weigh_sigmoid,
    "Glm4MoeTopkRouter": _weigh_sigmoid,
}
