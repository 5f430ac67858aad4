"""A router that replay would get wrong is refused at its first call, by name and fault."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_replay.errors import UnsupportedError
from moe_replay.transformers import record_routes, replay_routes, weigh_experts

EXPERTS, TOPK, ROWS = 8, 2, 12
Route = Callable[[nn.Module, Tensor], Any]


class PlantedRouter(nn.Module):
    """Scores rows by a random matrix, and goes on as it is told to."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.route = EXPERTS, TOPK, route
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(EXPERTS, 4, generator=generator))

    def forward(self, x: Tensor) -> Any:
        return self.route(self, x @ self.weight.T)


class ArgmaxRouter(PlantedRouter):
    """Chooses without a top-k call, so that a user must register what it weighs."""


class OtherRouter(PlantedRouter):
    """Another one, with wrong weights registered."""


class Experts(nn.Module):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return x * (weights * (1 + ids)).sum(-1, keepdim=True)


class Block(nn.Module):
    def __init__(self, gate: nn.Module, order: int = 1) -> None:
        super().__init__()
        self.gate, self.experts, self.order = gate, Experts(), order

    def forward(self, x: Tensor) -> Tensor:
        _, weights, ids = self.gate(x)
        return self.experts(x, ids[:: self.order], weights)


class Model(nn.Module):
    def __init__(self, route: Route, kind: type[PlantedRouter] = PlantedRouter) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(kind(route))])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def rows() -> Tensor:
    return torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))


def foreign() -> Tensor:
    return torch.rand(ROWS, 1, EXPERTS, generator=torch.Generator().manual_seed(2)).argsort(-1)[
        ..., :TOPK
    ]


def replayed(model: nn.Module, ids: Tensor) -> Tensor:
    with replay_routes(model, ids, torch.ones(ROWS, dtype=torch.bool), layers=(0,)):
        return model(rows())


