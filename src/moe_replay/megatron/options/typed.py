"""Names and values of Megatron's options, compared with the dataclasses that are installed.

In: the three tables of a recipe, in the types that TOML has. Out: fields of TransformerConfig,
DistributedDataParallelConfig and OptimizerConfig in Megatron's types, or what is wrong with them.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig

from moe_replay.errors import (
    MachineError,
    MoeReplayError,
    RecipeError,
    UnsupportedError,
    nearest_of,
)
from moe_replay.megatron.options.needs import missing_packages
from moe_replay.megatron.upstream.compat import VERSION
from moe_replay.recipe.sections.training import MegatronSection

# The config of latent attention has every field that the plain one has.
_CONFIGS: Mapping[str, type] = {
    "transformer": MLATransformerConfig,
    "ddp": DistributedDataParallelConfig,
    "optimizer": OptimizerConfig,
}
_SINCE = {
    "moe_router_force_biased": "0.17",
    "moe_expert_rank_capacity_factor": "0.18",
    "moe_paged_stash": "0.18",
    "moe_permute_fusion_into_hybridep": "0.18",
    "cuda_graph_modules": "0.18",
    "moe_router_quantile_balancing_ema": "0.19",
}
"""Field -> the release of Megatron-Core that brought it, for those that recipes set."""
_DTYPES = ("float32", "bfloat16", "float16", "uint8")
_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    torch.dtype: f"one of {', '.join(map(repr, _DTYPES))} (uint8 holds fp8)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronOptions:
    """What a recipe says of Megatron's own configs, in Megatron's types."""

    transformer: Mapping[str, Any] = field(default_factory=dict)
    """TransformerConfig fields beside those of the layout and the checkpoint."""
    ddp: Mapping[str, Any] = field(default_factory=dict)
    """DistributedDataParallelConfig fields."""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """OptimizerConfig fields beside those of ``[optimizer]``."""


class _WrongType(Exception):
    """Says what a field takes."""


def option_errors(section: MegatronSection) -> Iterator[MoeReplayError]:
    """Yield what is wrong with the three tables here: names, types, packages that are missing."""
    for table, config in _CONFIGS.items():
        hints = _hints(config)
        for name, value in getattr(section, table).items():
            key = f"megatron.{table}.{name}"
            if name not in hints:
                yield RecipeError(f"{key}: set to {value!r}, but {_unknown(config, name, hints)}")
                continue
            try:
                _converted(value, hints[name])
            except _WrongType as wanted:
                yield RecipeError(
                    f"{key}: got {value!r}, expected {wanted}, as {_name(config)} of "
                    f"Megatron-Core {_release()} declares it"
                )
    balancing = section.transformer.get("moe_router_load_balancing_type", ())
    lacks = "moe_router_quantile_balancing_ema" not in _hints(MLATransformerConfig)
    if "quantile_balancing" in balancing and lacks:
        yield UnsupportedError(
            f"megatron.transformer.moe_router_load_balancing_type: {balancing!r} came with "
            f"Megatron-Core 0.19; {_release()} would balance nothing without a word. Remove it, or "
            "install that release"
        )
    for key, missing in missing_packages(section):
        yield MachineError(f"{key}: {missing}")


def read_options(section: MegatronSection) -> MegatronOptions:
    """Return the options of a recipe in Megatron's types.

    Raises:
        RecipeError: a name or a type is wrong.
        MachineError: an option needs a package or a device that is missing.
    """
    for error in option_errors(section):
        raise error
    said = {
        "transformer": section.config_fields(),
        "ddp": section.ddp_fields(),
        "optimizer": section.optimizer_fields(),
    }
    return MegatronOptions(
        **{
            table: {name: _converted(value, hints[name]) for name, value in said[table].items()}
            for table, hints in ((table, _hints(config)) for table, config in _CONFIGS.items())
        }
    )


def _hints(config: type) -> dict[str, Any]:
    """Return the fields of a config that a recipe may name, with their types."""
    hints = get_type_hints(config)
    return {
        each.name: hints[each.name]
        for each in dataclasses.fields(config)
        if each.init and not each.name.startswith("_")
    }


def _unknown(config: type, name: str, hints: Mapping[str, Any]) -> str:
    kind = _name(config)
    if name in _SINCE:
        return (
            f"{kind} of Megatron-Core {_release()} has no such field; it came with "
            f"{_SINCE[name]}. Remove it, or install that release"
        )
    elsewhere = [
        table for table, other in _CONFIGS.items() if other is not config and name in _hints(other)
    ]
    if elsewhere:
        return f"{kind} has no such field; move it to [megatron.{elsewhere[0]}]"
    return (
        f"{kind} of Megatron-Core {_release()} has no such field{nearest_of(name, hints)}. Rename "
        "it, or remove it"
    )


def _name(config: type) -> str:
    return config.__name__.removeprefix("MLA")


def _release() -> str:
    return ".".join(map(str, VERSION))


def _converted(value: Any, hint: Any) -> Any:
    """Return a TOML value in the type of a field, or raise `_WrongType`.

    Examples:
        >>> _converted("bfloat16", torch.dtype)
        torch.bfloat16
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _first_that_fits(value, [kind for kind in inner if kind is not type(None)])
    if origin is Literal:
        if value in inner and type(value) in {type(choice) for choice in inner}:
            return value
        raise _WrongType(f"one of {', '.join(map(repr, inner))}{nearest_of(str(value), inner)}")
    if origin in (list, tuple) or hint in (list, tuple):
        return _converted_list(value, origin or hint, inner)
    if hint is torch.dtype:
        if isinstance(value, str) and value in _DTYPES:
            return getattr(torch, value)
        raise _WrongType(_WORDS[hint])
    if isinstance(hint, type) and issubclass(hint, Enum):
        if isinstance(value, str) and value in hint.__members__:
            return hint[value]
        names = list(hint.__members__)
        raise _WrongType(f"one of {', '.join(map(repr, names))}{nearest_of(str(value), names)}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (bool, int, float, str):
        if type(value) is hint:
            return value
        raise _WrongType(_WORDS[hint])
    raise _WrongType("nothing: it is an object of Python, which a recipe cannot hold")


def _converted_list(value: Any, kind: type, inner: tuple[Any, ...]) -> Any:
    if not isinstance(value, list):
        raise _WrongType("a list")
    if kind is tuple and Ellipsis not in inner and len(inner) not in (0, len(value)):
        raise _WrongType(f"a list of {len(inner)}")
    one = inner[0] if inner else Any
    return kind(_converted(each, one) for each in value)


def _first_that_fits(value: Any, kinds: list[Any]) -> Any:
    wanted = []
    for kind in kinds:
        try:
            return _converted(value, kind)
        except _WrongType as error:
            wanted.append(str(error))
    # What cannot be written matters only where nothing else can.
    writable = [text for text in wanted if not text.startswith("nothing")]
    raise _WrongType(" or ".join(dict.fromkeys(writable or wanted)))
