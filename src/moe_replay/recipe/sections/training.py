"""Sections of the algorithm and the trainer: replay, batches, loss, optimizer, layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from moe_replay.recipe.sections.base import Key, Section, Several
from moe_replay.recipe.sections.policy_loss import PolicyLossKeys
from moe_replay.recipe.sections.resumable import MAY_CHANGE_ON_RESUME
from moe_replay.routing import ReplayMode

GivenBack = Literal["auto", "none", "gradients", "optimizer", "weights"]
"""What of the trainer leaves its device while an engine samples; each holds those before it."""


class ReplaySection(Section):
    """``[replay]``: whose expert choice the trainer uses, and how closely that is watched."""

    router_replay_mode: Annotated[ReplayMode, Field(strict=False), Key(also_called=("mode",))] = (
        ReplayMode.R3
    )
    """``disabled``, ``R2`` (routes of the trainer's old-logprob pass) or ``R3`` (routes of the
    engine)."""
    min_coverage: Annotated[float, Key(may_change=True)] = Field(default=0.95, ge=0, le=1)
    """Minimum fraction of replayable rows, of completions that train, that must be replayed; the
    run stops below it."""
    guard: Annotated[bool, Key(may_change=True)] = True
    """Compare replayed with live routes of every row in each step, and act when those of a sample
    are not its own."""
    on_misaligned: Annotated[Literal["stop", "drop"], Key(may_change=True)] = "stop"
    """What to do with a sample whose engine routes are not its own (R3): stop the run, or train
    without it and count it."""
    max_dropped_frac: Annotated[float, Key(may_change=True)] = Field(default=0.05, ge=0, lt=1)
    """With ``on_misaligned = "drop"``: a step that would drop a larger fraction of its samples
    stops the run."""
    reference_routes: Literal["live", "replay"] = "replay"
    """Routing of the reference model: the policy's replayed routes, or its own live ones."""
    live_gap_every: Annotated[int, Key(may_change=True)] = Field(default=0, ge=0)
    """Measure the engine gap with live routing too, every so many steps (R3: by one more pass); 0
    never does."""


class BatchSection(Section):
    """``[batch]``: how samples become optimizer updates."""

    global_batch_size: Annotated[int, Key(also_called=("batch_size", "train_batch_size"))] = Field(
        gt=0
    )
    """Samples per optimizer update, over all data-parallel ranks."""
    steps_per_generation: Annotated[int, Key(also_called=("num_iterations",))] = Field(
        default=1, gt=0
    )
    """Optimizer updates per rollout batch."""
    max_tokens_per_microbatch: Annotated[int | None, Key(may_change=True)] = Field(
        default=None, gt=0
    )
    """Token budget of a packed microbatch; give this or ``micro_batch_size``."""
    micro_batch_size: Annotated[
        int | None, Key(may_change=True, also_called=("per_device_train_batch_size",))
    ] = Field(default=None, gt=0)
    """Samples of a packed microbatch; give this or ``max_tokens_per_microbatch``."""
    max_tokens_per_scoring_microbatch: Annotated[int | None, Key(may_change=True)] = Field(
        default=None, gt=0
    )
    """Token budget of a packed microbatch in passes without gradient (old and reference
    log-probabilities), which hold no activations; by default they run the microbatches of the
    update, and with one update a step the old log-probabilities are then its own to the last
    bit."""
    old_logprobs: Annotated[Literal["auto", "pass"], Key(may_change=True)] = "auto"
    """Where old log-probabilities come from: ``auto`` takes those of the update's own forward pass
    where they are the same (one update a step, and no routes to record as R2 does), ``pass`` always
    runs a pass of their own before the update."""
    balance: Annotated[bool, Key(may_change=True)] = True
    """Deal the samples of an update to data-parallel ranks by their estimated work, so that none
    waits long for another; otherwise each trains on what it sampled. Results differ by rounding."""
    logprob_chunk_size: Annotated[int, Key(may_change=True)] = Field(default=2048, gt=0)
    """Sampled tokens whose logits exist at a time, in float32, two such tensors in a pass that also
    gives entropies and one in any other; smaller takes less memory, below about 1,000 a GPU gets
    slower."""

    def why_old_pass(self, mode: ReplayMode) -> str | None:
        """Return why old log-probabilities take a pass of their own before the update.

        None when the forward pass of the update gives the same values: the weights, the samples and
        the routes are those of a pass before it.
        """
        if mode.passes.old is not mode.passes.update:
            return f"router_replay_mode = '{mode}' records routes in it"
        if self.steps_per_generation > 1:
            return f"batch.steps_per_generation = {self.steps_per_generation}"
        return "batch.old_logprobs = 'pass'" if self.old_logprobs == "pass" else None


