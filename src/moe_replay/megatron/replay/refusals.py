"""Refuses configurations with which no replay can be exact, and routes of another model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron.core.transformer.moe.router import TopKRouter

from moe_replay.errors import TraceError, UnsupportedError
from moe_replay.routing import RouteSlice, expert_dtype


class Verdict(StrEnum):
    """What the table says of one option of a configuration."""

    OK = "ok"
    """It is off, or set to what replay is exact with."""
    REFUSED = "refused"
    """It is on, and no scope opens."""
    NOT_APPLICABLE = "not applicable"
    """The model has no router, or this Megatron-Core has no such option."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One line of the table."""

    option: str
    """Name in messages: a TransformerConfig field, with its value where only some are refused."""
    fields: tuple[str, ...]
    """TransformerConfig fields of which this Megatron-Core needs one to know the option."""
    is_set: Callable[[Asked], bool]
    """Whether a configuration asks for it."""
    why: str
    """Why no replay can be exact with it."""
    remedy: str
    """What to set instead."""


# A configuration, or its fields as a recipe asks for them.
Asked = Any

_GRAPHS_WITHOUT_ROUTER = frozenset({"attn", "mlp", "mamba"})


def _captures_router(config: Asked) -> bool:
    """Whether a CUDA graph would hold a router; an empty list of modules means complete layers."""
    if config.cuda_graph_impl == "none":
        return False
    modules = getattr(config, "cuda_graph_modules", None) or config.cuda_graph_scope or ()
    if isinstance(modules, str):
        modules = [] if modules == "full" else modules.split(",")
    names = {getattr(module, "name", str(module)) for module in modules}
    return config.cuda_graph_impl != "transformer_engine" or not (
        names and names <= _GRAPHS_WITHOUT_ROUTER
    )


def _recomputes_router_in_low_precision(config: Asked) -> bool:
    low_precision = config.fp8 or getattr(config, "fp4", None)
    selected = "moe" in (config.recompute_modules or ())
    recomputes = config.recompute_granularity == "full" or (
        config.recompute_granularity == "selective" and selected
    )
    return bool(low_precision and recomputes)


def _balances_by(name: str) -> Callable[[Asked], bool]:
    def is_set(config: Asked) -> bool:
        chosen = config.moe_router_load_balancing_type
        return name in (chosen if isinstance(chosen, list) else [chosen])

    return is_set


def _given(*fields: str, why: str, remedy: str) -> Refusal:
    """Refuse a configuration that sets one of ``fields``, of which the first is the option."""

    def is_set(config: Asked) -> bool:
        return any(getattr(config, field, None) not in (None, False) for field in fields)

    return Refusal(option=fields[0], fields=fields, is_set=is_set, why=why, remedy=remedy)


REFUSALS = (
    _given(
        "moe_router_fusion",
        why="the fused kernel picks experts itself",
        remedy="moe_router_fusion = False",
    ),
    Refusal(
        option="moe_router_load_balancing_type = sinkhorn",
        fields=("moe_router_load_balancing_type",),
        is_set=_balances_by("sinkhorn"),
        why="sinkhorn balancing returns before the top-k",
        remedy="'none' or 'aux_loss'",
    ),
    Refusal(
        option="moe_router_load_balancing_type = quantile_balancing",
        fields=("moe_router_load_balancing_type",),
        is_set=_balances_by("quantile_balancing"),
        why="quantile balancing computes the experts before the top-k",
        remedy="'none' or 'aux_loss'",
    ),
    _given(
        "moe_expert_capacity_factor",
        "moe_expert_rank_capacity_factor",
        "moe_paged_stash",
        why="tokens over capacity are dropped after the replay",
        remedy="no capacity factor, which is dropless",
    ),
    Refusal(
        option="moe_router_topk = num_moe_experts",
        fields=("moe_router_topk",),
        is_set=lambda config: config.moe_router_topk >= config.num_moe_experts,
        why="every expert runs for every token, so there is no choice to replay",
        remedy="router_replay_mode = 'disabled'",
    ),
    Refusal(
        option="CUDA graphs that hold a router",
        fields=("cuda_graph_impl",),
        is_set=_captures_router,
        why="a captured graph repeats the routes that it was captured with",
        remedy="cuda_graph_impl = 'none', or graphs of attention alone",
    ),
    _given(
        "overlap_moe_expert_parallel_comm",
        "delay_wgrad_compute",
        "ep_overlap_early_attn_memory_release",
        why="the forward step only plans the layers, which then run between those of other microbatches",
        remedy="overlap_moe_expert_parallel_comm = False",
    ),
    Refusal(
        option="recomputed routers in fp8 or fp4",
        fields=("fp8", "fp4"),
        is_set=_recomputes_router_in_low_precision,
        why="Transformer Engine then recomputes, and does not say of which microbatch",
        remedy="no recomputation of MoE layers, or bf16",
    ),
    _given(
        "moe_router_force_load_balancing",
        "moe_router_force_biased",
        why="the scores are random numbers, so the weights of replayed experts would be",
        remedy="moe_router_force_load_balancing = False",
    ),
    _given(
        "moe_input_jitter_eps",
        why="each pass weighs the replayed experts by other noise, so that equal weights give unequal log-probabilities",
        remedy="moe_input_jitter_eps = None",
    ),
)


def judge(config: Asked) -> Iterator[tuple[Refusal, Verdict]]:
    """Yield every line of the table with its verdict on a TransformerConfig, or on its fields."""
    for refusal in REFUSALS:
        known = any(hasattr(config, field) for field in refusal.fields)
        if not config.num_moe_experts or not known:
            yield refusal, Verdict.NOT_APPLICABLE
        else:
            yield refusal, Verdict.REFUSED if refusal.is_set(config) else Verdict.OK


def refuse_bypasses(layer: int, router: TopKRouter) -> None:
    """Raise `UnsupportedError` if the router of ``layer`` can bypass a scope."""
    if not hasattr(router, "router_replay"):
        raise UnsupportedError(
            f"layer {layer}: the {type(router).__name__} has no `router_replay`, which routers of Megatron-Core have "
            "since 0.16; give the routers of moe_layers(chunks)"
        )
    for refusal, verdict in judge(router.config):
        if verdict is Verdict.REFUSED:
            raise UnsupportedError(
                f"layer {layer}: replay cannot be exact with {refusal.option}: {refusal.why}; set {refusal.remedy}, or "
                "replay.router_replay_mode = 'disabled'"
            )


def refuse_foreign_routes(
    key: int,
    routes: RouteSlice,
    routers: Mapping[int, TopKRouter],
) -> None:
    """Raise `TraceError` when routes cannot belong to a model with these routers."""
    missing = sorted(routers.keys() - set(routes.layers))
    if missing:
        raise TraceError(
            f"microbatch {key}: the routes hold layers {list(routes.layers)}, the model also routes in {missing}; the "
            "engine's model and this one differ, or the engine numbers MoE layers only"
        )
    config = next(iter(routers.values())).config
    _, rows, topk = routes.expert_ids.shape
    got = (routes.num_experts, topk, str(routes.expert_ids.dtype))
    num_experts = config.num_moe_experts
    expected = (num_experts, config.moe_router_topk, str(expert_dtype(num_experts)))
    if got != expected or len(routes.valid) != rows:
        raise TraceError(
            f"microbatch {key}: routes of (experts, topk, dtype) {got} with {rows} rows and "
            f"{len(routes.valid)} valid flags, expected {expected} and one flag a row; the engine "
            "runs another checkpoint than the trainer, or ids were widened on the way"
        )
