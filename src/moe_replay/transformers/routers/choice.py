"""See and replace the choice that a router makes, in the middle of its own forward method.

In: expert ids for a call. Out: the ids that the router chose with, whatever it computes after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Integer
from torch.overrides import TorchFunctionMode

Decide = Callable[[Integer[torch.Tensor, "rows topk"]], Integer[torch.Tensor, "rows topk"]]

_TOPK = (torch.topk, torch.Tensor.topk)
_MASK = (torch.masked_fill, torch.Tensor.masked_fill)


class Choice(TorchFunctionMode):
    """Active while one router runs: its top-k call number ``deciding`` returns what is decided.

    ``decide`` gets the live ids and returns those to use; the values of the call become the scores
    at them. All that follows (softmax, normalisation, scale, bias) is the router's own code, and
    so is the gradient.

    Examples:
        >>> with Choice(deciding=0, decide=lambda live: live.flip(-1)):
        ...     values, ids = torch.topk(torch.tensor([[3.0, 1.0, 2.0]]), 2)
        >>> values.tolist(), ids.tolist()
        ([[2.0, 3.0]], [[2, 0]])
    """

    def __init__(self, *, deciding: int | None, decide: Decide) -> None:
        super().__init__()
        self.num_calls = 0
        """Top-k calls so far."""
        self.num_scores = 0
        """Scores of a row that the latest call chose from."""
        self.chosen: torch.Tensor | None = None
        """What the deciding call returned as ids; without ``deciding``, what the latest did."""
        self._deciding, self._decide = deciding, decide
        # Result -> (result, what it was before the mask); the result is kept so that its id stays
        # its own.
        self._unmasked: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _MASK:
            # A mask of groups limits the choice, not the weights (DeepSeek-V2).
            source = args[0] if args else kwargs["input"]
            self._unmasked[id(result)] = (result, source)
        elif func in _TOPK:
            return self._topk(args[0] if args else kwargs["input"], result)
        return result

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        # Masks that are kept would hold the graph.
        self._unmasked.clear()
        super().__exit__(exc_type, exc_val, exc_tb)

    def _topk(self, scores: torch.Tensor, result: Any) -> Any:
        number, self.num_calls = self.num_calls, self.num_calls + 1
        self.num_scores, live = scores.shape[-1], result.indices
        if self._deciding is None:
            self.chosen = live
        if number != self._deciding:
            return result
        rows = live.reshape(-1, live.shape[-1])
        ids = self._decide(rows)
        if ids is rows:
            self.chosen = live
            return result
        self.chosen = ids = ids.reshape(live.shape)
        _, source = self._unmasked.get(id(scores), (scores, scores))
        return type(result)((source.gather(-1, ids), ids))
