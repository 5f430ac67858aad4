"""MegatronActor: the policy that is trained: scoring, the update, and its weights for everybody else.

In: a checkpoint, microbatches, a loss. Out: log-probabilities, updated weights, gradient norms. Called by: grpo.loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from moe_replay.batch import Microbatch
from moe_replay.megatron.layout import ParallelLayout
from moe_replay.megatron.logprobs import token_logprobs
from moe_replay.megatron.model import build_model, read_model_shape, transformer_config
from moe_replay.megatron.scorer import MegatronScorer, RouteWatch, Routing, opened
from moe_replay.megatron.upstream_warnings import quiet_megatron
from moe_replay.megatron.weights import load_hf_weights

TokenLoss = Callable[[Microbatch, torch.Tensor], torch.Tensor]
"""``(microbatch, new_logprobs of its predicting rows) -> its part of the mini-batch loss``, a differentiable scalar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Adam with decoupled weight decay, and its learning-rate schedule."""

    lr: float
    """Peak learning rate."""
    min_lr: float
    """Learning rate at the end of a decaying schedule."""
    lr_scheduler: Literal["constant", "linear", "cosine"]
    """Shape of the decay."""
    warmup_steps: int
    """Optimizer steps of linear warm-up."""
    num_steps: int
    """Optimizer steps of the whole run, warm-up included."""
    weight_decay: float
    """Decoupled weight decay."""
    beta1: float
    """Decay of the first moment."""
    beta2: float
    """Decay of the second moment."""
    eps: float
    """Adam's epsilon."""
    clip_grad: float
    """Largest norm of the gradient; 0 does not clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What one optimizer step did."""

    grad_norm: float
    """Norm of the whole gradient before clipping."""
    learning_rate: float
    """Learning rate that the step used."""


class MegatronActor(MegatronScorer):
    """A Megatron model with gradients, the distributed optimizer and a learning-rate schedule."""

    def __init__(
        self,
        modules: Sequence[torch.nn.Module],
        *,
        config: Any,
        num_experts: int,
        settings: OptimizerSettings,
    ) -> None:
        """Wrap built and loaded model chunks (`build_model`) of TransformerConfig ``config`` for training."""
        self.modules = list(modules)
        self.config = config
        wrapping = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
        )
        wrapped = [DistributedDataParallel(config, wrapping, module) for module in self.modules]
        super().__init__(wrapped, num_experts=num_experts)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.eps,
                clip_grad=settings.clip_grad,
                bf16=bool(config.bf16),
                params_dtype=config.params_dtype,
                use_distributed_optimizer=True,
            ),
            wrapped,
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=max(settings.num_steps, settings.warmup_steps + 1),
            lr_decay_style=settings.lr_scheduler,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=settings.num_steps,
            wd_incr_style="constant",
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss

    @quiet_megatron()
    def update(
        self,
        microbatches: Sequence[Microbatch],
        loss: TokenLoss,
        *,
        temperature: float,
        routing: Routing,
        watch: RouteWatch | None = None,
    ) -> UpdateResult:
        """Take one optimizer step on the sum of ``loss`` over the microbatches of all ranks.

        ``watch.observe`` sees the evidence before the step is taken, so raising there leaves the weights untouched.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        num_tokens = torch.tensor([sum(map(_num_tokens, microbatches))], device=self.device)
        dist.all_reduce(
            num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        total_tokens = int(num_tokens)
        scope = self._scope(microbatches, routing, watch)

        def step(batches: Iterator[Microbatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            microbatch = next(batches)
            output = self._forward(chunk, microbatch, scope)

            def scaled_loss(
                logits: torch.Tensor,
            ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
                rows, next_ids = self._predicting(microbatch)
                logprobs = token_logprobs(logits[0, rows], next_ids, temperature=temperature)
                # Megatron divides the summed gradient by the summed count, which is meant for losses that are sums
                # over tokens: its auxiliary loss is one, `loss` is an average already.
                part = loss(microbatch, logprobs) * total_tokens
                count = torch.tensor(_num_tokens(microbatch), dtype=torch.int, device=self.device)
                return part, count, {}

            return output, scaled_loss

        with opened(scope):
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=self._iterators(microbatches),
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(microbatches),
                seq_length=1,
                micro_batch_size=1,
                forward_only=False,
            )
        self._observe(microbatches, scope, watch)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        return UpdateResult(grad_norm=float(grad_norm), learning_rate=learning_rate)


def _num_tokens(microbatch: Microbatch) -> int:
    """Return the rows of this rank that hold a token."""
    return int(microbatch.index.is_token.sum())


def build_policy(
    checkpoint_dir: Path,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype,
    settings: OptimizerSettings,
    grouped_experts: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> MegatronActor:
    """Build the policy of a Hugging Face checkpoint for training; every rank calls this together.

    ``dtype`` is that of the parameters; with bfloat16 the optimizer keeps float32 main weights. ``overrides`` holds
    further TransformerConfig fields, such as ``recompute_*``.
    """
    modules, config = _load_modules(checkpoint_dir, layout, dtype, grouped_experts, overrides)
    return MegatronActor(
        modules, config=config, num_experts=config.num_moe_experts or 0, settings=settings
    )


def build_scorer(
    checkpoint_dir: Path,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype,
    grouped_experts: bool = False,
) -> MegatronScorer:
    """Build a frozen copy of a Hugging Face checkpoint, such as the reference model."""
    modules, config = _load_modules(checkpoint_dir, layout, dtype, grouped_experts, None)
    for module in modules:
        module.requires_grad_(False)
    return MegatronScorer(modules, num_experts=config.num_moe_experts or 0)


def _load_modules(
    checkpoint_dir: Path,
    layout: ParallelLayout,
    dtype: torch.dtype,
    grouped_experts: bool,
    overrides: Mapping[str, Any] | None,
) -> tuple[list[torch.nn.Module], Any]:
    shape = read_model_shape(checkpoint_dir)
    config = transformer_config(shape, layout, dtype=dtype, overrides=overrides)
    chunks = build_model(shape, config, grouped_experts=grouped_experts)
    load_hf_weights(chunks, checkpoint_dir)
    return wrap_precision(chunks, config), config


def wrap_precision(chunks: Sequence[torch.nn.Module], config: Any) -> list[torch.nn.Module]:
    """Return the chunks as Megatron trains them: in bfloat16 under its wrapper, else as they are.

    The wrapper casts buffers too, and Megatron makes a router's expert bias float32 again when it next runs, after its
    value was rounded: 11.9 becomes 11.875, a step many times the differences by which a balanced router orders its
    experts. Counts of tokens stop at 256, and cached rotary angles lose all digits of a late position. Float32 buffers
    are therefore put back as they were.
    """
    if not config.bf16:
        return list(chunks)
    return [_in_bfloat16(chunk, config) for chunk in chunks]


def _in_bfloat16(chunk: torch.nn.Module, config: Any) -> torch.nn.Module:
    exact = [
        (module, name, buffer)
        for module in chunk.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.dtype == torch.float32
    ]
    wrapped = Float16Module(config, chunk)
    for module, name, buffer in exact:
        setattr(module, name, buffer)
    return wrapped
