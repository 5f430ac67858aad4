"""Settings: what of a recipe decides bytes and seconds on a given number of ranks.

In: a recipe and a number of ranks. Out: Settings, in the units of the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_replay.recipe.sections.training import MegatronSection, ParallelLayout

NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
"""Bytes of one number, by the names of torch and of Megatron-Core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamStorage:
    """Where the optimizer's state lies, and in which formats."""

    dtype_bytes: int
    """Of a model parameter."""
    gradient_bytes: int = 4
    """Of a number in the gradient buffers."""
    is_precision_aware: bool = False
    """Whether the optimizer takes gradients and keeps moments in lower precision."""
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
