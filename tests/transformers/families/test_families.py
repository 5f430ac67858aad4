"""Every family of `MOE_FAMILIES` is recorded and replayed exactly.

What a family cannot run itself is named there, and tested too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from tests.transformers.families.cases import LENGTH, ROWS, Case, closest, quiet, seen
from tests.transformers.families.references import REFERENCES
from torch import Tensor

from moe_replay.transformers import RouterSite, record_routes, replay_routes


def test_record_holds_the_ids_that_the_experts_get(case: Case) -> None:
    with torch.no_grad(), seen(case.sites) as got:
        routes, _ = case.recorded()
    for column, layer in enumerate(case.layers):
        recorded = routes[:, column].long()
        if case.family == "zaya":  # Its null expert, 8, becomes expert 0 with weight 0.
            recorded = recorded.masked_fill(recorded == 8, 0)
        elif case.family == "llama4":  # Its router gives scores, not ids.
            recorded = recorded.sort(-1).values
        assert torch.equal(recorded, got[layer].reshape(ROWS, -1).long())


def test_own_routes_change_no_bit(case: Case) -> None:
    with torch.no_grad(), quiet():
        for implementation in ("eager", "grouped_mm", "batched_mm"):
            try:
                case.model.set_experts_implementation(implementation)
            except ValueError:
                continue
            routes, live = case.recorded()
            assert torch.equal(case.replayed(routes), live)


def test_own_routes_change_no_bit_in_bfloat16(case: Case) -> None:
    case.cast(torch.bfloat16)
    routes, live = case.recorded()
    with torch.no_grad():
        assert torch.equal(case.replayed(routes), live)


def test_own_routes_change_no_bit_under_autocast(case: Case) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), quiet():
        if "autocast" in case.facts.without:
            with pytest.raises(RuntimeError, match="scalar type"):
                case.run()
            return
        routes, live = case.recorded()
        assert torch.equal(case.replayed(routes), live)


def test_d2_constant_routes_change_every_token(case: Case) -> None:
    constant = torch.arange(case.sites[0].topk).expand(case.foreign.shape)
    _, live = case.recorded()
    with torch.no_grad():
        assert closest(case.replayed(constant), live) > 1e-4


def test_foreign_routes_give_the_output_of_the_float64_reference(case: Case) -> None:
    case.cast(torch.float64)
    with torch.no_grad():
        live = case.run()
        replayed = case.replayed(case.foreign)
        with ExitStack() as stack:
            for at, site in enumerate(case.sites):
                stack.enter_context(_forced(case, site, case.foreign[:, at]))
            expected = case.run()
        assert closest(expected, live) > 1e-4
        assert torch.allclose(replayed, expected, rtol=1e-5, atol=1e-5)
        # Of two samples one has two tokens' routes swapped, in one layer.
        swapped = case.foreign.clone()
        swapped[[3, 4], -1] = swapped[[4, 3], -1]
        assert not torch.allclose(case.replayed(swapped), expected, rtol=1e-5, atol=1e-5)


@contextmanager
def _forced(case: Case, site: RouterSite, ids: Tensor) -> Iterator[None]:
    """Put the reference's weights into what a router returns; a way that replay does not go."""
    rule, block = REFERENCES[case.family], site.block

    def hook(module: Any, args: Any, output: Any) -> Any:
        parts = list(output) if isinstance(output, tuple) else [output]
        if case.family == "llama4":
            logits = parts[1]
            weights = rule(module, logits.double(), ids, args[0])
            return torch.zeros_like(logits).scatter(1, ids, weights.to(logits)), logits
        weights = rule(module, parts[0].reshape(ROWS, -1).double(), ids, args[0])
        if case.family == "dbrx":
            block.route_tokens_to_experts = lambda logits: (weights.to(logits), ids)
            return output
        if case.family == "inkling":
            weights, shared = weights.tensor_split([ids.shape[1]], 1)
            parts[3] = shared.to(parts[3])
        null = ids == getattr(module, "num_router_classes", 0) - 1
        parts[1:3] = [weights.to(parts[1]), ids.masked_fill(null, 0)]
        return tuple(parts)

    with site.module.register_forward_hook(hook):
        yield
    vars(block).pop("route_tokens_to_experts", None)


