"""Find the routers of a Hugging Face model by walking its modules.

In: a built model, also one without memory. Out: RouterSite for each router, in layer order.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_replay.errors import UnsupportedError
from moe_replay.transformers.routers.weighing import Weigh, class_names, weighing_of

_ROUTER = re.compile(r"(Router|Gate|Gating)$")
# A block that chooses by this method has a router that only returns logits (DBRX).
_BLOCK_METHOD = "route_tokens_to_experts"
# Attributes that state experts, the first that a router has: zaya counts its null expert and
# longcat_flash its zero experts apart from `num_experts`.
_NUM_EXPERTS = ("num_router_classes", "n_routed_experts", "num_experts")
_TOPK = ("num_experts_per_tok", "top_k_experts")

REFUSED = {
    "SwitchTransformersTop1Router": "it takes an argmax and drops the tokens over its capacity",
    "NllbMoeTop2Router": "it takes an argmax and drops the tokens over its capacity",
    "DogeCDMoE": "its product keys mix the tokens of a batch, so that routes depend on the batch",
    "VitPoseBackboneMoeMLP": "its experts are the data set's, given from outside",
    "JetMoeTopKGating": "a layer has two routers, and a trace holds one route a layer",
}
"""Class of a router or block -> why its routes can neither be recorded nor replayed."""

FIXED = frozenset({"DeepseekV4HashRouter"})
"""Routers whose ids are a function of the token: they choose nothing, and are left alone."""


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
    """Experts that it chooses from, null experts included."""
    topk: int
    """Experts that it chooses for each token."""
    owner: nn.Module
    """The module whose ``method`` makes the choice: the router, what PEFT wraps it in, or its
    block."""
    method: str
    """``forward``, or the block's own method."""
    block: nn.Module
    """The module that holds the router and its experts."""
    weigh: Weigh | None
    """The registered function that weighs its experts; None where the router's own code does."""

    def describe(self) -> str:
        """Return path and class for a message."""
        return f"router {self.path} ({type(self.module).__name__})"


def find_routers(model: nn.Module) -> tuple[RouterSite, ...]:
    """Return the routers of ``model`` in the order of their layers; empty for a dense model.

    A router is a module whose class ends in Router, Gate or Gating, or is registered with
    `weigh_experts`, inside a module that has ``experts``. A layer's number is its index in the list
    of decoder layers that holds it, read from the built model. Routers of the vision part of a
    layer that also has one for text are left out; the scopes refuse images there.

    Raises:
        UnsupportedError: when experts have no router of their own, a router is of a refused class
            or does not state its experts and top-k, or the routers differ in them, sit in more than
            one stack of layers, or share a layer.
    """
    modules = dict(model.named_modules())
    blocks = {path for path, module in modules.items() if _has_experts(module)}
    for path, module in modules.items():
        if reason := _refusal(module):
            raise UnsupportedError(
                f"{path or 'the model'} is a {type(module).__name__}, which replay refuses: {reason}"
            )
    sites: dict[str, RouterSite] = {}
    served = set()
    for path, module in modules.items():
        is_fixed = bool(class_names(type(module)) & FIXED)
        block = _ancestor(path, blocks) if is_fixed or _is_router(module) else None
        if block is None:
            continue
        served.add(block)
        if not is_fixed:
            child = path.removeprefix(f"{block}.").split(".")[0]
            sites[f"{block}.{child}"] = _site(model, path, module, modules[block], child)
    if homeless := sorted(blocks - served):
        block_module = modules[homeless[0]]
        raise UnsupportedError(
            f"expert block {homeless[0]} ({type(block_module).__name__}) has no router module that returns its choice "
            f"(children: {sorted(dict(block_module.named_children()))}); routes of this family cannot be recorded or "
            "replayed"
        )
    return _in_layers(model, list(sites.values()))


