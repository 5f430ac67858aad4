"""Check `[megatron.transformer]`, `[megatron.ddp]` and `[megatron.optimizer]` against the tables.

Names and types are compared with the installed Megatron-Core in `moe_replay.megatron.options`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_replay.recipe.options.decided import DECIDED
from moe_replay.recipe.options.refused import REFUSED
from moe_replay.recipe.options.rows import Switch
from moe_replay.recipe.options.switches import SWITCHES

Tables = Mapping[str, Mapping[str, Any]]
"""``transformer``, ``ddp`` and ``optimizer`` -> field -> value, as a recipe says them."""

_NOT_PARALLEL = (
    (
        "moe_z_loss_coeff",
        "Megatron-Core divides the loss by the ranks that share a sequence, and each then counts "
        "its own rows alone, so that it would weigh less the more of them there are",
        ("tensor_model_parallel_size", "context_parallel_size"),
    ),
    (
        "cpu_offloading",
        "Megatron-Core offloads activations on one stage only",
        ("pipeline_model_parallel_size",),
    ),
)


def megatron_problems(
    section: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    own_keys: frozenset[str],
    dtype: str,
) -> Iterator[tuple[str, str, bool]]:
    """Yield (dotted key, what is wrong, whether it only cannot be honoured) for all three tables.

    ``section`` is ``[megatron]`` as nested tables, ``optimizer`` its table of that name with what
    follows from it, ``own_keys`` the keys of ``[megatron]`` itself that TransformerConfig knows
    too, ``dtype`` that of the model, which may still be ``auto``.
    """
    tables = {name: section[name] for name in ("transformer", "ddp", "optimizer")}
    yield from _single_problems(
        tables,
        tables | {"optimizer": optimizer},
        section["moe_token_dispatcher_type"],
        own_keys,
    )
    yield from _offload_problems(section["optimizer"], dtype)
    yield from _layout_problems(section["transformer"], section)


def _single_problems(
    tables: Tables, effective: Tables, dispatcher: str, own_keys: frozenset[str]
) -> Iterator[tuple[str, str, bool]]:
    """Yield (dotted key, what is wrong, whether it only cannot be honoured) for all three tables.

    ``effective`` are the tables with what follows from them, such as that one option sets another.
    ``dispatcher`` is ``megatron.moe_token_dispatcher_type``; ``own_keys`` are the keys of
    ``[megatron]`` itself that Megatron's TransformerConfig knows too.
    """
    for name in tables["transformer"]:
        if name in own_keys:
            yield (
                f"megatron.transformer.{name}",
                f"set beside megatron.{name}, which is the same option: keep one of the two",
                False,
            )
    for row in DECIDED:
        for name in _set(tables, row.table, row.fields):
            yield (
                f"megatron.{row.table}.{name}",
                f"set to {tables[row.table][name]!r}, but what decides it is {row.by}. Remove it",
                False,
            )
    for row in REFUSED:
        for name in _set(tables, row.table, row.fields):
            value = tables[row.table][name]
            if row.values(value):
                yield (
                    f"megatron.{row.table}.{name}",
                    f"{value!r} cannot be honoured: {row.why}. Remove it",
                    True,
                )
    for row in SWITCHES:
        for name in _set(tables, row.table, row.fields):
            if not _is_on(effective, dispatcher, row):
                value = "set" if row.value is None else repr(row.value).lower()
                wanted = f"megatron.{row.needs} is not {value}"
                yield (
                    f"megatron.{row.table}.{name}",
                    f"set to {tables[row.table][name]!r}, but it has no effect: {wanted}. Remove "
                    "it, or set that",
                    False,
                )


def _offload_problems(optimizer: Mapping[str, Any], dtype: str) -> Iterator[tuple[str, str, bool]]:
    """Yield what does not go with an optimizer on the host, for a model of ``dtype``.

    ``auto`` passes: what it becomes is judged where the device is known.
    """
    if not optimizer.get("optimizer_cpu_offload"):
        return
    prefix = "megatron.optimizer"
    if dtype not in ("bfloat16", "auto"):
        yield (
            f"{prefix}.optimizer_cpu_offload",
            f"true with model.dtype = {dtype!r}: Megatron's HybridDeviceOptimizer cannot load the "
            "checkpoints of such a model again; set model.dtype = 'bfloat16', or remove it",
            True,
        )
    if optimizer.get("use_precision_aware_optimizer") is False:
        yield (
            f"{prefix}.use_precision_aware_optimizer",
            "false beside optimizer_cpu_offload = true, which needs it: main weights would stay on "
            "the device, and checkpoints could not be loaded again. Remove it",
            True,
        )
    if optimizer.get("decoupled_weight_decay") is False:
        yield (
            f"{prefix}.decoupled_weight_decay",
            "false beside optimizer_cpu_offload = true, whose optimizer is AdamW. Remove it",
            True,
        )
    for name in (
        "main_params_dtype",
        "exp_avg_dtype",
        "exp_avg_sq_dtype",
        "store_param_remainders",
    ):
        if name in optimizer:
            yield (
                f"{prefix}.{name}",
                f"set to {optimizer[name]!r}, but it has no effect: with optimizer_cpu_offload = "
                "true main weights and moments are float32 on the host. Remove it",
                False,
            )


def _layout_problems(
    transformer: Mapping[str, Any], layout: Mapping[str, Any]
) -> Iterator[tuple[str, str, bool]]:
    """Yield options that do not go with a degree of parallelism, by its key in ``[megatron]``."""
    for name, why, degrees in _NOT_PARALLEL:
        for degree in degrees:
            if transformer.get(name) and layout[degree] > 1:
                yield (
                    f"megatron.transformer.{name}",
                    f"{transformer[name]!r} with megatron.{degree} = {layout[degree]}: {why}. "
                    "Remove it, or set that to 1",
                    True,
                )


def _set(tables: Tables, table: str, fields: tuple[str, ...]) -> Iterator[str]:
    return (name for name in fields if name in tables[table])


def _is_on(tables: Tables, dispatcher: str, row: Switch) -> bool:
    table, dot, field = row.needs.partition(".")
    value = tables[table].get(field) if dot else dispatcher
    return value not in (None, False) if row.value is None else value == row.value