def test_only_valid_rows_are_replayed(case: Case) -> None:
    own, _ = case.recorded()
    valid = torch.arange(ROWS) % 3 > 0
    with (
        torch.no_grad(),
        replay_routes(case.model, case.foreign, valid, layers=case.layers),
        record_routes(case.model) as recorder,
    ):
        case.run()
    ran = recorder.take().long()
    assert torch.equal(ran[valid], case.foreign[valid])
    assert torch.equal(ran[~valid, 0], own[~valid, 0].long())


def test_another_samples_routes_change_that_sample_alone(case: Case) -> None:
    own, live = case.recorded()
    mixed = own.clone()
    mixed[LENGTH:] = own[:LENGTH]
    with torch.no_grad():
        output = case.replayed(mixed)
    difference = (output - live).abs().amax(-1)
    assert difference[0].max() < 1e-4
    assert difference[1].max() > 1e-3


def test_the_gate_has_the_gradient_of_finite_differences(case: Case) -> None:
    case.cast(torch.float64)
    generator = torch.Generator().manual_seed(3)
    gates = [p for site in case.sites for p in site.module.parameters() if p.requires_grad]
    sides = torch.randn(case.run().shape, generator=generator).double()

    def loss() -> Tensor:
        return (case.replayed(case.foreign).double() * sides).sum()

    gradients = torch.autograd.grad(loss(), gates, allow_unused=True)
    known = [(p, g) for p, g in zip(gates, gradients, strict=True) if g is not None]
    gates = [gate for gate, _ in known]
    # Half along the gradient, so that the slope stands out of float32 routers' rounding.
    norm = torch.stack([g.norm() for _, g in known]).norm()
    noise = [torch.randn(g.shape, generator=generator).to(g) for _, g in known]
    ways = [g / norm + n / n.numel() ** 0.5 for (_, g), n in zip(known, noise, strict=True)]
    slope = sum(float((g * w).sum()) for (_, g), w in zip(known, ways, strict=True))
    assert slope > 1e-4
    errors = []
    for step in (1e-3, 1e-4, 1e-2):
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                for gate, way in zip(gates, ways, strict=True):
                    gate.add_(way, alpha=sign * step)
                ends.append(float(loss()))
        with torch.no_grad():
            for gate, way in zip(gates, ways, strict=True):
                gate.add_(way, alpha=step)
        errors.append(abs((ends[0] - ends[1]) / (2 * step) - slope) / abs(slope))
        if errors[-1] < 1e-2:
            return
    pytest.fail(f"the slope {slope} is off by {errors} for three steps")


def test_checkpointing_gives_the_same_gradients(case: Case) -> None:
    sides = torch.randn(case.run().shape, generator=torch.Generator().manual_seed(3))
    case.model.train()
    for module in case.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if case.family == "phimoe":  # It samples its experts in training.
        for site in case.sites:
            site.module.eval()

    def gradients() -> list[Tensor]:
        case.model.zero_grad()
        valid = torch.ones(ROWS, dtype=torch.bool)
        with replay_routes(case.model, case.foreign, valid, layers=case.layers):
            (case.run() * sides).sum().backward()
        return [p.grad for p in case.model.parameters() if p.grad is not None]

    plain = gradients()
    for reentrant in (False, True):
        options = {"use_reentrant": reentrant}
        if "checkpointing" in case.facts.without:
            with quiet(), pytest.raises(ValueError, match="not compatible with gradient"):
                case.model.gradient_checkpointing_enable(options)
            continue
        with quiet():
            case.model.gradient_checkpointing_enable(options)
            again = gradients()
        assert len(again) == len(plain)
        for first, second in zip(plain, again, strict=True):
            assert torch.allclose(first, second, rtol=1e-3, atol=1e-5)
