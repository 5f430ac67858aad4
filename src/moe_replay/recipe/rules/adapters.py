"""The rules of ``[lora]``: what adapters do not go with, and keys without effect."""

from __future__ import annotations

from collections.abc import Iterator

from moe_replay.recipe.rule import EffectRule, Problem, Rule
from moe_replay.recipe.sections.lora import ALL_LINEAR, LoraSection
from moe_replay.recipe.sections.run import CheckpointSection, ModelSection
from moe_replay.recipe.sections.training import MegatronSection

_GROUPED_BYTES = 16
"""Rows of a grouped product begin at multiples of this."""


@Rule
def _every_pass_sees_one_policy(lora: LoraSection) -> Iterator[Problem]:
    if lora.dropout:
        yield Problem(
            "lora.dropout",
            f"{lora.dropout}: each pass would drop other inputs, so that old log-probabilities and "
            "routes would be those of another policy than the one that learns: set it to 0",
            is_unsupported=True,
        )


@Rule
def _targets_are_said_once(lora: LoraSection) -> Iterator[Problem]:
    targets = lora.target_modules
    if len(set(targets)) < len(targets) or (ALL_LINEAR in targets and len(targets) > 1):
        yield Problem(
            "lora.target_modules",
            f"got {list(targets)}, expected each projection once, or '{ALL_LINEAR}' alone",
        )


@Rule
def _parameters_are_gathered_first(
    lora: LoraSection, megatron: MegatronSection
) -> Iterator[Problem]:
    if lora.is_on and megatron.ddp.get("overlap_param_gather"):
        yield Problem(
            "megatron.ddp.overlap_param_gather",
            "true with lora.rank above 0: Megatron waits for the parameters of a module when it is "
            "called, and adapters are read by the layers beside them; remove it: adapters are small",
            is_unsupported=True,
        )


@Rule
def _grouped_ranks_are_aligned(lora: LoraSection, model: ModelSection) -> Iterator[Problem]:
    size = 4 if model.dtype == "float32" else 2
    if lora.is_on and model.grouped_experts and lora.rank * size % _GROUPED_BYTES:
        yield Problem(
            "lora.rank",
            f"{lora.rank} with model.grouped_experts: rows of {lora.rank * size} bytes, and a grouped "
            f"product needs multiples of {_GROUPED_BYTES}: choose a multiple of {_GROUPED_BYTES // size}, or "
            "grouped_experts = false",
            is_unsupported=True,
        )


@EffectRule
def _lora_without_effect(
    lora: LoraSection, checkpoint: CheckpointSection
) -> Iterator[tuple[str, str]]:
    if not lora.is_on:
        for key in LoraSection.model_fields:
            if key != "rank":
                yield f"lora.{key}", "lora.rank is 0, so no adapters are trained"
    elif not checkpoint.export:
        yield "lora.export", "checkpoint.export is false"
