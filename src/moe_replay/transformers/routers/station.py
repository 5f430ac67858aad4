"""Scopes on the routers of a model: each sees, and may replace, what the routers choose.

A router's method is replaced on its instance while a scope is open on it, and put back after the
last one, also after an exception.

In: RouterSites, a tap for each scope. Out: `tapped`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Integer
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_replay.errors import ReplayScopeError, UnsupportedError
from moe_replay.transformers.routers.choice import Choice
from moe_replay.transformers.routers.rehearsal import Proof, kind_of, rehearse, rehearse_weighing
from moe_replay.transformers.routers.sites import RouterSite, left_out

_STATION = "_moe_replay_station"


@runtime_checkable
class Tap(Protocol):
    """One scope's view of the routers."""

    @property
    def replaces(self) -> bool:
        """Whether it may return other ids than it gets."""
        ...

    def choose(
        self, site: RouterSite, ids: Integer[torch.Tensor, "rows topk"]
    ) -> Integer[torch.Tensor, "rows topk"]:
        """Return the ids to use of a router's call, given those of the router and older scopes."""
        ...


class Station:
    """Stands for one router's method while scopes are open on it."""

    def __init__(self, site: RouterSite, proofs: dict[Any, Proof | None]) -> None:
        self.site, self.proofs = site, proofs
        self.taps: list[Tap] = []
        self._before = vars(site.owner).get(site.method)
        self._method = getattr(site.owner, site.method)
        self._kind = kind_of(site, self._method)
        self._watch: RemovableHandle | None = None
        setattr(site.owner, site.method, types.MethodType(_run_station, site.owner))
        setattr(site.owner, _STATION, self)

    def __reduce__(self) -> Any:
        raise ReplayScopeError(
            f"the model of {self.site.describe()} was copied or pickled inside a scope, and the copy would be recorded "
            "or replayed for ever: do it outside"
        )

    def close(self) -> None:
        """Put the router's own method back."""
        owner, method = self.site.owner, self.site.method
        if self._watch is not None:
            self._watch.remove()
        delattr(owner, _STATION)
        if getattr(vars(owner).get(method), "__func__", None) is not _run_station:
            raise ReplayScopeError(
                f"the {method} method of {self.site.path} was replaced inside a scope, which cannot put back what was "
                "there before: wrap the model outside"
            )
        delattr(owner, method)
        if self._before is not None:
            setattr(owner, method, self._before)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the router with what the scopes decide."""
        if self.site.weigh is not None:
            return self._weighed(self._method(*args, **kwargs))
        is_first = self._kind not in self.proofs
        if is_first:
            self.proofs[self._kind] = rehearse(self.site, self._method, args, kwargs)
        proof = self.proofs[self._kind]
        assert proof is not None
        if proof.ids_at is not None and not any(tap.replaces for tap in self.taps):
            output = self._method(*args, **kwargs)
            self._decide(output[proof.ids_at].reshape(-1, self.site.topk))
        else:
            with Choice(deciding=proof.deciding, decide=self._decide) as choice:
                output = self._method(*args, **kwargs)
            self._check(choice, proof)
        if is_first:
            self._watch_experts(output)
        return output

    def _weighed(self, output: Any) -> Any:
        if self._kind not in self.proofs:
            rehearse_weighing(self.site, output)
            self.proofs[self._kind] = None
        logits, weights, live = output
        ids = self._decide(live)
        if ids is not live:
            assert self.site.weigh is not None
            weights = self.site.weigh(self.site.module, logits, ids)
        return logits, weights, ids

    def _decide(self, ids: torch.Tensor) -> torch.Tensor:
        for tap in self.taps:
            ids = tap.choose(self.site, ids)
        return ids

    def _check(self, choice: Choice, proof: Proof) -> None:
        got = (choice.num_calls, choice.num_scores)
        if got != (proof.deciding + 1, self.site.num_experts):
            raise UnsupportedError(
                f"{self.site.describe()} made {got[0]} top-k calls, the last over {got[1]} scores, expected "
                f"{proof.deciding + 1} and {self.site.num_experts} as at first; where it chooses is not known"
            )

    def _watch_experts(self, output: Any) -> None:
        """See once whether the experts get the ids that the router returned."""
        parts = output if isinstance(output, tuple | list) else (output,)
        returned = [part for part in parts if self._holds_ids(part)]

        def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert self._watch is not None
            self._watch.remove()
            given = [value for value in (*args, *kwargs.values()) if self._holds_ids(value)]
            if len(returned) == len(given) == 1 and not torch.equal(
                returned[0].flatten(), given[0].flatten()
            ):
                raise UnsupportedError(
                    f"the experts of {self.site.describe()} got other ids than it returned: the block changes the "
                    "choice after its router, where replay cannot follow"
                )

        experts = self.site.block.get_submodule("experts")
        self._watch = experts.register_forward_pre_hook(compare, with_kwargs=True)

    def _holds_ids(self, value: Any) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.dtype in (torch.int64, torch.int32)
            and value.dim() > 1
            and value.shape[-1] == self.site.topk
        )


@contextmanager
def tapped(model: nn.Module, sites: Sequence[RouterSite], tap: Tap) -> Iterator[None]:
    """Let ``tap`` see every choice of these routers inside the scope, after older scopes.

    Raises:
        ReplayScopeError: when the routes of this model are already replaced by an open scope.
        UnsupportedError: when a router's routes cannot be replayed, at its first call, or a vision
            router beside one of these runs.
    """
    with ExitStack() as stack:
        open_ones = [vars(site.owner).get(_STATION) for site in sites]
        proofs = next((station.proofs for station in open_ones if station), {})
        for site, found in zip(sites, open_ones, strict=True):
            station = found or Station(site, proofs)
            stack.callback(_leave, station, tap)
            if tap.replaces and any(other.replaces for other in station.taps):
                raise ReplayScopeError(
                    f"{site.describe()} is already in an open replay scope; close it before another one is opened"
                )
            station.taps.append(tap)
        for path, module in left_out(model, tuple(sites)):
            refuse = partial(_refuse_vision, path)
            stack.enter_context(module.register_forward_pre_hook(refuse))
        yield


def _leave(station: Station, tap: Tap) -> None:
    if tap in station.taps:
        station.taps.remove(tap)
    if not station.taps:
        station.close()


def _refuse_vision(path: str, module: nn.Module, args: Any) -> None:
    raise UnsupportedError(
        f"router {path} ({type(module).__name__}) ran for the rows of an image, whose routes no trace holds; record and "
        "replay text alone"
    )


# Compiled code stops here and goes on after it: a scope holds ids and checks that change between
# its calls.
@torch.compiler.disable
def _run_station(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return vars(owner)[_STATION].run(args, kwargs)
