"""How a model is wrapped for training, and its optimizer: the one place where both are built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.options.typed import MegatronOptions
from moe_replay.megatron.upstream.compat import VERSION
from moe_replay.recipe.sections.training import MegatronSection, OptimizerSection

_DEFAULTS = MegatronSection()


def wrapping_config(options: MegatronOptions) -> DistributedDataParallelConfig:
    """Return Megatron's configuration of gradient buffers and their reduction."""
    return _built(DistributedDataParallelConfig, _DEFAULTS.ddp_fields() | dict(options.ddp))


def optimizer_config(
    settings: OptimizerSection, config: TransformerConfig, options: MegatronOptions
) -> OptimizerConfig:
    """Return Megatron's configuration of the optimizer of a model of TransformerConfig ``config``.

    Raises:
        UnsupportedError: Megatron refuses the combination, or a package for it is missing.
    """
    fields = {
        "optimizer": "adam",
        "lr": settings.lr,
        "min_lr": settings.min_lr,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.beta1,
        "adam_beta2": settings.beta2,
        "adam_eps": settings.eps,
        "clip_grad": settings.clip_grad,
        "bf16": bool(config.bf16),
        "params_dtype": config.params_dtype,
        "fp8_recipe": config.fp8_recipe if config.fp8 else None,
        "overlap_param_gather": bool(options.ddp.get("overlap_param_gather")),
    }
    said = _DEFAULTS.optimizer_fields() | dict(options.optimizer)
    return _built(OptimizerConfig, fields | said)


def wrap_for_training(
    modules: Sequence[torch.nn.Module], config: TransformerConfig, options: MegatronOptions
) -> list[DistributedDataParallel]:
    """Wrap the model chunks of this rank, whose gradients then have buffers."""
    # One each: the wrapper writes the bucket size that it chose into it.
    return [DistributedDataParallel(config, wrapping_config(options), module) for module in modules]


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    settings: OptimizerSection,
    config: TransformerConfig,
    options: MegatronOptions,
) -> MegatronOptimizer:
    """Build the distributed optimizer of wrapped chunks."""
    return get_megatron_optimizer(optimizer_config(settings, config, options), list(chunks))


def _built(kind: type, fields: Mapping[str, Any]) -> Any:
    try:
        return kind(**fields)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UnsupportedError(
            f"Megatron-Core {'.'.join(map(str, VERSION))} refuses the {kind.__name__} of this "
            f"recipe: {error}"
        ) from error
