"""What a router may be configured to do that no replay can be exact with.

In: routers. Out: UnsupportedError with the reason. Called by: megatron.replay.
"""

from __future__ import annotations

from megatron.core.transformer.moe.router import TopKRouter

from moe_replay.errors import UnsupportedError


def refuse_bypasses(layer: int, router: TopKRouter) -> None:
    """Raise `UnsupportedError` if the router of ``layer`` chooses, or drops, without asking a scope."""
    config = router.config
    reasons = {
        "moe_router_fusion": (config.moe_router_fusion, "the fused kernel picks experts itself"),
        "moe_router_load_balancing_type = sinkhorn": (
            getattr(router, "routing_type", None) == "sinkhorn",
            "sinkhorn balancing returns before the top-k",
        ),
        "moe_expert_capacity_factor": (
            config.moe_expert_capacity_factor is not None,
            "tokens over capacity are dropped after the replay",
        ),
        "moe_router_topk = num_moe_experts": (
            config.moe_router_topk >= config.num_moe_experts,
            "every expert runs for every token, so there is no choice to replay",
        ),
        "a router without router_replay": (
            not hasattr(router, "router_replay"),
            "Megatron-Core before 0.16 has no place to replay at",
        ),
    }
    for option, (is_set, why) in reasons.items():
        if is_set:
            raise UnsupportedError(
                f"layer {layer}: replay cannot be exact with {option}: {why}; turn it off or set "
                "replay.router_replay_mode = 'disabled'"
            )
