"""Router math in plain float64: the oracle for every backend's live and replayed gates.

Replay fixes which experts run. Their gate weights always come from the current logits: the model's
own score function, gathered at the replayed ids. For a softmax router that is ``g_i = I_i exp(s_i)
/ sum_j I_j exp(s_j)`` with the replayed mask ``I``; the logits of experts that were not replayed
then get no gradient from the normalised weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import RecipeError, TraceError

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64, Integer

_TINY = 1e-20  # keeps the normalisation finite when every chosen score underflows, as Megatron-Core does


class ScoreFunction(StrEnum):
    """How logits become scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SQRT_SOFTPLUS = "sqrtsoftplus"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRule:
    """How one model's routers choose experts and weigh them.

    Source: DeepSeek-V3 (arXiv 2412.19437), equations 13 to 16: scores, biased selection, unbiased
    and normalised weights. R3 (arXiv 2510.11370): replayed softmax weights. megatron-core 0.16.1,
    topk_routing_with_score_function.
    """

    num_experts: int
    """Routed experts a layer."""
    topk: int
    """Experts per token."""
    score_function: ScoreFunction
    """How logits become scores."""
    normalise: bool
    """True: weights of the chosen experts sum to ``scaling_factor``; a softmax is over the chosen.
    False: the scores themselves are the weights; a softmax is taken over all experts, before
    choosing."""
    scaling_factor: float = 1.0
    """Multiplies every weight."""
    num_groups: int | None = None
    """Equal groups of neighbouring experts, for group-limited choice; None for none."""
    groups_per_token: int | None = None
    """Groups that a token may use; its experts come from these alone."""

    def __post_init__(self) -> None:
        if not 1 <= self.topk <= self.num_experts:
            raise RecipeError(f"topk is {self.topk} of {self.num_experts} experts")
        if (self.num_groups is None) != (self.groups_per_token is None):
            raise RecipeError(
                f"num_groups is {self.num_groups} and groups_per_token {self.groups_per_token}; give both or neither"
            )
        if self.num_groups is None or self.groups_per_token is None:
            return
        size = self.num_experts // self.num_groups
        if (
            self.num_experts % self.num_groups
            or self.topk % self.groups_per_token
            or not 1 <= self.groups_per_token <= self.num_groups
            or self.topk > size * self.groups_per_token
        ):
            raise RecipeError(
                f"top-{self.topk} of {self.num_experts} experts does not fit {self.groups_per_token} of "
                f"{self.num_groups} equal groups; experts must divide by groups, topk by groups_per_token"
            )


def live_ids(
    logits: Float64[np.ndarray, "tokens experts"],
    rule: RouterRule,
    expert_bias: Float64[np.ndarray, " experts"] | None = None,
) -> Int64[np.ndarray, "tokens topk"]:
    """Return the experts that the router chooses, best first; equal scores go to the lower id.

    ``expert_bias`` is added to the scores: it moves the choice and never the weights.
    """
    if expert_bias is None:
        selection = _selection_scores(logits, rule)
    else:
        selection = _scores(logits, rule.score_function) + expert_bias
    if rule.num_groups is not None and rule.groups_per_token is not None:
        selection = _within_groups(selection, rule.num_groups, rule.groups_per_token, rule.topk)
    return _best(selection, rule.topk)


def gate_weights(
    logits: Float64[np.ndarray, "tokens experts"],
    expert_ids: Integer[np.ndarray, "tokens topk"],
    rule: RouterRule,
) -> Float64[np.ndarray, "tokens topk"]:
    """Return the weight of each chosen expert under the current logits, whatever chose them.

    Neither the bias nor the group limit enters: both only restrict the choice.

    Raises:
        TraceError: when ids have another k, lie outside the experts or name one twice in a row.
    """
    chosen = _checked(expert_ids, logits, rule)
    if rule.score_function is ScoreFunction.SOFTMAX and rule.normalise:
        weights = _softmax(np.take_along_axis(logits, chosen, axis=1))
    else:
        weights = np.take_along_axis(_scores(logits, rule.score_function), chosen, axis=1)
        if rule.normalise:
            weights = weights / (weights.sum(axis=1, keepdims=True) + _TINY)
    return weights * rule.scaling_factor


def _selection_scores(
    logits: Float64[np.ndarray, "tokens experts"], rule: RouterRule
) -> Float64[np.ndarray, "tokens experts"]:
    # Logits and their softmax rank experts alike, but the group limit adds scores up, and sums
    # differ.
    if rule.score_function is ScoreFunction.SOFTMAX and rule.normalise:
        return logits
    return _scores(logits, rule.score_function)


def _within_groups(
    selection: Float64[np.ndarray, "tokens experts"],
    num_groups: int,
    groups_per_token: int,
    topk: int,
) -> Float64[np.ndarray, "tokens experts"]:
    """Put -inf on experts outside the best groups, by ``topk / groups_per_token`` experts each."""
    tokens, experts = selection.shape
    grouped = selection.reshape(tokens, num_groups, experts // num_groups)
    worth = np.sort(grouped, axis=2)[..., -(topk // groups_per_token) :].sum(axis=2)
    allowed = np.zeros((tokens, num_groups), dtype=bool)
    np.put_along_axis(allowed, _best(worth, groups_per_token), True, axis=1)
    return np.where(allowed[..., None], grouped, -np.inf).reshape(tokens, experts)


def _best(
    scores: Float64[np.ndarray, "tokens candidates"], count: int
) -> Int64[np.ndarray, "tokens count"]:
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def _scores(
    logits: Float64[np.ndarray, "tokens experts"], function: ScoreFunction
) -> Float64[np.ndarray, "tokens experts"]:
    if function is ScoreFunction.SOFTMAX:
        return _softmax(logits)
    if function is ScoreFunction.SIGMOID:
        return np.exp(-np.logaddexp(0.0, -logits))
    return np.sqrt(np.logaddexp(0.0, logits))


def _softmax(logits: Float64[np.ndarray, "tokens n"]) -> Float64[np.ndarray, "tokens n"]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _checked(
    expert_ids: Integer[np.ndarray, "tokens topk"],
    logits: Float64[np.ndarray, "tokens experts"],
    rule: RouterRule,
) -> Int64[np.ndarray, "tokens topk"]:
    expected = (len(logits), rule.topk)
    if expert_ids.shape != expected or logits.shape[1] != rule.num_experts:
        raise TraceError(
            f"ids of shape {expert_ids.shape} and logits of shape {logits.shape}, expected {expected} and "
            f"{(len(logits), rule.num_experts)}"
        )
    chosen = expert_ids.astype(np.int64)
    ordered = np.sort(chosen, axis=1)
    if (ordered[:, :1] < 0).any() or (ordered[:, -1:] >= rule.num_experts).any():
        raise TraceError(f"expert ids must lie in 0..{rule.num_experts - 1}")
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise TraceError("a row names an expert twice; its weight would be lost in a routing map")
    return chosen
