"""Section of LoRA: low-rank adapters that are trained in place of the model's weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moe_replay.recipe.sections.base import Key, Section, Several, TomlPath

ALL_LINEAR = "all-linear"


class LoraSection(Section):
    """``[lora]``: train low-rank adapters beside frozen weights."""

    rank: Annotated[int, Key(also_called=("lora_rank", "lora_r", "r"))] = Field(default=0, ge=0)
    """Rank of the adapters, such as 8; 0 trains the weights themselves."""
    alpha: Annotated[float, Key(also_called=("lora_alpha",))] = Field(default=32.0, gt=0)
    """What an adapter adds is multiplied by alpha / rank."""
    rslora: Annotated[bool, Key(also_called=("use_rslora",))] = False
    """Multiply by alpha / sqrt(rank) instead."""
    target_modules: Annotated[Several[str], Key(also_called=("lora_target_modules",))] = Field(
        default=(ALL_LINEAR,), min_length=1
    )
    """Projections with an adapter, by their names in the checkpoint, such as ``["q_proj",
    "v_proj"]``; of every layer, of routed and of shared experts. ``all-linear`` are all of them.
    Router, embedding and output layer never have one."""
    dropout: Annotated[float, Key(also_called=("lora_dropout",))] = Field(default=0.0, ge=0, lt=1)
    """Only 0: with dropout no pass gives the log-probabilities of another."""
    adapter: Annotated[TomlPath | None, Key(also_called=("adapters", "lora_path"))] = None
    """Folder with an adapter in PEFT's format to start from; its rank, alpha and targets must be
    those of this section."""
    export: Annotated[Literal["adapter", "merged"], Key(may_change=True)] = "adapter"
    """What ``checkpoint.export`` writes: the adapter in PEFT's format, or the whole model with the
    adapter merged into it."""

    @property
    def is_on(self) -> bool:
        """Whether adapters are trained."""
        return self.rank > 0

    @property
    def exports_adapter(self) -> bool:
        """Whether an export is an adapter in place of a model."""
        return self.is_on and self.export == "adapter"

    @property
    def scale(self) -> float:
        """Factor of what an adapter adds.

        Example: rank 4 and alpha 32 give 8, with ``rslora`` 16.
        """
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
