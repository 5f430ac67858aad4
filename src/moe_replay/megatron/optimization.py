"""How a model is wrapped for training, and its optimizer: the one place where both are built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
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
    """Wrap the model chunks of this rank, whose gradients then have buffers.

    ``config`` learns how schedules hold back reductions until the last microbatch, and start
    gathering parameters.
    """
    # One each: the wrapper writes the bucket size that it chose into it.
    chunks = [
        DistributedDataParallel(config, wrapping_config(options), module) for module in modules
    ]
    wrapping = chunks[0].ddp_config
    if wrapping.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in chunks])
    if wrapping.overlap_param_gather:
        for chunk in chunks:
            _gather_experts_together(chunk)
        if wrapping.align_param_gather:
            config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in chunks])
    return chunks


def wrap_precision(
    chunks: Sequence[torch.nn.Module], config: TransformerConfig
) -> list[torch.nn.Module]:
    """Return the chunks as Megatron trains them: in bfloat16 under its wrapper, else as they are.

    The wrapper casts buffers too, and Megatron makes a router's expert bias float32 again when it
    next runs, after its value was rounded: 11.9 becomes 11.875, a step many times the differences
    by which a balanced router orders its experts. Counts of tokens stop at 256, and cached rotary
    angles lose all digits of a late position. Float32 buffers are therefore put back as they were.
    """
    if not config.bf16:
        return list(chunks)
    exact = [
        (module, name, buffer)
        for chunk in chunks
        for module in chunk.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.dtype == torch.float32
    ]
    wrapped = [Float16Module(config, chunk) for chunk in chunks]
    for module, name, buffer in exact:
        setattr(module, name, buffer)
    return wrapped


def gather_parameters(chunks: Sequence[DistributedDataParallel]) -> None:
    """Gather parameters that are gathered in the next forward pass otherwise; collective."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _gather_experts_together(chunk: DistributedDataParallel) -> None:
    """Wait for all parameters of experts where their layer begins.

    Megatron waits in each module that is called, and grouped experts call none: they read the
    weights of all local experts at once, and would read those from before the update.
    """

    def wait(experts: torch.nn.Module, *_: Any) -> None:
        for parameter in experts.parameters():
            chunk.param_to_bucket_group[parameter].finish_param_sync(
                skip_next_bucket_dispatch=chunk.ddp_config.align_param_gather
            )

    for name, module in chunk.named_modules():
        if name.endswith(".mlp.experts"):
            module.register_forward_pre_hook(wait)


def _one_or_all(functions: list[Callable[..., Any]]) -> Any:
    """Return what a schedule takes: a list for interleaved chunks, else the function itself."""
    return functions if len(functions) > 1 else functions[0]


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    settings: OptimizerSection,
    config: TransformerConfig,
    options: MegatronOptions,
) -> MegatronOptimizer:
    """Build the distributed optimizer of wrapped chunks."""
    optimizer = get_megatron_optimizer(optimizer_config(settings, config, options), list(chunks))
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        _fuse_on_host(part.optimizer)
    return optimizer


def _fuse_on_host(optimizer: Any) -> None:
    """Let torch's Adam move all parameters of a group in one call, where they are on a CPU.

    There it takes ten operations for each parameter otherwise: 26 ms for the 429 of a small model,
    in place of 6. The choice lies in the groups, where `torch.optim.Adam` looks for it.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        if all(p.device.type == "cpu" and p.dtype == torch.float32 for p in group["params"]):
            group["fused"] = True


def _built(kind: type, fields: Mapping[str, Any]) -> Any:
    try:
        return kind(**fields)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UnsupportedError(
            f"Megatron-Core {'.'.join(map(str, VERSION))} refuses the {kind.__name__} of this "
            f"recipe: {error}"
        ) from error
