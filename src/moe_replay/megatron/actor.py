"""MegatronActor: the policy in training: gradients, optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_replay.batch import Microbatch
from moe_replay.errors import DivergedError, UpdateError
from moe_replay.megatron.backward import BackwardWork, MegatronLearner, TokenLoss
from moe_replay.megatron.balance import BalancingLoss
from moe_replay.megatron.chunks import moe_layers, unwrap
from moe_replay.megatron.logprobs import CHUNK_ROWS
from moe_replay.megatron.lora.adapters import Adapters
from moe_replay.megatron.lora.attach import attach, check_lora
from moe_replay.megatron.lora.peft_files import load_adapter
from moe_replay.megatron.model import build_model, read_model_shape, transformer_config
from moe_replay.megatron.offload import (
    DeviceMemory,
    Holding,
    check_movable,
    drop_scratch_memory,
    gradients_of,
    optimizer_state_of,
    weights_of,
)
from moe_replay.megatron.optimization import (
    build_optimizer,
    gather_parameters,
    wrap_for_training,
    wrap_precision,
)
from moe_replay.megatron.options.typed import MegatronOptions
from moe_replay.megatron.scorer import MegatronScorer, RouteWatch, ScoredSample, Scores
from moe_replay.megatron.upstream.warnings import quiet_megatron
from moe_replay.megatron.weights import WeightExport, load_hf_weights
from moe_replay.recipe.sections.lora import LoraSection
from moe_replay.recipe.sections.training import GivenBack, OptimizerSection, ParallelLayout
from moe_replay.routing import Routing

_NO_OPTIONS = MegatronOptions()
_NO_LORA = LoraSection()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """What a backward pass found, the same on every rank but for the balancing loss."""

    norm: float
    """Norm of the gradient over all ranks before clipping; finite."""
    balancing_loss: float | None
    """This rank's part of the auxiliary load-balancing loss before its weight, a mean over MoE
    layers and microbatches when summed over ranks; None when the recipe has none."""


class MegatronActor(MegatronLearner):
    """A Megatron model with gradients, the distributed optimizer and a learning-rate schedule."""

    def __init__(
        self,
        modules: Sequence[torch.nn.Module],
        *,
        config: TransformerConfig,
        num_experts: int,
        settings: OptimizerSection,
        num_updates: int,
        chunk_rows: int = CHUNK_ROWS,
        options: MegatronOptions = _NO_OPTIONS,
        gives_back: GivenBack = "none",
        adapters: Adapters | None = None,
    ) -> None:
        """Wrap built and loaded model chunks (`build_model`) of TransformerConfig ``config``.

        ``options`` are further fields of Megatron's configs of gradient buffers and optimizer. The
        schedule of the learning rate ends after ``num_updates`` optimizer steps. ``gives_back``
        says what leaves the device when ``memory`` is asked to give back. ``adapters`` are all that
        learns, where the chunks have some.
        """
        self._modules = list(modules)
        self.config, self.adapters = config, adapters
        wrapped = wrap_for_training(self._modules, config, options)
        super().__init__(wrapped, num_experts=num_experts, chunk_rows=chunk_rows)
        check_movable(gives_back, config, self.chunks[0].ddp_config)
        self._weights = WeightExport(self._modules, read=self.read_weight)
        # With overlap_param_gather, parts of other ranks are those from before the last step until
        # the next forward pass or `gather_parameters`.
        self._is_stale = False
        self._optimizer = build_optimizer(wrapped, settings, config, options)
        self.memory = self._device_memory(gives_back)
        self.scheduler = OptimizerParamScheduler(
            self._optimizer,
            # Megatron starts the warm-up from here; a start at 0 would waste a rollout.
            init_lr=settings.lr / (settings.warmup_steps + 1),
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=max(num_updates, settings.warmup_steps + 1),
            lr_decay_style=settings.lr_scheduler,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=num_updates,
            wd_incr_style="constant",
        )
        self._balance = BalancingLoss(
            self.routers.values(), num_layers=len(unwrap(wrapped[0]).model_shape.moe_layers)
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self._optimizer.scale_loss

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The model chunks without Megatron's wrapper; their weights come back to the device."""
        self.memory.take_back("weights")
        return self._modules

    @property
    def weights(self) -> WeightExport:
        """What engines are given, of the last step; collective, as `gather_parameters` is.

        The weights come back to the device.
        """
        self.gather_parameters()
        self.memory.take_back("weights")
        return self._weights

    @property
    def read_weight(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What is exported of a parameter: its values, with its adapter merged where it has one."""
        return torch.Tensor.detach if self.adapters is None else self.adapters.merged

    def _device_memory(self, gives_back: GivenBack) -> DeviceMemory:
        def drop_what_a_step_leaves() -> None:
            # Float32 copies of bfloat16 gradients, which the next pass makes again.
            self._optimizer.zero_grad()
            drop_scratch_memory()

        return DeviceMemory(
            self.device,
            {
                "gradients": Holding(tensors=lambda: gradients_of(self.chunks), keeps_values=False),
                "optimizer": Holding(tensors=lambda: optimizer_state_of(self._optimizer)),
                "weights": Holding(tensors=lambda: weights_of(self.chunks)),
            },
            gives_back=gives_back,
            before=drop_what_a_step_leaves,
        )

    def update(
        self,
        microbatches: Sequence[Microbatch],
        loss: TokenLoss,
        *,
        temperature: float,
        routing: Routing,
        watch: RouteWatch | None = None,
    ) -> Gradient:
        """Take one optimizer step along the gradient that `backward` computes, and return it."""
        gradient = self.backward(
            microbatches, loss, temperature=temperature, routing=routing, watch=watch
        )
        self.step()
        return gradient

    def backward(
        self,
        microbatches: Sequence[Microbatch],
        loss: TokenLoss,
        *,
        temperature: float,
        routing: Routing,
        watch: RouteWatch | None = None,
        where: str = "update",
    ) -> Gradient:
        """Compute the gradient of the sum of ``loss`` over the microbatches of all ranks.

        No weight changes. ``watch.observe`` sees the evidence before anything is learned from it.
        ``where`` names the update in errors.

        Raises:
            DivergedError: as `measure_gradient`.
            UpdateError: as `forward_backward`.
        """
        work = BackwardWork(
            microbatches=microbatches, loss=loss, temperature=temperature, routing=routing
        )
        self.forward_backward(work, watch=watch, where=where)
        return self.measure_gradient(work, where=where)

    @quiet_megatron()
    def forward_backward(
        self,
        work: BackwardWork,
        *,
        watch: RouteWatch | None = None,
        with_scores: bool = False,
        where: str = "update",
    ) -> Mapping[int, ScoredSample]:
        """Run the passes of ``work``; its gradient lies in the model's buffers afterwards.

        Returns what the forward pass found of all samples of this rank's replica, by sample id, as
        `score` does; nothing unless ``with_scores``.

        Raises:
            UpdateError: when gradients are switched off in this process.
        """
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise UpdateError(
                f"{where}: gradients are switched off in this process, expected them on; something that ran before (a "
                "reward function, an engine, a module that was imported) called torch.set_grad_enabled(False) or entered "
                "inference mode and never left it. Use `with torch.no_grad():` there"
            )
        scope = self._scope(work.microbatches, work.routing, watch)
        self._balance.clear()
        outputs: dict[int, torch.Tensor] = {}
        self.accumulate(work, scope, outputs=outputs if with_scores else None)
        self._observe(work.microbatches, scope, watch)
        return self._scored(work.microbatches, outputs) if with_scores else {}

    @quiet_megatron()
    def measure_gradient(self, work: BackwardWork, *, where: str = "update") -> Gradient:
        """Measure the gradient that `forward_backward` left; the optimizer has not moved yet.

        Raises:
            DivergedError: on every rank, when the gradient is not finite anywhere; it names the
                microbatch, and the sample where that can be found.
        """
        self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        if self._on_any_rank(not math.isfinite(norm)):
            raise self._broken_gradient(work, norm, where)
        return Gradient(
            norm=norm,
            balancing_loss=self._balance.mean(sum(bool(m.samples) for m in work.microbatches)),
        )

    @quiet_megatron()
    def step(self) -> None:
        """Take the optimizer's step along `backward`'s gradient."""
        self.optimizer.step()
        self._is_stale = True
        self.skip()

    def gather_parameters(self) -> None:
        """Make all parameters those of the last step, on every rank; collective.

        Needed before anything but a training pass reads them, and costs nothing unless
        ``overlap_param_gather`` has put it off.
        """
        if self._is_stale:
            self.memory.take_back("weights")
            gather_parameters(self.chunks)
            self._is_stale = False

    def score(
        self,
        microbatches: Sequence[Microbatch],
        *,
        temperature: float,
        routing: Routing,
        watch: RouteWatch | None = None,
        with_margins: bool = False,
    ) -> Scores:
        """Score with the parameters of the last step, as `MegatronScorer.score` does."""
        self.gather_parameters()
        return super().score(
            microbatches,
            temperature=temperature,
            routing=routing,
            watch=watch,
            with_margins=with_margins,
        )

    def skip(self) -> None:
        """Advance the learning-rate schedule without a step: it depends on the step count alone."""
        self.scheduler.step(increment=1)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def _on_any_rank(self, value: bool) -> bool:
        flag = torch.tensor([float(value)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _broken_gradient(self, work: BackwardWork, norm: float, where: str) -> DivergedError:
        found = self.find_broken(work)
        culprits = "\n  ".join(found[:8]) or (
            "no microbatch alone: each is finite, their sum or the square of its norm overflows"
        )
        return DivergedError(
            f"{where}: the norm of the gradient is {norm}, expected a finite number. No weight was changed by this update, "
            f"nothing was pushed to the engine, and the checkpoints are as they were.\n  {culprits}\nLikely causes: a reward "
            "or an advantage of extreme size, a learning rate that made the model diverge (look at grad_norm, "
            "policy_ratio/* and rollout_correction/* of the steps before), or a fault in a layer. Resume from the last "
            "checkpoint with a lower optimizer.lr or a bounded reward"
        )


def build_policy(
    checkpoint_dir: Path,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype,
    settings: OptimizerSection,
    num_updates: int,
    grouped_experts: bool = False,
    options: MegatronOptions = _NO_OPTIONS,
    chunk_rows: int = CHUNK_ROWS,
    gives_back: GivenBack = "none",
    lora: LoraSection = _NO_LORA,
    seed: int = 0,
    freezes_routers: bool = False,
) -> MegatronActor:
    """Build the policy of a Hugging Face checkpoint for training; every rank calls this together.

    ``dtype`` is that of the parameters; with bfloat16 the optimizer keeps float32 main weights.
    ``options`` holds further fields of Megatron's configs, such as ``recompute_*``. Logits exist
    for ``chunk_rows`` token rows at a time. ``gives_back`` is ``megatron.offload_during_rollout``.
    With ``lora.rank`` above 0 the weights are frozen, and adapters that ``seed`` draws are trained
    beside them, or those of ``lora.adapter``. With ``freezes_routers`` routers neither learn nor
    decay.
    """
    modules, config, adapters = _load_modules(
        checkpoint_dir, layout, dtype, grouped_experts, options.transformer, lora, seed
    )
    for router in moe_layers(modules).values() if freezes_routers else ():
        router.requires_grad_(False)
    return MegatronActor(
        modules,
        config=config,
        num_experts=config.num_moe_experts or 0,
        settings=settings,
        num_updates=num_updates,
        chunk_rows=chunk_rows,
        options=options,
        gives_back=gives_back,
        adapters=adapters,
    )


def build_scorer(
    checkpoint_dir: Path,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype,
    grouped_experts: bool = False,
    chunk_rows: int = CHUNK_ROWS,
    overrides: Mapping[str, Any] | None = None,
    gives_back: GivenBack = "none",
) -> MegatronScorer:
    """Build a frozen copy of a Hugging Face checkpoint, such as the reference model.

    ``overrides`` are further TransformerConfig fields.
    """
    modules, config, _ = _load_modules(checkpoint_dir, layout, dtype, grouped_experts, overrides)
    for module in modules:
        module.requires_grad_(False)
    return MegatronScorer(
        modules,
        num_experts=config.num_moe_experts or 0,
        chunk_rows=chunk_rows,
        gives_back=gives_back,
    )


def _load_modules(
    checkpoint_dir: Path,
    layout: ParallelLayout,
    dtype: torch.dtype,
    grouped_experts: bool,
    overrides: Mapping[str, Any] | None,
    lora: LoraSection = _NO_LORA,
    seed: int = 0,
) -> tuple[list[torch.nn.Module], TransformerConfig, Adapters | None]:
    shape = read_model_shape(checkpoint_dir)
    config = transformer_config(
        shape, layout, dtype=dtype, overrides=overrides, local_layers=lora.is_on
    )
    if lora.is_on:
        check_lora(shape, layout, lora, config)
    chunks = build_model(shape, config, grouped_experts=grouped_experts, local_layers=lora.is_on)
    load_hf_weights(chunks, checkpoint_dir)
    adapters = attach(chunks, config, lora, seed=seed) if lora.is_on else None
    if adapters is not None and lora.adapter is not None:
        # Before an optimizer takes its float32 copies.
        load_adapter(adapters, lora)
    return wrap_precision(chunks, config), config, adapters