def choose(scores: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = torch.topk(scores, TOPK, dim=-1)
    return values, ids


def plain(router: nn.Module, logits: Tensor) -> Any:
    return logits, *choose(logits.softmax(-1))


def second_choice(router: nn.Module, logits: Tensor) -> Any:
    weights, ids = choose(logits.softmax(-1))
    weights, order = torch.topk(weights, TOPK, dim=-1, largest=False)
    return logits, weights, ids.gather(1, order)


def by_sort(router: nn.Module, logits: Tensor) -> Any:
    scores = logits.softmax(-1)
    _, ids = choose(scores)
    return logits, scores.sort(-1, descending=True).values[:, :TOPK], ids


def argsort(router: nn.Module, logits: Tensor) -> Any:
    scores = logits.softmax(-1)
    ids = scores.argsort(-1, descending=True)[:, :TOPK]
    return logits, scores.gather(1, ids), ids


def mask_after(router: nn.Module, logits: Tensor) -> Any:
    scores = logits.softmax(-1)
    _, ids = choose(scores)
    kept = scores >= scores.kthvalue(EXPERTS - TOPK + 1, dim=-1, keepdim=True).values
    return logits, (scores * kept).gather(1, ids), ids


def where_mask(router: nn.Module, logits: Tensor) -> Any:
    scores = logits.softmax(-1)
    group = scores.view(-1, 2, EXPERTS // 2).amax(-1).argmax(-1, keepdim=True)
    live = torch.arange(EXPERTS) // (EXPERTS // 2) == group
    return logits, *choose(torch.where(live, scores, 0.0))


def multiply_mask(router: nn.Module, logits: Tensor) -> Any:
    scores = logits.softmax(-1)
    group = scores.view(-1, 2, EXPERTS // 2).amax(-1).argmax(-1, keepdim=True)
    live = torch.arange(EXPERTS) // (EXPERTS // 2) == group
    return logits, *choose(scores * live)


def sorted_ids(router: nn.Module, logits: Tensor) -> Any:
    scores = logits.softmax(-1)
    ids = choose(scores)[1].sort(-1).values
    return logits, scores.gather(1, ids), ids


def bonus_by_rank(router: nn.Module, logits: Tensor) -> Any:
    weights, ids = choose(logits.softmax(-1))
    return logits, weights * torch.tensor([1.5, 1.0]), ids


def capacity(router: nn.Module, logits: Tensor) -> Any:
    weights, ids = choose(logits.softmax(-1))
    place = nn.functional.one_hot(ids[:, 0], EXPERTS).cumsum(0).gather(1, ids[:, :1])
    return logits, weights * (place <= 1), ids


def counting(router: Any, logits: Tensor) -> Any:
    router.calls = getattr(router, "calls", 0) + 1
    weights, ids = choose(logits.softmax(-1))
    return logits, weights * router.calls, ids


def of_other_width(router: nn.Module, logits: Tensor) -> Any:
    return logits, *choose(logits[:, :-1].softmax(-1))


FAULTS: dict[Route, str] = {
    second_choice: "chooses 2 of 2 in its last top-k call, though it states 2 of 8",
    by_sort: "returns no weights of the experts",
    argsort: "makes no top-k call",
    mask_after: "a weight of 0",
    where_mask: "a weight of 0",
    multiply_mask: "a weight of 0",
    sorted_ids: "returns no weights of the experts",
    bonus_by_rank: "weighs experts by their place",
    capacity: "a weight of 0|computes another",
    counting: "computes another output",
    of_other_width: "chooses 2 of 7",
}


@pytest.mark.parametrize("route", FAULTS, ids=lambda route: route.__name__)
def test_a_planted_router_is_refused_by_name(route: Route) -> None:
    model = Model(route)
    with pytest.raises(UnsupportedError, match=FAULTS[route]) as caught:
        replayed(model, foreign())
    assert r"layers.0.gate (PlantedRouter)" in str(caught.value)


def test_a_plain_router_passes_and_weighs_the_replayed_experts() -> None:
    model, ids = Model(plain), foreign()
    scores = (rows() @ model.layers[0].gate.weight.T).softmax(-1)
    weights = scores.gather(1, ids[:, 0])
    expected = rows() * (weights * (1 + ids[:, 0])).sum(-1, keepdim=True)
    assert torch.allclose(replayed(model, ids), expected, atol=1e-6)


def test_a_block_that_changes_the_ids_after_its_router_is_refused() -> None:
    class Turning(Block):
        def forward(self, x: Tensor) -> Tensor:
            _, weights, ids = self.gate(x)
            return self.experts(x, ids.flip(-1), weights)

    model = Model(plain)
    model.layers[0] = Turning(PlantedRouter(plain))
    with pytest.raises(UnsupportedError, match="got other ids than it returned"):
        replayed(model, foreign())


def test_one_faulty_layer_of_two_is_refused() -> None:
    model = Model(plain)
    model.layers.append(Block(PlantedRouter(where_mask)))
    model.forward = lambda x: model.layers[1](model.layers[0](x))
    ids = foreign().repeat(1, 2, 1)
    with (
        pytest.raises(UnsupportedError, match=r"layers\.1\.gate"),
        replay_routes(model, ids, torch.ones(ROWS, dtype=torch.bool), layers=(0, 1)),
    ):
        model(rows())


def test_far_experts_that_underflow_to_0_are_no_fault() -> None:
    model = Model(plain)
    with torch.no_grad():
        model.layers[0].gate.weight.mul_(200)
        assert bool(
            (plain(model, rows() @ model.layers[0].gate.weight.T)[0].softmax(-1) == 0).any()
        )
        replayed(model, foreign())


def test_a_user_registers_the_weights_of_a_router_without_top_k() -> None:
    @weigh_experts.register
    def _(router: ArgmaxRouter, logits: Tensor, ids: Tensor) -> Tensor:
        return logits.softmax(-1).gather(1, ids)

    model, ids = Model(argsort, ArgmaxRouter), foreign()
    assert torch.equal(replayed(model, ids), replayed(Model(plain), ids))
    with record_routes(model) as recorder:
        model(rows())
    live = (rows() @ model.layers[0].gate.weight.T).argsort(-1, descending=True)[:, :TOPK]
    assert recorder.take()[:, 0].tolist() == live.tolist()


def test_registered_weights_that_are_not_the_routers_own_are_refused() -> None:
    @weigh_experts.register
    def _(router: OtherRouter, logits: Tensor, ids: Tensor) -> Tensor:
        return logits.sigmoid().gather(1, ids)

    with pytest.raises(UnsupportedError, match="not weighed by its registered function"):
        replayed(Model(argsort, OtherRouter), foreign())


def test_the_global_random_state_is_not_touched() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    replayed(Model(plain), foreign())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("batch", "length"), [(2, 300), (600, 1), (1, 600)])
def test_a_long_batch_is_proven_on_its_first_rows(batch: int, length: int) -> None:
    def flat(route: Route) -> Route:
        return lambda router, logits: route(router, logits.reshape(-1, EXPERTS))

    x = torch.randn(batch, length, 4, generator=torch.Generator().manual_seed(1))
    ids = torch.rand(600, 1, EXPERTS, generator=torch.Generator().manual_seed(3)).argsort(-1)[
        ..., :TOPK
    ]
    for route, fits in ((plain, True), (where_mask, False)):
        gate = PlantedRouter(flat(route))
        model = nn.Module()
        model.layers = nn.ModuleList([Block(gate)])
        refused = pytest.raises(UnsupportedError, match="a weight of 0")
        with (
            nullcontext() if fits else refused,
            replay_routes(model, ids, torch.ones(600, dtype=torch.bool), layers=(0,)),
        ):
            assert torch.equal(gate(x)[2], ids[:, 0])
