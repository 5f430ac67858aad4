"""Put adapters beside the linear layers of a built model, and freeze everything else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.families.family import Kind, ModelShape, Rule
from moe_replay.megatron.families.placed import PlacedWeight, placed_weights
from moe_replay.megatron.families.rules import family_of
from moe_replay.megatron.lora.adapters import Adapters, Matrix
from moe_replay.megatron.lora.layers import (
    Cut,
    LinearAdapter,
    LoraPair,
    Switch,
    add_adapter,
    grouped_change,
)
from moe_replay.megatron.ranks.messages import all_ranks
from moe_replay.megatron.upstream.layers import GroupedExperts
from moe_replay.recipe.sections.lora import ALL_LINEAR, LoraSection
from moe_replay.recipe.sections.training import ParallelLayout

_EXPERTS = ".mlp.experts."


def targets_of(shape: ModelShape, lora: LoraSection) -> frozenset[str]:
    """Return the projections of a model that get an adapter, such as ``q_proj``.

    Raises:
        UnsupportedError: the model has no projection of that name.
    """
    known = dict.fromkeys(
        name for rule in family_of(shape.family).rules for name in projections(rule)
    )
    wanted = set(lora.target_modules)
    if ALL_LINEAR in wanted:
        return frozenset(known)
    if unknown := sorted(wanted - set(known)):
        raise UnsupportedError(
            f"lora.target_modules names {', '.join(unknown)}, but a {shape.family} checkpoint has no such projection that can "
            f"have an adapter; it has {', '.join(known)}, and '{ALL_LINEAR}' stands for all of them"
        )
    return frozenset(wanted)


def projections(rule: Rule) -> tuple[str, ...]:
    """Return the names of the projections in a linear layer; nothing for any other parameter.

    Example: ``("q_proj", "k_proj", "v_proj")`` of ``linear_qkv.weight``.
    """
    module, _, parameter = rule.megatron.rpartition(".")
    if parameter != "weight" or not module.rpartition(".")[2].startswith("linear_"):
        return ()
    return tuple(name.split(".")[-2] for name in rule.hf)


def check_lora(
    shape: ModelShape, layout: ParallelLayout, lora: LoraSection, config: TransformerConfig
) -> None:
    """Refuse what adapters do not do exactly.

    Raises:
        UnsupportedError: it names the option, and what to set instead.
    """
    targets = targets_of(shape, lora)
    rules = family_of(shape.family).rules
    on_experts = any(
        "{expert}" in rule.megatron and targets.intersection(projections(rule)) for rule in rules
    )
    if shape.num_experts and on_experts and layout.expert_tensor_size > 1:
        raise UnsupportedError(
            f"adapters of experts with expert tensor parallelism {layout.expert_tensor_size}: each rank would add its part of "
            "the adapter's output to every other's. Set megatron.expert_tensor_parallel_size = 1, or leave the projections "
            "of experts out of lora.target_modules"
        )
    tensor = layout.tensor_model_parallel_size
    if any(
        rule.kind is Kind.QKV and targets.intersection(projections(rule)) for rule in rules
    ) and (shape.num_query_groups % tensor):
        raise UnsupportedError(
            f"adapters of q_proj, k_proj or v_proj with tensor parallelism {tensor} over {shape.num_query_groups} key and value "
            "heads: a rank holds part of a head. Set a megatron.tensor_model_parallel_size that divides "
            f"{shape.num_query_groups}, or leave these out of lora.target_modules"
        )
    for option, why in _REFUSED.items():
        if getattr(config, option, None):
            raise UnsupportedError(
                f"{option} = {getattr(config, option)!r} with [lora]: {why}; remove it, or set lora.rank = 0"
            )


def check_export(shape: ModelShape, lora: LoraSection) -> None:
    """Refuse adapters of routed experts that PEFT would leave out, or not load.

    It joins gate and up projections, and finds joined experts by all three projections of them or
    by the down projection alone.

    Raises:
        UnsupportedError: it names the projections, and what to set instead.
    """
    names = [
        name
        for rule in family_of(shape.family).rules
        if "{expert}" in rule.megatron
        for name in projections(rule)
    ]
    adapted = [name for name in names if name in targets_of(shape, lora)]
    if adapted in ([], names) or adapted == names[-1:]:
        return
    others = [name for name in names if name not in adapted]
    raise UnsupportedError(
        f"lora.export = 'adapter' with lora.target_modules that have {' and '.join(adapted)} of routed experts, without "
        f"{' and '.join(others)}: PEFT raises, or leaves the experts' adapters out without a word. Set lora.export = 'merged', "
        f"or have all of {', '.join(names)} in lora.target_modules, or {names[-1]} alone"
    )


_UNTRIED = "adapters were never checked with it"
_REFUSED = {
    "add_bias_linear": "adapters were never checked beside biases of experts, which gpt-oss has",
    "gradient_accumulation_fusion": _UNTRIED,
    "moe_shared_expert_overlap": "shared experts then run past their layers, and so past the adapters",
    "overlap_moe_expert_parallel_comm": _UNTRIED,
    "delay_wgrad_compute": _UNTRIED,
    "cpu_offloading": _UNTRIED,
    "fp8": _UNTRIED,
    "fp4": _UNTRIED,
    "moe_aux_loss_coeff": "it balances routers, which stay as they are",
    "moe_z_loss_coeff": "it trains routers, which stay as they are",
}
"""Field of Megatron's TransformerConfig -> why it does not go with adapters."""


