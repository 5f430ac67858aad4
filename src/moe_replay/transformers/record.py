"""Record the routes of a Hugging Face model at its router modules, where the choice is made.

In: a transformers model. Out: RouterSite, RouteRecorder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Integer
from torch import nn

from moe_replay.errors import ReplayScopeError, UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouterSite:
    """One router of a model, and where it sits."""

    layer: int
    """Global decoder-layer index, from 0."""
    path: str
    """Name of the module in the model, such as ``model.layers.3.mlp.gate``."""
    module: nn.Module
    """The router."""
    num_experts: int
    """Routed experts that it chooses from."""
    topk: int
    """Experts that it chooses for each token."""


def find_routers(model: nn.Module) -> tuple[RouterSite, ...]:
    """Return the routers of ``model`` in the order of their layers; empty for a dense model.

    A layer's number is its index in the list of decoder layers that holds it, read from the built
    model.

    Raises:
        UnsupportedError: when an expert block has no router module of its own, its router states
            neither experts nor top-k, or the routers differ in them or sit in more than one stack
            of layers.
    """
    sites = []
    stacks = set()
    for path, block in model.named_modules():
        if "experts" not in dict(block.named_children()):
            continue
        name, router = _router_of(path, block)
        stack, layer = _decoder_layer(path)
        stacks.add(stack)
        num_experts, topk = _dimensions(f"{path}.{name}", router, model)
        sites.append(
            RouterSite(
                layer=layer,
                path=f"{path}.{name}",
                module=router,
                num_experts=num_experts,
                topk=topk,
            )
        )
    if len(stacks) > 1:
        raise UnsupportedError(
            f"{type(model).__name__} has routers in several stacks of layers, {sorted(stacks)}; their layer numbers "
            "would collide: pass the language model alone"
        )
    shapes = {(site.num_experts, site.topk) for site in sites}
    if len(shapes) > 1:
        raise UnsupportedError(
            f"routers of {type(model).__name__} differ in (experts, top-k): {sorted(shapes)}; a trace holds one of each"
        )
    return tuple(sorted(sites, key=lambda site: site.layer))


class RouteRecorder:
    """Collects the expert ids that the routers of one model choose, in the order of the rows.

    Rows are the tokens of ``input_ids`` flattened, batch first: row ``b * length + t``, padding
    included.
    """

    def __init__(self, sites: tuple[RouterSite, ...]) -> None:
        self.layers = tuple(site.layer for site in sites)
        self.num_experts = sites[0].num_experts
        self.topk = sites[0].topk
        self._sites = sites
        self._dtype = torch.uint8 if self.num_experts <= 256 else torch.int32
        self._parts: list[list[torch.Tensor]] = [[] for _ in sites]

    def take(self) -> Integer[torch.Tensor, "rows layers topk"]:
        """Return the routes of all forward passes since the last call, and forget them.

        The ids are uint8 up to 256 experts and int32 above; entry ``i`` of the layer dim is
        ``self.layers[i]``.

        Raises:
            ReplayScopeError: when nothing was recorded, or the routers saw different numbers of
                rows.
        """
        parts, self._parts = self._parts, [[] for _ in self._sites]
        rows = [sum(len(part) for part in layer) for layer in parts]
        if rows[0] == 0 or len(set(rows)) > 1:
            seen = dict(zip(self.layers, rows, strict=True))
            raise ReplayScopeError(
                f"routers recorded these counts of rows by layer: {seen}; expected one count above 0 for all: run "
                "complete forward passes of the recorded model between two calls"
            )
        columns = [layer[0] if len(layer) == 1 else torch.cat(layer) for layer in parts]
        return torch.stack(columns, dim=1).to(self._dtype)

    def add(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        """Take one router's output; a forward hook."""
        if not in_backward():
            self._parts[index].append(chosen_ids(self._sites[index], output))


@contextmanager
def record_routes(model: nn.Module) -> Iterator[RouteRecorder]:
    """Record the routes of every forward pass of ``model`` inside the scope.

    The hooks live on this model's routers alone and go when the scope ends, also after an
    exception. Recomputation in a backward pass is not recorded again. Opened inside a replay scope,
    it sees the replayed routes; opened around one, the live ones.

    Example:
        >>> with record_routes(model) as recorder:
        ...     model(input_ids)
        >>> recorder.take().shape
        torch.Size([20, 4, 2])

    Raises:
        UnsupportedError: when the model is dense, or its routers cannot be recorded (see
            `find_routers`).
    """
    sites = find_routers(model)
    if not sites:
        raise UnsupportedError(f"{type(model).__name__} is dense: it has no routes to record")
    recorder = RouteRecorder(sites)
    with ExitStack() as hooks:
        for index, site in enumerate(sites):
            hooks.enter_context(site.module.register_forward_hook(partial(recorder.add, index)))
        yield recorder


def chosen_ids(site: RouterSite, output: Any) -> Integer[torch.Tensor, "rows topk"]:
    """Return the expert ids in a router's output: its only integer tensor.

    Raises:
        UnsupportedError: when there is no such tensor, or it does not hold ``topk`` ids a row.
    """
    parts = output if isinstance(output, tuple) else (output,)
    ids = [
        part
        for part in parts
        if isinstance(part, torch.Tensor)
        and not (part.is_floating_point() or part.dtype is torch.bool)
    ]
    if len(ids) != 1 or ids[0].dim() != 2 or ids[0].shape[1] != site.topk:
        shapes = [f"{p.dtype}{list(p.shape)}" for p in parts if isinstance(p, torch.Tensor)]
        raise UnsupportedError(
            f"router {site.path} ({type(site.module).__name__}) returns {shapes}, expected one integer tensor of "
            f"[rows, {site.topk}] expert ids; routes of this family cannot be read at its router"
        )
    return ids[0]


def in_backward() -> bool:
    """Whether autograd runs a backward pass here, so that a forward is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _router_of(path: str, block: nn.Module) -> tuple[str, nn.Module]:
    children = dict(block.named_children())
    for name in ("gate", "router"):
        if name in children and "Router" in type(children[name]).__name__:
            return name, children[name]
    raise UnsupportedError(
        f"expert block {path} ({type(block).__name__}) has no router module that returns its choice (children: "
        f"{sorted(children)}); routes of this family cannot be recorded or replayed"
    )


def _decoder_layer(path: str) -> tuple[str, int]:
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:index]), int(part)
    raise UnsupportedError(
        f"expert block {path} lies in no list of layers, so it has no layer number"
    )


def _dimensions(path: str, router: nn.Module, model: nn.Module) -> tuple[int, int]:
    config = getattr(model, "config", None)
    weight = getattr(router, "weight", None)
    num_experts = getattr(router, "num_experts", None) or (
        weight.shape[0] if isinstance(weight, torch.Tensor) else None
    )
    topk = getattr(router, "top_k", None) or getattr(config, "num_experts_per_tok", None)
    if not isinstance(num_experts, int) or not isinstance(topk, int):
        raise UnsupportedError(
            f"router {path} ({type(router).__name__}) does not state its experts and top-k (got {num_experts}, {topk})"
        )
    return num_experts, topk