ScaleRewards = Literal["group", "batch", "none", "gdpo"]
DEFAULT_SCALE: Mapping[str, ScaleRewards] = {"rloo": "none", "reinforce_plus_plus": "batch"}
"""``grpo.advantage_estimator`` -> ``grpo.scale_rewards`` where a recipe does not say it, other than
``group``; as in ms-swift."""


class GrpoSection(PolicyLossKeys):
    """``[grpo]``: advantage and loss."""

    advantage_estimator: Literal["grpo", "rloo", "reinforce_plus_plus"] = "grpo"
    """What a reward is compared with: the mean of its prompt's completions (``grpo``, and
    ``reinforce_plus_plus``, whose ``batch`` divides by the spread of the differences), or of the
    others (``rloo``)."""
    scale_rewards: Annotated[
        ScaleRewards,
        Key(
            default="group; none for rloo, batch for reinforce_plus_plus",
            also_called=("norm_adv_by_std_in_grpo", "multi_objective_aggregation"),
        ),
    ] = Field(default_factory=lambda grpo: DEFAULT_SCALE.get(grpo["advantage_estimator"], "group"))
    """Whose standard deviation the advantages are divided by: ``group``, ``batch`` or ``none``.
    ``gdpo`` normalizes each reward function in its group, and their weighted sum over the batch."""
    dynamic_sample: Annotated[bool, Key(also_called=("filter_groups", "use_dynamic_sampling"))] = (
        False
    )
    """Sample further prompts instead of those whose completions all have the same reward, which
    teach nothing."""
    max_resample_times: Annotated[int, Key(also_called=("max_num_gen_batches",))] = Field(
        default=3, gt=0
    )
    """With ``dynamic_sample``: further rounds of a step, after which it takes prompts of equal
    rewards too."""
    overlong_filter: bool = False
    """Keep completions that were cut off by ``rollout.max_completion_length`` out of the loss."""


class OptimizerSection(Section):
    """``[optimizer]``: AdamW and its schedule, counted in optimizer updates."""

    lr: Annotated[float, Key(also_called=("learning_rate",))] = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of a linear or cosine schedule."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates of linear warm-up: the n-th of w has n / (w + 1) of ``lr``, so that the first one
    learns too."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    clip_grad: Annotated[float, Key(also_called=("max_grad_norm",))] = Field(default=1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""


class ParallelLayout(Section):
    """How the ranks are divided; data parallelism is what is left of the world."""

    may_change: ClassVar[bool] = True

    tensor_model_parallel_size: Annotated[int, Key(also_called=("tp",))] = Field(default=1, gt=0)
    """Ranks that share each matrix."""
    pipeline_model_parallel_size: Annotated[int, Key(also_called=("pp",))] = Field(default=1, gt=0)
    """Stages of layers."""
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, gt=0)
    """Model chunks per stage."""
    context_parallel_size: Annotated[int, Key(also_called=("cp",))] = Field(default=1, gt=0)
    """Ranks that share each sequence."""
    expert_model_parallel_size: Annotated[int, Key(also_called=("ep",))] = Field(default=1, gt=0)
    """Ranks that share the experts of a layer."""
    expert_tensor_parallel_size: int | None = Field(default=None, gt=0)
    """Ranks that share each expert's matrices."""
    num_layers_in_first_pipeline_stage: int | None = Field(default=None, gt=0)
    """Layers of the first stage; the others share the rest evenly."""
    num_layers_in_last_pipeline_stage: int | None = Field(default=None, gt=0)
    """Layers of the last stage; the others share the rest evenly."""
    pipeline_model_parallel_layout: str | None = None
    """Megatron's layout string: stages separated by ``|``, ``E`` embedding, ``t`` a layer, ``L``
    loss, ``*`` repeats."""

    def describe(self) -> str:
        """Return the degrees above 1 in words, such as ``tensor 2, pipeline 2 x 2 chunks``."""
        words = []
        for size, word in (
            (self.tensor_model_parallel_size, "tensor"),
            (self.pipeline_model_parallel_size, "pipeline"),
            (self.context_parallel_size, "context"),
            (self.expert_model_parallel_size, "expert"),
        ):
            if size > 1:
                words.append(f"{word} {size}")
            if size > 1 and word == "pipeline" and self.virtual_pipeline_model_parallel_size:
                words[-1] += f" x {self.virtual_pipeline_model_parallel_size} chunks"
        if self.expert_tensor_parallel_size is not None:
            words.append(f"expert tensor {self.expert_tensor_parallel_size}")
        return ", ".join(words) or "no model parallelism"

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share each expert's matrices; by default those that share any other matrix."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that one copy of the dense layers takes, context parallelism included."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def expert_parallel_size(self) -> int:
        """Ranks that one copy of the expert layers takes."""
        return (
            self.expert_tensor_size
            * self.expert_model_parallel_size
            * self.pipeline_model_parallel_size
        )