def attach(
    chunks: Sequence[torch.nn.Module], config: TransformerConfig, lora: LoraSection, *, seed: int
) -> Adapters:
    """Freeze loaded chunks and put adapters beside their linear layers; collective.

    Matrices A are drawn by ``seed`` and their names, the same in every layout; matrices B are 0, so
    that nothing changes until something is learned.

    Raises:
        UnsupportedError: as `targets_of`; or a rank would have no adapter.
    """
    switch = Switch()
    layers: dict[torch.nn.Parameter, LinearAdapter] = {}
    matrices: list[Matrix] = []
    for chunk in map(unwrap, chunks):
        shape = chunk.model_shape
        targets, rules = targets_of(shape, lora), family_of(shape.family).rules
        placed = list(placed_weights(chunk))
        chunk.requires_grad_(False)
        for each in placed:
            names = projections(rules[each.rule])
            if targets.intersection(names):
                build = _Build(each, rules[each.rule], shape, config, lora, seed)
                module: Any = chunk.get_submodule(each.name.removesuffix(".weight"))
                adapter = build.adapter(module, targets, switch)
                add_adapter(module, adapter)
                layers[module.weight] = adapter
                matrices += build.matrices
        _group_experts(chunk)
        _begin_graph(chunk)
    if not all(all_ranks().gather(bool(matrices))):
        raise UnsupportedError(
            "a pipeline stage would have no adapter to train: choose more lora.target_modules, or a layout in which every "
            "stage has decoder layers with one of them"
        )
    return Adapters(layers, matrices, switch)


class _Build:
    """The adapters of one linear layer in the making."""

    def __init__(
        self,
        placed: PlacedWeight,
        rule: Rule,
        shape: ModelShape,
        config: TransformerConfig,
        lora: LoraSection,
        seed: int,
    ) -> None:
        self._placed, self._rule, self._shape = placed, rule, shape
        self._config, self._lora, self._seed = config, lora, seed
        self._is_expert = _EXPERTS in placed.name
        self._tensor = parallel_state.get_tensor_model_parallel_group()
        self.matrices: list[Matrix] = []

    @property
    def _cut(self) -> Cut:
        if self._is_expert or self._rule.kind is Kind.WHOLE:
            return "none"
        return "columns" if self._rule.kind is Kind.ROW else "rows"

    def adapter(self, module: Any, targets: frozenset[str], switch: Switch) -> LinearAdapter:
        """Make the pairs of the layer ``module``."""
        parts, groups = self._parts(len(module.weight))
        pairs = {}
        names = zip(projections(self._rule), self._rule.hf, strict=True)
        for leaf, template in names:
            if leaf in targets:
                name = template.format(layer=self._placed.layer, expert=self._placed.expert)
                pairs[leaf] = self._pair(name.removesuffix(".weight"), parts[leaf], module.weight)
        return LinearAdapter(
            pairs,
            parts=parts,
            groups=groups,
            cut=self._cut,
            is_expert=self._is_expert,
            scale=self._lora.scale,
            switch=switch,
            sequence_parallel=self._config.sequence_parallel,
            group=self._tensor,
        )

    def _parts(self, num_rows: int) -> tuple[Mapping[str, int], int]:
        """Return the rows that this rank holds of each projection, and their groups."""
        names = projections(self._rule)
        if self._rule.kind is not Kind.QKV:
            return dict.fromkeys(names, num_rows // len(names)), 1
        groups = self._shape.num_query_groups // self._tensor.size()
        each = groups * self._shape.head_dim
        return dict(zip(names, (num_rows - 2 * each, each, each), strict=True)), groups

    def _pair(self, name: str, num_rows: int, weight: torch.Tensor) -> LoraPair:
        rank, cut = self._lora.rank, self._cut
        width = weight.shape[1] * (self._tensor.size() if cut == "columns" else 1)
        first = _drawn(f"{name}.lora_A.weight", (rank, width), self._seed)
        if cut == "columns":
            first = first.chunk(self._tensor.size(), dim=1)[self._tensor.rank()]
        pair = LoraPair(first.to(weight).contiguous(), weight.new_zeros(num_rows, rank))
        # Where one matrix meets only some of the rows, its gradients are summed over the ranks with
        # the others: Megatron does so for what is marked.
        meets_some = {"rows": ("lora_A",), "columns": ("lora_B",), "none": ("lora_A", "lora_B")}[
            cut
        ]
        cut_dims = {"rows": ("lora_B", 0), "columns": ("lora_A", 1)}
        for matrix in ("lora_A", "lora_B"):
            parameter: Any = getattr(pair, matrix)
            dim = cut_dims[cut][1] if cut in cut_dims and cut_dims[cut][0] == matrix else None
            if self._is_expert:
                parameter.allreduce = False
            elif matrix in meets_some:
                parameter.sequence_parallel = self._config.sequence_parallel
            # As Megatron marks experts too, whose ranks all hold different ones.
            parameter.tensor_model_parallel = dim is not None or self._is_expert
            parameter.partition_dim, parameter.partition_stride = -1 if dim is None else dim, 1
            self.matrices.append(
                Matrix(
                    name=f"{name}.{matrix}.weight",
                    part=parameter,
                    cut_dim=dim,
                    is_expert=self._is_expert,
                )
            )
        return pair


def _drawn(name: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Draw a matrix A evenly from +-1 / sqrt(inputs), as PEFT does."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return (torch.rand(shape, generator=generator) * 2 - 1) / shape[1] ** 0.5


def _group_experts(chunk: torch.nn.Module) -> None:
    for module in chunk.modules():
        if isinstance(module, GroupedExperts):
            module.change = grouped_change
            module.join()


def _begin_graph(chunk: Any) -> None:
    """Let the graph begin at the embedding, though it is frozen.

    Recomputed layers have no gradient unless their input has one, and a stage whose output has none
    cannot run backward.
    """
    if not chunk.pre_process:
        return

    def begin(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)

    chunk.embedding.register_forward_hook(begin)
