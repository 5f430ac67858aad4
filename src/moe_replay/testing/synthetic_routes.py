"""Traces of random routes, for tests. `drawn_steps` has the habits of a trained router.

In: token ids and a seed. Out: a trace.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

from moe_replay.routing import Origin, RoutingTrace


def synthetic_trace(
    token_ids: np.ndarray,
    *,
    seed: int,
    num_layers: int = 3,
    num_experts: int = 16,
    topk: int = 4,
    first_layer: int = 0,
    policy_version: int = 0,
    valid: Bool[np.ndarray, " tokens"] | None = None,
) -> RoutingTrace:
    """Return a trace of random routes for ``token_ids``; by default without one in the last row."""
    generator = np.random.default_rng(seed)
    order = generator.random((len(token_ids), num_layers, num_experts)).argsort(axis=2)
    return RoutingTrace.record(
        order[..., :topk],
        token_ids=token_ids,
        valid=np.arange(len(token_ids)) < len(token_ids) - 1 if valid is None else valid,
        layers=range(first_layer, first_layer + num_layers),
        num_experts=num_experts,
        origin=Origin.single(
            engine="synthetic",
            engine_version="1",
            policy_version=policy_version,
            num_rows=len(token_ids),
        ),
    )
