"""Which decoder layers each pipeline stage will hold, known before any process is started.

Training does not use it: it reads the layers of the built model.
"""

from __future__ import annotations

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset


def stage_layers(config: TransformerConfig) -> tuple[tuple[int, ...], ...]:
    """Return the global decoder indices of each pipeline stage, over its chunks.

    Example:
        Eight layers over two stages of two chunks give ``((0, 1, 4, 5), (2, 3, 6, 7))``.
    """
    num_stages = config.pipeline_model_parallel_size
    num_chunks = config.virtual_pipeline_model_parallel_size or 1
    stages: list[list[int]] = [[] for _ in range(num_stages)]
    first = 0
    for chunk in range(num_chunks):
        for stage, layers in enumerate(stages):
            if config.pipeline_model_parallel_layout is not None:
                held = config.pipeline_model_parallel_layout.layout[stage][chunk]
                count = held.count(LayerType.decoder)
            else:
                vp_stage = chunk if num_chunks > 1 else None
                first = get_transformer_layer_offset(config, vp_stage, stage)
                count = get_num_layers_to_build(config, vp_stage, stage)
            layers.extend(range(first, first + count))
            first += count
    return tuple(tuple(layers) for layers in stages)
