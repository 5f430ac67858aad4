"""Gate weights as tests compare them: their gradient by differences, and their dense form.

In: logits, ids and a rule. Out: gradients, dense weights.
"""

from __future__ import annotations

import numpy as np

from moe_replay.routing.reference import RouterRule, gate_weights


def gate_gradient(
    logits: np.ndarray, expert_ids: np.ndarray, rule: RouterRule, upstream: np.ndarray
) -> np.ndarray:
    """Return the gradient of ``sum(upstream * gate_weights(...))`` with respect to the logits."""
    gradient = np.zeros_like(logits)
    step = 1e-6
    for expert in range(rule.num_experts):
        nudge = np.zeros(rule.num_experts)
        nudge[expert] = step
        above, below = (gate_weights(logits + by, expert_ids, rule) for by in (nudge, -nudge))
        gradient[:, expert] = (upstream * (above - below)).sum(axis=1) / (2 * step)
    return gradient


def dense_weights(expert_ids: np.ndarray, weights: np.ndarray, num_experts: int) -> np.ndarray:
    """Spread weights over all experts, 0 where one is not used: the form of Megatron-Core."""
    out = np.zeros((len(weights), num_experts))
    np.put_along_axis(out, expert_ids.astype(np.int64), weights, axis=1)
    return out
