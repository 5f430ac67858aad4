"""Prove on a router's first call that replayed ids give it the weights of just these experts.

A router that masks, drops, sorts or permutes in a way that replay cannot follow is refused by name
here, before any of its outputs are used.

In: a router's call. Out: Proof, or UnsupportedError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import nn
from torch.overrides import TorchFunctionMode

from moe_replay.errors import UnsupportedError
from moe_replay.transformers.routers.choice import Choice, Decide
from moe_replay.transformers.routers.sites import RouterSite

# Weights of turned ids come of the same scores in another order of sums.
_TOLERANCE = 1e-2
# Makes logits small where a router is linear, so that a far expert does not underflow to 0.
_DAMPING = 2.0**-10
# Logits of a policy that diverged are made this small at least: e^-8 is far from underflow.
_SMALL_RANGE = 8.0
_SQUASHES = (
    *(torch.softmax, torch.Tensor.softmax, nn.functional.softmax),
    *(torch.sigmoid, torch.Tensor.sigmoid, nn.functional.sigmoid),
)
# A proof needs no more rows of the call than these.
_MAX_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What the rehearsal of a router found out."""

    deciding: int
    """Number of the top-k call that chooses, from 0: the last."""
    ids_at: int | None
    """Entry of the output that is the chosen ids themselves; None when none is, as where a null
    expert is renamed after the choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """A router call that can be repeated: a repetition gets its own inputs and the same noise."""

    method: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, deciding: int | None, decide: Decide, scale: float = 1.0) -> tuple[Choice, Any]:
        args = [_own(value, scale) for value in self.args]
        kwargs = {name: _own(value, scale) for name, value in self.kwargs.items()}
        choice = Choice(deciding=deciding, decide=decide)
        with torch.random.fork_rng(devices=self._devices()), choice:
            return choice, self.method(*args, **kwargs)

    def _devices(self) -> list[int]:
        values = [*self.args, *self.kwargs.values()]
        found = {value.device for value in values if isinstance(value, torch.Tensor)}
        return [device.index for device in found if device.type == "cuda"]


class _WidestRange(TorchFunctionMode):
    """While active, finds the widest range of logits in a row that become probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.widest = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SQUASHES:
            logits = (args[0] if args else kwargs["input"]).detach().float()
            self.widest = max(self.widest, float((logits.amax(-1) - logits.amin(-1)).max()))
        return func(*args, **kwargs)


