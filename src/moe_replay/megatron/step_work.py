"""How the work of a sequence grows with its length, from the shape of the model."""

from __future__ import annotations

from typing import Any

from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.weights import WeightExport


def even_length(weights: WeightExport, chunk: Any) -> float:
    """Return the tokens of a sequence at which attention costs as much as all weights together.

    A token costs 2 operations for each weight that it is multiplied by, and attention over n tokens
    2 n^2 for each unit of head width, of all heads and layers (half of the n^2 pairs, two
    products). Qwen3-30B-A3B: 3.04e9 weights by 48 layers x 32 heads x 128 is 15,500. ``chunk`` is
    any model chunk of ``weights``.
    """
    model = unwrap(chunk)
    shape, config = model.model_shape, model.config
    width = float(shape.head_dim)
    if config.multi_latent_attention:
        # Of queries and keys, and of values.
        width = (config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim) / 2
    return weights.num_active / (shape.num_layers * shape.num_attention_heads * width)
