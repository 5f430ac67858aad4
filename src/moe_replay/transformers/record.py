"""Record the routes of a Hugging Face model inside its routers, where the choice is made.

In: a transformers model. Out: RouteRecorder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Integer
from torch import nn

from moe_replay.errors import ReplayScopeError, UnsupportedError
from moe_replay.transformers.routers.sites import RouterSite, find_routers
from moe_replay.transformers.routers.station import tapped
from moe_replay.transformers.shared_batch import require_whole_model


class RouteRecorder:
    """Collects the expert ids that the routers of one model choose, in the order of the rows.

    Rows are the tokens of ``input_ids`` flattened, batch first: row ``b * length + t``, padding
    included.
    """

    replaces = False

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

    def choose(
        self, site: RouterSite, ids: Integer[torch.Tensor, "rows topk"]
    ) -> Integer[torch.Tensor, "rows topk"]:
        """Keep the ids of one router's call, unless it is a recomputation, and return them."""
        if not in_backward():
            self._parts[self.layers.index(site.layer)].append(ids)
        return ids


@contextmanager
def record_routes(model: nn.Module) -> Iterator[RouteRecorder]:
    """Record the routes of every forward pass of ``model`` inside the scope.

    Only this model's routers are touched, and they are as before when the scope ends, also after an
    exception. Recomputation in a backward pass is not recorded again. Opened inside a replay scope,
    it sees the replayed routes; opened around one, the live ones.

    Examples:
        >>> with record_routes(model) as recorder:
        ...     model(input_ids)
        >>> recorder.take().shape
        torch.Size([20, 4, 2])

    Raises:
        UnsupportedError: when the model is dense or split into pipeline stages, or a router's
            choice cannot be read (see `find_routers`; each kind of router proves itself at its
            first call).
    """
    require_whole_model(model)
    sites = find_routers(model)
    if not sites:
        raise UnsupportedError(f"{type(model).__name__} is dense: it has no routes to record")
    recorder = RouteRecorder(sites)
    with tapped(model, sites, recorder):
        yield recorder


def in_backward() -> bool:
    """Whether autograd runs a backward pass here, so that a forward is a recomputation."""
    return torch._C._current_graph_task_id() != -1