def rehearse(
    site: RouterSite, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Proof:
    """Run a router's call a few times without gradient, and return how to replay in it.

    Live ids must give the live output bit for bit. Other ids must come back with the weights of
    these experts: given in another order they give the weights in that order, and no expert weighs
    0. The other ids are the same in every run, so no random state is used.

    Raises:
        UnsupportedError: naming the router and what it failed.
    """
    call = _few_rows(method, args, kwargs)
    with torch.no_grad():
        live, output = call.run(None, lambda ids: ids)
        if live.chosen is None:
            raise _refused(site, "makes no top-k call, so where it chooses is not known")
        shape = (live.num_scores, live.chosen.shape[-1])
        if shape != (site.num_experts, site.topk):
            raise _refused(
                site,
                f"chooses {shape[1]} of {shape[0]} in its last top-k call, though it states {site.topk} of "
                f"{site.num_experts} experts",
            )
        deciding = live.num_calls - 1
        ids = live.chosen.reshape(-1, site.topk)
        _, again = call.run(deciding, lambda _: ids)
        if not _equal(output, again):
            raise _refused(site, "computes another output when its own choice is replayed")
        spread = _spread(ids, site.num_experts)
        given, straight = call.run(deciding, lambda _: spread)
        _, turned = call.run(deciding, lambda _: spread.roll(1, -1))
        weights = _weights(site, straight, turned, spread)
        if _zeros(weights, straight, spread):
            # A far expert may underflow to 0 by itself; with damped logits only a mask gives 0.
            with _WidestRange() as range_:
                call.run(deciding, lambda _: spread)
            damping = min(_DAMPING, _SMALL_RANGE / max(range_.widest, 1.0))
            _, damped = call.run(deciding, lambda _: spread, damping)
            _, turned = call.run(deciding, lambda _: spread.roll(1, -1), damping)
            if _zeros(_weights(site, damped, turned, spread), damped, spread):
                raise _refused(site, "gives experts that it did not choose itself a weight of 0")
    parts = _parts(straight)
    ids_at = next((at for at, part in enumerate(parts) if part is given.chosen), None)
    return Proof(deciding=deciding, ids_at=ids_at)


def _few_rows(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    """Return the call with its first rows: 4 x 2048 tokens become 1 x 256."""
    wide = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim() > 1]
    lead = wide[0].shape[:-1] if wide else torch.Size()

    def cut(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[:-1] != lead:
            return value
        if len(lead) == 1:
            return value[:_MAX_ROWS]
        return value[: max(1, _MAX_ROWS // max(1, lead[1])), :_MAX_ROWS]

    if len(lead) in (1, 2) and lead.numel() > _MAX_ROWS:
        args, kwargs = tuple(map(cut, args)), {name: cut(v) for name, v in kwargs.items()}
    return _Call(method=method, args=args, kwargs=kwargs)


def rehearse_weighing(site: RouterSite, output: Any) -> None:
    """Check the registered function of a router against its live output.

    Raises:
        UnsupportedError: when the output is not ``(logits, weights, ids)``, or the function gives
            other weights at the live ids.
    """
    if site.weigh is None or not (isinstance(output, tuple) and len(output) == 3):
        raise _refused(site, "does not return (logits, weights, ids), as a registered one must")
    logits, weights, ids = output
    if (logits.shape[-1], ids.shape[-1]) != (site.num_experts, site.topk):
        raise _refused(
            site,
            f"returns {ids.shape[-1]} ids of {logits.shape[-1]} experts, though it states {site.topk} of "
            f"{site.num_experts}",
        )
    with torch.no_grad():
        if not torch.equal(site.weigh(site.module, logits, ids), weights):
            raise _refused(
                site, "is not weighed by its registered function as by itself, at its live ids"
            )


def kind_of(site: RouterSite, method: Callable[..., Any]) -> tuple[Any, ...]:
    """Return what two routers share if they compute the same function of their tensors."""
    routers = [*site.owner.modules()] if site.owner is not site.block else [site.block]
    settings = tuple((type(module), _settings(module, site.method)) for module in routers)
    return (getattr(method, "__func__", method), settings)


def _settings(module: nn.Module, method: str) -> tuple[Any, ...]:
    plain = tuple(
        (name, value if isinstance(value, int | float | str | bool) else id(value))
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name != method
    )
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return plain, tuple((name, tensor.dtype) for name, tensor in tensors)


def _spread(ids: Int64[torch.Tensor, "rows topk"], num_experts: int) -> torch.Tensor:
    """Return distinct ids that reach all experts: 8 experts, top-2: [0, 4], [1, 5], ..."""
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    slots = torch.arange(ids.shape[1], device=ids.device) * (num_experts // ids.shape[1])
    return (rows + slots) % num_experts


def _weights(site: RouterSite, straight: Any, turned: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the weights ``[rows, topk]`` that the output holds for these ids."""
    found = []
    for first, second in zip(_parts(straight), _parts(turned), strict=True):
        if not isinstance(first, torch.Tensor) or not first.is_floating_point():
            continue
        if first.numel() == ids.numel() and first.shape[-1] == ids.shape[-1]:
            first, second = first.reshape(ids.shape), second.reshape(ids.shape)
            if _close(first.roll(1, -1), second):
                found.append(first)
            elif not _close(first, second):
                raise _refused(site, "weighs experts by their place in the choice, not by their id")
        elif first.shape == (len(ids), site.num_experts) and _is_scattered(first, ids):
            found.append(first.gather(1, ids))
    if not found:
        raise _refused(site, "returns no weights of the experts that it is given")
    return found


def _is_scattered(scores: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether scores are 0 everywhere but at the ids (Llama 4)."""
    return bool((scores.scatter(1, ids, 0) == 0).all()) and bool(scores.any())


def _zeros(weights: list[torch.Tensor], output: Any, ids: torch.Tensor) -> bool:
    """Whether an expert weighs 0 that the router did not rename, as zaya does its null expert."""
    kept = torch.ones_like(ids, dtype=torch.bool)
    for part in _parts(output):
        if (
            isinstance(part, torch.Tensor)
            and part.dtype == ids.dtype
            and part.numel() == ids.numel()
        ):
            kept &= part.reshape(ids.shape) == ids
    return any(bool(((weight == 0) & kept).any()) for weight in weights)


def _close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first.float(), second.float(), rtol=_TOLERANCE, equal_nan=True)


def _equal(first: Any, second: Any) -> bool:
    return all(_same(a, b) for a, b in zip(_parts(first), _parts(second), strict=True))


def _same(first: Any, second: Any) -> bool:
    if not isinstance(first, torch.Tensor):
        return first == second
    # A diverged model is not this check's to stop: NaN equals NaN.
    return torch.equal(first, second) or torch.allclose(first, second, 0, 0, equal_nan=True)


def _parts(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def _own(value: Any, scale: float) -> Any:
    # A router may scale its input in place.
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.clone() if scale == 1.0 else value * scale
    return value


def _refused(site: RouterSite, fault: str) -> UnsupportedError:
    return UnsupportedError(
        f"{site.describe()} {fault}; replay would be wrong there, so this family is refused: register a function that "
        "weighs its experts with moe_replay.transformers.weigh_experts"
    )
