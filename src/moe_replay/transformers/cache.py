"""A KV cache that grows in place; transformers' own copies all of it for every token.

In: keys and values of a forward pass. Out: cache layers.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 16

# States of [batch, heads, tokens, head_dim]; keys and values may differ in the last.
States = Float[torch.Tensor, "batch heads _ _"]


def growing_cache(config: Any, *, num_tokens: int) -> DynamicCache:
    """Return a cache for ``config`` whose full-attention layers have room for ``num_tokens``.

    Layers of another kind (sliding windows) stay transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        _GrowingLayer(num_tokens) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache


class _GrowingLayer(DynamicLayer):
    """Keys and values as views of a buffer with room for the next tokens, or for all.

    Room for all from the start would spread few tokens over much memory: attention to 45 tokens of
    128 sequences takes 0.78 ms with room for 109, and 0.26 ms with room for 48.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self._num_tokens = num_tokens
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: States, value_states: States, *args: Any, **kwargs: Any
    ) -> tuple[States, States]:
        """Append the states of new tokens; return those of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        if self._buffers is None or total > self._buffers[0].shape[-2]:
            self._buffers = (
                self._with_room(key_states, self.keys, total),
                self._with_room(value_states, self.values, total),
            )
        keys, values = self._buffers
        keys[:, :, held:total] = key_states
        values[:, :, held:total] = value_states
        self.keys, self.values = keys[:, :, :total], values[:, :, :total]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices`` of the batch, in that order."""
        super().batch_select_indices(indices)
        self._buffers = None

    def _with_room(self, new: States, held: torch.Tensor | None, total: int) -> States:
        batch, heads, _, dim = new.shape
        # A quarter more each time, so that each token is copied a few times at most.
        room = min(total + max(_LEAST_ROOM, total // 4), self._num_tokens)
        buffer = new.new_empty(batch, heads, max(room, total), dim)
        if held is not None and held.numel():
            buffer[:, :, : held.shape[-2]] = held
        return buffer
