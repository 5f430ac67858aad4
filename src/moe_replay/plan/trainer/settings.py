"""Settings: what of a recipe decides bytes and seconds on a given number of ranks.

In: a recipe and a number of ranks. Out: Settings, in the units of the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.lora import LoraSection
from moe_replay.recipe.sections.training import MegatronSection, ParallelLayout

NUMBER_BYTES = {
    **dict.fromkeys(("float32", "fp32"), 4),
    **dict.fromkeys(("bfloat16", "bf16", "float16", "fp16"), 2),
    **dict.fromkeys(("uint8", "fp8"), 1),
}
"""Bytes of one number, by the names of torch and of Megatron-Core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamStorage:
    """Where the optimizer's state lies, and in which formats."""

    dtype_bytes: int
    """Of a model parameter."""
    gradient_bytes: int = 4
    """Of a number in the gradient buffers."""
    main_gradient_bytes: int = 4
    """Of a gradient that the optimizer reads."""
    main_parameter_bytes: int = 4
    """Of a main weight; 2 where it keeps only what the bfloat16 weight has lost."""
    moment_bytes: tuple[int, int] = (4, 4)
    """Of the first and the second moment."""
    host_frac: float = 0.0
    """Share of the state that lies in host memory."""

    @property
    def device_bytes(self) -> float:
        """Bytes on the device for a parameter whose state this rank owns.

        Example: a bfloat16 model with float32 state has 12; a float32 model is its own main weight
        and has 8.
        """
        main = 0 if self.dtype_bytes == 4 else self.main_parameter_bytes
        copied = 0
        if self.gradient_bytes < self.main_gradient_bytes and not self.host_frac:
            # Megatron makes a float32 copy of the gradients that a rank owns.
            copied = self.main_gradient_bytes
        return (main + sum(self.moment_bytes)) * (1 - self.host_frac) + copied

    @property
    def host_bytes(self) -> float:
        """Bytes of host memory for such a parameter: main weight, two moments, gradient."""
        return 16 * self.host_frac


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What decides the bytes of a rank of the trainer."""

    num_ranks: int
    """Ranks of the trainer."""
    megatron: MegatronSection = field(default_factory=MegatronSection)
    """Layout and recomputation."""
    dtype_bytes: int = 2
    """Of a weight and an activation."""
    adam: AdamStorage
    """The optimizer's state."""
    max_tokens: int
    """Of a microbatch of the update."""
    scoring_tokens: int | None = None
    """Of a microbatch without gradient; None: as in the update."""
    max_sequence_length: int
    """Tokens of a prompt and its completion together."""
    num_microbatches: int = 1
    """Of a replica in an update."""
    chunk_rows: int = 2048
    """Rows whose logits exist at a time."""
    has_reference: bool = False
    """Whether a frozen copy of the weights is held."""
    replays: bool = True
    """Whether routes are on the device."""
    update_has_entropies: bool = False
    """Whether the update's forward pass gives entropies too."""
    lora: LoraSection = field(default_factory=LoraSection)
    """Adapters, which are then all that is trained."""

    @property
    def layout(self) -> ParallelLayout:
        """How the ranks are divided."""
        return self.megatron

    @property
    def replicas(self) -> int:
        """Ranks that share the optimizer's state of a dense parameter.

        Megatron counts context-parallel ranks among them.
        """
        layout = self.megatron
        return self.num_ranks // (
            layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
        )

    @property
    def expert_replicas(self) -> int:
        """Ranks that share the optimizer's state of an expert's parameter."""
        return self.num_ranks // self.megatron.expert_parallel_size


def settings_of(recipe: Recipe, num_ranks: int) -> Settings:
    """Return what a recipe says for ``num_ranks`` ranks; completions have their maximum length."""
    batch, longest = recipe.batch, recipe.max_sequence_length
    tokens = batch.max_tokens_per_microbatch or (batch.micro_batch_size or 1) * longest
    replicas = num_ranks // recipe.megatron.model_parallel_size
    samples = -(-batch.global_batch_size // replicas)
    scored, most = batch.max_tokens_per_scoring_microbatch, -(-recipe.samples_per_step // replicas)
    count = -(-samples // max(1, tokens // longest))
    return Settings(
        num_ranks=num_ranks,
        megatron=recipe.megatron,
        dtype_bytes=NUMBER_BYTES[recipe.model.dtype],
        adam=adam_of(recipe),
        max_tokens=min(tokens, samples * longest),
        scoring_tokens=None if scored is None else min(scored, most * longest),
        max_sequence_length=longest,
        num_microbatches=recipe.megatron.round_up_microbatches(count),
        chunk_rows=batch.logprob_chunk_size,
        has_reference=recipe.grpo.beta > 0,
        replays=recipe.replays,
        update_has_entropies=recipe.why_old_pass is None or recipe.grpo.entropy_coef > 0,
        lora=recipe.lora,
    )


def adam_of(recipe: Recipe) -> AdamStorage:
    """Return where the optimizer's state of a recipe lies."""
    number, megatron = NUMBER_BYTES[recipe.model.dtype], recipe.megatron
    fields, ddp = megatron.optimizer_fields(), megatron.ddp_fields()
    aware = bool(fields.get("use_precision_aware_optimizer"))

    def size(name: str) -> int:
        return NUMBER_BYTES[fields.get(name, "float32")] if aware else 4

    main = size("main_params_dtype")
    # Only the 16 bits that the bfloat16 weight lacks are kept, unless that is switched off.
    if aware and number == 2 and main == 4 and fields.get("store_param_remainders", True):
        main = 2
    host = fields.get("optimizer_cpu_offload") and fields.get("optimizer_offload_fraction", 0.0)
    return AdamStorage(
        dtype_bytes=number,
        gradient_bytes=4 if ddp["grad_reduce_in_fp32"] else number,
        main_gradient_bytes=size("main_grads_dtype"),
        main_parameter_bytes=main,
        moment_bytes=(size("exp_avg_dtype"), size("exp_avg_sq_dtype")),
        host_frac=float(host or 0.0),
    )
