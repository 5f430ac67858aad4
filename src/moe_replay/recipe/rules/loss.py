"""The rules between keys of the loss: ranges that depend on each other, keys without effect."""

from __future__ import annotations

from collections.abc import Iterator

from moe_replay.recipe.rule import EffectRule, Problem, Rule
from moe_replay.recipe.sections.lora import LoraSection
from moe_replay.recipe.sections.training import GrpoSection, MegatronSection


@Rule
def _limits_of_the_ratio(grpo: GrpoSection) -> Iterator[Problem]:
    high, kind = grpo.epsilon_high, grpo.loss_type
    if kind == "cispo" and high < 1:
        yield Problem(
            "grpo.epsilon_high",
            f"{high} with loss_type = 'cispo', which takes it as the largest weight of a token, not "
            "as a distance from 1, so every token would be scaled down: set it to 1 or more, such "
            "as 5.0 (verl, slime and NeMo-RL write 1 + clip_ratio_high for it)",
        )
    if kind == "dppo" and high >= 1:
        yield Problem(
            "grpo.epsilon_high",
            f"{high} with loss_type = 'dppo', expected a probability below 1: how much a token may "
            "gain before it stops",
        )
    if grpo.clips_ratios and grpo.delta is not None and grpo.delta <= 1 + high:
        yield Problem(
            "grpo.delta",
            f"{grpo.delta} is not above 1 + epsilon_high = {1 + high:g}, so it would limit ratios "
            "that the clip lets through: raise it (verl's clip_ratio_c is the same limit, 3.0 by "
            "default), or remove it",
        )


@Rule
def _levels_go_with_losses(grpo: GrpoSection) -> Iterator[Problem]:
    level = grpo.importance_sampling_level
    if level != "token" and grpo.loss_type == "dppo":
        yield Problem(
            "grpo.importance_sampling_level",
            f"{level!r} with loss_type = 'dppo', which compares the probabilities of single "
            "tokens: set it to 'token', or choose another loss",
        )
    if level == "sequence" and grpo.weighs_tokens:
        yield Problem(
            "grpo.importance_sampling_level",
            f"'sequence' with {grpo.weighs_tokens}, which weighs the tokens of a sample apart: the "
            "gradient of a sequence's ratio would spread what is kept over the tokens that are "
            "omitted. Set it to 'sequence_token', which has the same ratio and keeps them apart",
        )


@Rule
def _kl_has_a_gradient(grpo: GrpoSection) -> Iterator[Problem]:
    if grpo.kl_estimator == "k1" and grpo.has_kl_term:
        yield Problem(
            "grpo.kl_estimator",
            "'k1' in the loss has the gradient 1 at every token, whose expectation is 0: it holds "
            "the policy to nothing. Choose 'k2', or 'k3' with use_bias_correction_kl = true, whose "
            "gradient is k1 times the ratio",
        )


@Rule
def _kl_is_part_of_one_reward(grpo: GrpoSection) -> Iterator[Problem]:
    if grpo.kl_in_reward and grpo.scale_rewards == "gdpo":
        yield Problem(
            "grpo.kl_in_reward",
            "true with scale_rewards = 'gdpo', which normalizes each reward function by itself: "
            "there is no reward to take it off. Set it to false, or choose another scale_rewards",
        )


@Rule
def _engine_gap_has_a_range(grpo: GrpoSection) -> Iterator[Problem]:
    lowest = grpo.rollout_importance_sampling_min
    highest = grpo.rollout_importance_sampling_threshold
    if lowest is not None and lowest >= highest:
        yield Problem(
            "grpo.rollout_importance_sampling_min",
            f"{lowest} is not below rollout_importance_sampling_threshold = {highest}: lower it",
        )


@EffectRule
def _loss_without_effect(grpo: GrpoSection) -> Iterator[tuple[str, str]]:
    kind = f"grpo.loss_type is {grpo.loss_type!r}"
    if grpo.loss_type in ("cispo", "sapo"):
        yield "grpo.epsilon", kind
    if grpo.loss_type == "sapo":
        yield "grpo.epsilon_high", kind
    else:
        for key in ("sapo_temperature_pos", "sapo_temperature_neg"):
            yield f"grpo.{key}", f"{kind}, not 'sapo'"
    if not grpo.clips_ratios:
        yield "grpo.delta", f"{kind}, which clips no ratio"
    if not grpo.beta:
        for key in ("kl_estimator", "use_bias_correction_kl", "kl_in_reward"):
            yield f"grpo.{key}", "grpo.beta is 0, so there is no KL term"
    elif grpo.kl_in_reward:
        for key in ("kl_estimator", "use_bias_correction_kl"):
            yield (
                f"grpo.{key}",
                "grpo.kl_in_reward takes the sum of k1, and the loss has no KL term",
            )
    elif grpo.kl_estimator != "k3":
        yield "grpo.use_bias_correction_kl", f"grpo.kl_estimator is {grpo.kl_estimator!r}"
    if grpo.rollout_importance_sampling_mode == "none":
        for key in ("rollout_importance_sampling_threshold", "rollout_importance_sampling_min"):
            yield f"grpo.{key}", "grpo.rollout_importance_sampling_mode is 'none'"


@EffectRule
def _frozen_routers_without_effect(
    lora: LoraSection, megatron: MegatronSection
) -> Iterator[tuple[str, str]]:
    if lora.is_on:
        yield "megatron.freeze_moe_router", "lora.rank is above 0, which freezes every weight"
