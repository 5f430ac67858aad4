"""Which keys make a recipe fit: candidate changes, tried with the same formulas, the fewest first.

In: a recipe that does not fit. Out: the smallest sets of changes with which it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from moe_replay.errors import MoeReplayError
from moe_replay.megatron.families.family import ModelShape
from moe_replay.plan.machine import Machine
from moe_replay.plan.memory import MemoryPlan, plan_memory
from moe_replay.plan.options import check_options
from moe_replay.recipe.load import recipe_from_table
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.rollout import VllmEngineSection

MAX_CHANGES = 4
"""Changes of one set; more is another recipe."""
MAX_SETS = 4
"""Sets that are shown."""

_LEAN = {
    "use_precision_aware_optimizer": True,
    "main_grads_dtype": "bfloat16",
    "exp_avg_dtype": "bfloat16",
    "exp_avg_sq_dtype": "bfloat16",
}
_OF_OFFLOAD = frozenset(
    (
        "optimizer_cpu_offload",
        "optimizer_offload_fraction",
        "overlap_cpu_optimizer_d2h_h2d",
        "pin_cpu_grads",
        "pin_cpu_params",
        "use_torch_optimizer_for_cpu_offload",
    )
)
"""Keys of an optimizer on the host alone."""
_OF_THE_DEVICE = frozenset(
    ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype", "store_param_remainders")
)
"""Keys that an optimizer on the host refuses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of one thing in a recipe."""

    group: str
    """What it changes; of each group a set has one at most."""
    keys: Mapping[str, Any]
    """Dotted key -> new value; None removes the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Changes with which a recipe fits."""

    keys: Mapping[str, Any]
    """Dotted key -> new value; None removes the key."""
    memory: MemoryPlan
    """What the changed recipe needs."""


def remedies(recipe: Recipe, shape: ModelShape, machine: Machine) -> list[Remedy]:
    """Return the smallest sets of changes with which ``recipe`` fits; what leaves most room first.

    Of sets of one size the `MAX_SETS` are taken that cost least.

    Empty if no set of `MAX_CHANGES` is enough. Changes that a recipe refuses are left out.
    """
    changes = list(_changes(recipe, shape, machine))
    for count in range(1, MAX_CHANGES + 1):
        found: list[Remedy] = []
        for some in combinations(changes, count):
            if len({change.group for change in some}) < count:
                continue
            keys = {key: value for change in some for key, value in change.keys.items()}
            memory = _with(recipe, keys, shape, machine)
            if memory is not None and memory.fits:
                found.append(Remedy(keys=keys, memory=memory))
            if len(found) == MAX_SETS:
                break
        if found:
            return sorted(found, key=lambda remedy: -remedy.memory.headroom)
    return []


def recipe_lines(keys: Mapping[str, Any]) -> list[str]:
    """Return keys as lines of a recipe, grouped by table."""
    tables: dict[str, list[str]] = {}
    for key, value in keys.items():
        table, _, name = key.rpartition(".")
        line = f"# remove {name}" if value is None else f"{name} = {_toml(value)}"
        tables.setdefault(table, []).append(line)
    return [line for table, lines in tables.items() for line in (f"[{table}]", *lines)]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_toml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _with(
    recipe: Recipe, keys: Mapping[str, Any], shape: ModelShape, machine: Machine
) -> MemoryPlan | None:
    """Return the plan of a changed recipe, or None where it is refused."""
    table = recipe.resolved_table()
    for key, value in keys.items():
        *parents, name = key.split(".")
        target = table
        for parent in parents:
            target = target.setdefault(parent, {})
        if value is None:
            target.pop(name, None)
        else:
            target[name] = value
    try:
        changed = recipe_from_table(table)
        memory = plan_memory(changed, shape, machine)
        if memory.fits:
            check_options(changed, shape, machine)
        return memory
    except MoeReplayError:
        return None


def _changes(recipe: Recipe, shape: ModelShape, machine: Machine) -> Iterator[Change]:
    """Yield candidates, those that cost least first."""
    megatron, batch = recipe.megatron, recipe.batch
    if batch.logprob_chunk_size > 1024:
        yield Change(group="chunks", keys={"batch.logprob_chunk_size": 1024})
    yield from _rollout_changes(recipe, machine)
    if megatron.recompute_granularity is None:
        modules = {
            "megatron.recompute_granularity": "selective",
            "megatron.recompute_modules": ["moe"],
        }
        yield Change(group="recompute", keys=modules)
    if megatron.recompute_granularity != "full":
        whole = {
            "megatron.recompute_granularity": "full",
            "megatron.recompute_method": "uniform",
            "megatron.recompute_num_layers": 1,
            "megatron.recompute_modules": None,
        }
        yield Change(group="recompute", keys=whole)
    longest = recipe.max_sequence_length
    budget = batch.max_tokens_per_microbatch
    if budget is not None and budget > longest:
        for tokens in {max(longest, budget // 2), longest}:
            yield Change(group="tokens", keys={"batch.max_tokens_per_microbatch": tokens})
    elif batch.micro_batch_size is not None and batch.micro_batch_size > 1:
        yield Change(group="tokens", keys={"batch.micro_batch_size": 1})
    yield from _optimizer_changes(recipe)
    yield from _layout_changes(recipe, shape, machine)


def _rollout_changes(recipe: Recipe, machine: Machine) -> Iterator[Change]:
    section = recipe.rollout
    if section.shares_device and recipe.megatron.offload_during_rollout != "weights":
        yield Change(group="offload", keys={"megatron.offload_during_rollout": "weights"})
    if not isinstance(section, VllmEngineSection):
        return
    if section.kv_cache_gib is None:
        for share in (0.8, 0.7, 0.6, 0.5, 0.4):
            if share < (section.gpu_memory_utilization or 1):
                yield Change(group="cache", keys={"rollout.gpu_memory_utilization": share})
    ranks = section.tensor_parallel_size * 2
    while ranks <= machine.gpus_per_node:
        yield Change(group="engine", keys={"rollout.tensor_parallel_size": ranks})
        ranks *= 2


def _optimizer_changes(recipe: Recipe) -> Iterator[Change]:
    if recipe.model.dtype == "float32":
        yield Change(group="dtype", keys={"model.dtype": "bfloat16"})
    said = recipe.megatron.optimizer
    offload = {"optimizer_cpu_offload": True, "use_precision_aware_optimizer": True}
    both = offload | {"main_grads_dtype": "bfloat16"}
    for wanted, refused in (
        (_LEAN, _OF_OFFLOAD),
        (offload, _OF_THE_DEVICE),
        (both, _OF_THE_DEVICE),
    ):
        lacks = {name: value for name, value in wanted.items() if said.get(name) != value}
        # What the other kind of optimizer refuses goes.
        lacks |= dict.fromkeys(name for name in said if name in refused)
        if lacks:
            keys = {f"megatron.optimizer.{name}": value for name, value in lacks.items()}
            yield Change(group="optimizer", keys=keys)


def _layout_changes(recipe: Recipe, shape: ModelShape, machine: Machine) -> Iterator[Change]:
    """Yield larger degrees: each spreads what fits on no rank over more of them."""
    layout = recipe.megatron
    experts = layout.expert_model_parallel_size
    for factor in (2, 4, 8, 16):
        size = experts * factor
        if shape.num_experts and shape.num_experts % size == 0 and size <= machine.num_gpus:
            keys = {"megatron.expert_model_parallel_size": size}
            if layout.tensor_model_parallel_size > 1 and layout.expert_tensor_parallel_size is None:
                keys["megatron.expert_tensor_parallel_size"] = 1
            yield Change(group="experts", keys=keys)
    for name, most, group in (
        ("tensor_model_parallel_size", machine.gpus_per_node, "tensor"),
        ("pipeline_model_parallel_size", machine.num_gpus, "pipeline"),
        ("context_parallel_size", machine.num_gpus, "context"),
    ):
        for factor in (2, 4, 8):
            size = getattr(layout, name) * factor
            if size > most:
                continue
            keys = {f"megatron.{name}": size}
            if group == "tensor" and shape.num_experts and not layout.expert_tensor_parallel_size:
                keys["megatron.expert_tensor_parallel_size"] = 1
            yield Change(group=group, keys=keys)
