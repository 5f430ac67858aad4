"""The weights that a built model chunk holds, and what each of them is in the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.families.rules import family_of

ADAPTER_MARK = ".adapters."
"""In the name of every parameter of an adapter, and of no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedWeight:
    """A parameter, or a buffer that belongs to the weights, and what it is in the checkpoint."""

    name: str
    """In the model chunk."""
    weight: Tensor
    """Itself."""
    rule: int
    """Index in the family's table."""
    layer: int
    """Global decoder layer, -1 outside."""
    expert: int
    """Global number of its expert, -1 without one."""


def placed_weights(chunk: GPTModel) -> Iterator[PlacedWeight]:
    """Yield the weights that a model chunk holds for a checkpoint; adapters are not among them.

    Raises:
        UnsupportedError: no rule of the model's family covers a parameter.
    """
    shape = chunk.model_shape
    patterns = _patterns(shape.family)
    num_local = shape.num_experts // parallel_state.get_expert_model_parallel_world_size()
    first_expert = parallel_state.get_expert_model_parallel_rank() * num_local
    layer_of = {str(i): layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
    # Of the buffers some rules name, such as a router's expert bias, belong to the weights.
    for name, weight in chain(chunk.named_parameters(), chunk.named_buffers()):
        matched = _match(name, patterns)
        if matched is None:
            if isinstance(weight, torch.nn.Parameter) and ADAPTER_MARK not in name:
                raise UnsupportedError(
                    f"Megatron parameter {name!r} is in no rule of the {shape.family} table, so it could be "
                    "neither loaded nor exported. Add a rule to moe_replay/megatron/families/rules.py."
                )
            continue
        rule, groups = matched
        yield PlacedWeight(
            name=name,
            weight=weight,
            rule=rule,
            layer=layer_of[groups["layer"]] if "layer" in groups else -1,
            expert=first_expert + int(groups["expert"]) if "expert" in groups else -1,
        )


@cache
def _patterns(family: str) -> tuple[re.Pattern[str], ...]:
    return tuple(
        re.compile(
            re.escape(rule.megatron)
            .replace(r"\{layer\}", r"(?P<layer>\d+)")
            .replace(r"\{expert\}", r"(?P<expert>\d+)")
        )
        for rule in family_of(family).rules
    )


def _match(name: str, patterns: Sequence[re.Pattern[str]]) -> tuple[int, Mapping[str, str]] | None:
    for rule, pattern in enumerate(patterns):
        if match := pattern.fullmatch(name):
            return rule, match.groupdict()
    return None
