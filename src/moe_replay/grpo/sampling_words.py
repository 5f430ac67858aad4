"""How a run samples, in words: what tokens are drawn from, and what ends a completion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_replay.checkpoint.config import load_config, load_generation_config
from moe_replay.checkpoint.stop_tokens import describe_stop_tokens, stop_tokens
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.rollout import ServersEngineSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def describe_drawing(recipe: Recipe) -> str:
    """Return what tokens are drawn from, and what that costs when it is not all of them."""
    rollout = recipe.rollout
    limits = [f"top_p {rollout.top_p:g}"] * (rollout.top_p < 1)
    limits += [f"top_k {rollout.top_k}"] * (rollout.top_k > 0)
    limits += [f"min_p {rollout.min_p:g}"] * (rollout.min_p > 0)
    if not limits:
        return f"temperature {rollout.temperature:g}, the full vocabulary"
    return (
        f"temperature {rollout.temperature:g}, truncated by {' and '.join(limits)}: what each token "
        "was drawn from is kept (8 bytes a token and 4 a candidate"
        + (f", of which there are at most {rollout.top_k}" if rollout.top_k else "")
        + "), and all log-probabilities of the trainer are those among it"
    )


def describe_overlap(recipe: Recipe) -> str:
    """Return when rollouts run beside the steps that learn from them."""
    if not recipe.rollout.max_staleness:
        return "before each step, by its weights"
    rollout = recipe.rollout
    crosses = isinstance(rollout, ServersEngineSection) and rollout.push_in_flight
    beside = "beside the step before, so completions are one weight push old (max_staleness 1)"
    return f"{beside}, or a push meets them (push_in_flight)" if crosses else beside


def describe_ends(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what ends a completion, and who says so."""
    path = recipe.model.path
    tokens = stop_tokens(load_generation_config(path), load_config(path), tokenizer)
    for token in recipe.rollout.stop_token_ids:
        tokens[token] = (*tokens.get(token, ()), "rollout.stop_token_ids")
    lines = [describe_stop_tokens(tokens, tokenizer)]
    if recipe.rollout.stop:
        lines.append(
            f"and after {', '.join(map(repr, recipe.rollout.stop))}; what the engine samples "
            "beyond is cut off"
        )
    return lines
