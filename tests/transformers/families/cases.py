"""A tiny model of each family, and what every proof does with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_replay.testing.moe_families import MOE_FAMILIES, tiny_family
from moe_replay.transformers import RouterSite, find_routers, record_routes, replay_routes

BATCH, LENGTH = 2, 9
ROWS = BATCH * LENGTH


class Case:
    """A family's model, two sequences of tokens, and routes that no row would choose itself."""

    def __init__(self, family: str, **overrides: Any) -> None:
        self.family = family
        self.facts = MOE_FAMILIES[family]
        self.model = tiny_family(family, **overrides)
        self.sites = find_routers(self.model)
        self.layers = tuple(site.layer for site in self.sites)
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(3, 64, (BATCH, LENGTH), generator=generator)
        shape = (ROWS, len(self.sites), self.sites[0].num_experts)
        order = torch.rand(shape, generator=generator).argsort(-1)
        self.foreign = order[..., : self.sites[0].topk].contiguous()

    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        if self.facts.float32_router:
            for site in self.sites:
                site.module.float()

    def run(self) -> Tensor:
        """Return the logits, or what a family without a language head has in their place."""
        output = self.model(input_ids=self.tokens, use_cache=False)
        return next(iter(output.values()))

    def recorded(self) -> tuple[Tensor, Tensor]:
        """Return the live routes and output."""
        with torch.no_grad(), record_routes(self.model) as recorder:
            output = self.run()
        return recorder.take(), output

    def replayed(self, routes: Tensor, valid: Tensor | None = None) -> Tensor:
        valid = torch.ones(ROWS, dtype=torch.bool) if valid is None else valid
        with replay_routes(self.model, routes, valid, layers=self.layers):
            return self.run()


@contextmanager
def seen(sites: tuple[RouterSite, ...]) -> Iterator[dict[int, Any]]:
    """Collect by layer the ids that the experts get, or the output of a router that has none."""
    found: dict[int, Any] = {}

    def at_experts(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            found[layer] = next(v for v in given if not v.is_floating_point())

        return hook

    def at_router(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            found[layer] = (output[0] != 0).nonzero()[:, 1].reshape(len(output[0]), -1)

        return hook

    handles = []
    for site in sites:
        if type(site.module).__name__ == "Llama4Router":
            handles.append(site.module.register_forward_hook(at_router(site.layer)))
        else:
            experts = site.block.get_submodule("experts")
            hook = at_experts(site.layer)
            handles.append(experts.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def closest(first: Tensor, second: Tensor) -> float:
    """Return the smallest difference of any token's outputs."""
    return float((first - second).abs().amax(-1).min())


@contextmanager
def quiet() -> Iterator[None]:
    """Let pass what torch and transformers warn of in their own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