def left_out(model: nn.Module, sites: tuple[RouterSite, ...]) -> list[tuple[str, nn.Module]]:
    """Return path and module of routers beside ``sites`` that must not run: of vision parts."""
    known = {site.module for site in sites}
    blocks = {path for path, module in model.named_modules() if _has_experts(module)}
    layers = {site.layer for site in sites}
    return [
        (path, module)
        for path, module in model.named_modules()
        if _is_router(module)
        and module not in known
        and _is_vision(path)
        and _ancestor(path, blocks)
        and _decoder_layer(path)[1] in layers
    ]


def _in_layers(model: nn.Module, sites: list[RouterSite]) -> tuple[RouterSite, ...]:
    name = type(model).__name__
    by_layer = defaultdict(list)
    for site in sites:
        by_layer[_decoder_layer(site.path)].append(site)
    stacks = {stack for stack, _ in by_layer}
    if len(stacks) > 1:
        raise UnsupportedError(
            f"{name} has routers in several stacks of layers, {sorted(stacks)}; their layer numbers would collide: "
            "pass the language model alone"
        )
    kept = []
    for (_, layer), together in by_layer.items():
        text = [site for site in together if not _is_vision(site.path)] or together
        if len(text) > 1:
            raise UnsupportedError(
                f"layer {layer} of {name} has {len(text)} routers, {[site.path for site in text]}; a trace holds one "
                "route a layer"
            )
        kept += text
    shapes = {(site.num_experts, site.topk) for site in kept}
    if len(shapes) > 1:
        raise UnsupportedError(
            f"routers of {name} differ in (experts, top-k): {sorted(shapes)}; a trace holds one of each"
        )
    return tuple(sorted(kept, key=lambda site: site.layer))


def _site(
    model: nn.Module, path: str, router: nn.Module, block: nn.Module, child: str
) -> RouterSite:
    num_experts, topk = _dimensions(path, router, block, model)
    in_block = hasattr(block, _BLOCK_METHOD)
    return RouterSite(
        layer=_decoder_layer(path)[1],
        path=path,
        module=router,
        num_experts=num_experts,
        topk=topk,
        owner=block if in_block else block.get_submodule(child),
        method=_BLOCK_METHOD if in_block else "forward",
        block=block,
        weigh=weighing_of(router),
    )


def _has_experts(module: nn.Module) -> bool:
    return getattr(module, "_modules", {}).get("experts") is not None


def _is_router(module: nn.Module) -> bool:
    return bool(_ROUTER.search(type(module).__name__)) or weighing_of(module) is not None


def _refusal(module: nn.Module) -> str | None:
    names = class_names(type(module)) & REFUSED.keys()
    return next((REFUSED[name] for name in sorted(names)), None)


def _is_vision(path: str) -> bool:
    return "vision" in path or "visual" in path


def _ancestor(path: str, blocks: set[str]) -> str | None:
    while path:
        path = path.rpartition(".")[0]
        if path in blocks:
            return path
    return None


def _decoder_layer(path: str) -> tuple[str, int]:
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:index]), int(part)
    raise UnsupportedError(f"router {path} lies in no list of layers, so it has no layer number")


def _dimensions(
    path: str, router: nn.Module, block: nn.Module, model: nn.Module
) -> tuple[int, int]:
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    counts = [getattr(router, name, None) for name in _NUM_EXPERTS]
    counts += [child.out_features for child in router.children() if isinstance(child, nn.Linear)]
    num_experts = next((count for count in counts if count), _rows(router))
    topks = [getattr(module, "top_k", None) for module in (router, block)]
    topks += [getattr(config, name, None) for name in _TOPK]
    topk = next((count for count in topks if count), None)
    if not isinstance(num_experts, int) or not isinstance(topk, int):
        raise UnsupportedError(
            f"router {path} ({type(router).__name__}) does not state its experts and top-k (got {num_experts}, {topk})"
        )
    return num_experts, topk


def _rows(router: Any) -> int | None:
    weight = getattr(router, "weight", None)
    return None if weight is None else weight.shape[0]
