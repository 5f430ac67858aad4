"""What a person should hear of a step in words: odd metrics of a run that goes on."""

from __future__ import annotations

from collections.abc import Mapping

from moe_replay.recipe.recipe import Recipe


def step_notices(recipe: Recipe, metrics: Mapping[str, float]) -> dict[str, str]:
    """Return what is odd about a step; usually nothing."""
    notices = {}
    aborted = metrics["completions/aborted_ratio"]
    if aborted > 0:
        notices["aborted"] = (
            f"the engine aborted {100 * aborted:.3g} % of the completions; they are recorded and not "
            "trained on"
        )
    if metrics["completions/clipped_ratio"] == 1:
        limit = recipe.rollout.max_completion_length
        end = (
            "grpo.overlong_filter omits them all from the loss"
            if recipe.grpo.overlong_filter
            else "none was seen to end by itself"
        )
        notices["cut"] = (
            f"every completion was cut at rollout.max_completion_length = {limit}, and {end}; raise "
            "it, or look at completions.jsonl: does the model know its end-of-sequence token?"
        )
    if metrics["update/num_skipped"] == recipe.batch.steps_per_generation:
        notices["idle"] = f"nothing was learned in this step: {_why_idle(metrics)}"
    return notices


def _why_idle(metrics: Mapping[str, float]) -> str:
    if metrics["completions/filtered_ratio"] == 1:
        return "the loss omits all completions (completions/filtered_ratio is 1)"
    if metrics["frac_reward_zero_std"] == 1:
        return (
            "in every group all rewards are equal (frac_reward_zero_std is 1); prompts that are too "
            "easy or too hard, or a reward function that always gives the same score"
        )
    return "no completion that counts has an advantage"