# Keys that are not fields of Megatron's TransformerConfig.
_BESIDE = {"transformer", "ddp", "optimizer", "offload_during_rollout", "freeze_moe_router"}


class MegatronSection(ParallelLayout):
    """``[megatron]``: layout, recomputation and other options, under Megatron-Core's own names."""

    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens travel to the ranks of their experts; ``flex`` needs DeepEP or HybridEP."""
    moe_aux_loss_coeff: Annotated[float, Key(may_change=False)] = Field(default=0.0, ge=0)
    """Weight of the loss that balances the live experts of a microbatch, padding excluded; 0
    switches it off."""
    freeze_moe_router: Annotated[
        bool, Key(may_change=False, also_called=("freeze_router", "freeze_gate"))
    ] = False
    """Keep the weights of routers as they are: they neither learn nor decay. Gradients still pass
    through the scores of experts."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers or chosen modules in the backward pass; nothing by default."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With ``full``: how recomputed layers are chosen."""
    recompute_num_layers: int | None = Field(default=None, gt=0)
    """With ``full``: layers per recomputed unit (uniform) or recomputed layers per stage
    (block)."""
    recompute_modules: Several[str] | None = None
    """With ``selective``: names of modules, such as ``moe``."""
    offload_during_rollout: Annotated[
        GivenBack, Key(default="optimizer where an engine samples on the trainer's GPU, else none")
    ] = "auto"
    """What the trainer frees on its device while the engine samples: ``none``, ``gradients``,
    ``optimizer`` (gradients, and its state, which waits in host memory), or ``weights`` (all of
    it)."""

    transformer: Annotated[
        dict[str, Any], Key(may_change=False, may_change_inside=MAY_CHANGE_ON_RESUME)
    ] = Field(default_factory=dict)
    """Any other field of Megatron's TransformerConfig, such as ``moe_permute_fusion = true``."""
    ddp: Annotated[
        dict[str, Any], Key(may_change=False, may_change_inside=MAY_CHANGE_ON_RESUME)
    ] = Field(default_factory=dict)
    """Any field of Megatron's DistributedDataParallelConfig, such as ``overlap_grad_reduce =
    true``."""
    optimizer: Annotated[
        dict[str, Any], Key(may_change=False, may_change_inside=MAY_CHANGE_ON_RESUME)
    ] = Field(default_factory=dict)
    """Any field of Megatron's OptimizerConfig, such as ``optimizer_cpu_offload = true``."""

    @property
    def trains_routers(self) -> bool:
        """Whether Megatron adds losses of its own, which learn where no sample does."""
        return self.moe_aux_loss_coeff > 0 or bool(self.transformer.get("moe_z_loss_coeff"))

    def config_fields(self) -> dict[str, Any]:
        """Return the TransformerConfig fields beside the layout's, as a recipe writes them."""
        own = self.model_dump(
            mode="json", exclude_none=True, exclude={*ParallelLayout.model_fields, *_BESIDE}
        )
        return own | self.transformer

    def ddp_fields(self) -> dict[str, Any]:
        """Return the DistributedDataParallelConfig fields that are set, as a recipe writes them.

        Gradients are summed and reduced in float32, unless ``main_grads_dtype`` says that the
        optimizer takes another format.
        """
        wide = self.optimizer.get("main_grads_dtype", "float32") == "float32"
        return {"grad_reduce_in_fp32": wide, "use_distributed_optimizer": True} | self.ddp

    def optimizer_fields(self) -> dict[str, Any]:
        """Return the OptimizerConfig fields that are set, as a recipe writes them.

        With ``optimizer_cpu_offload`` everything is offloaded, where Megatron's own default for
        the fraction is nothing, and float32 main weights exist on the host alone.
        """
        fields: dict[str, Any] = {"use_distributed_optimizer": True}
        if self.optimizer.get("optimizer_cpu_offload"):
            fields |= {"optimizer_offload_fraction": 1.0, "use_precision_aware_optimizer": True}
        return fields | self.optimizer

    def round_up_microbatches(self, count: int) -> int:
        """Return the lowest number of microbatches from ``count`` on that the schedule takes.

        Example: interleaving runs rounds of as many microbatches as there are stages, so with 4
        stages 5 microbatches become 8; without interleaving 5 stay 5.
        """
        if self.virtual_pipeline_model_parallel_size is None:
            return count
        stages = self.pipeline_model_parallel_size
        return -(-count // stages) * stages


OWN_TRANSFORMER_KEYS = (
    frozenset(MegatronSection.model_fields) - frozenset(ParallelLayout.model_fields) - _BESIDE
)
"""Keys of ``[megatron]`` that are fields of Megatron's TransformerConfig beside the layout."""
