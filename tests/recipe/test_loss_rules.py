"""Keys of the loss that contradict each other are refused, and so are those without effect."""

from __future__ import annotations

from typing import Any

import pytest

from moe_replay.recipe.rules import effect_free_keys

from ..grpo.smallest_recipe import problems_of, recipe

SEQUENCE = {"importance_sampling_level": "sequence"}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"loss_type": "cispo"}, "grpo.epsilon_high: 0.2 with loss_type = 'cispo'"),
        ({"loss_type": "cispo", "epsilon_high": 0.99}, "set it to 1 or more"),
        ({"loss_type": "dppo", "epsilon_high": 1.0}, "expected a probability below 1"),
        ({"delta": 1.2}, "is not above 1 + epsilon_high = 1.2"),
        ({"delta": 1.2}, "verl's clip_ratio_c"),
        ({"loss_type": "dppo", **SEQUENCE}, "compares the probabilities of single tokens"),
        ({**SEQUENCE, "top_entropy_quantile": 0.2}, "Set it to 'sequence_token'"),
        (
            {**SEQUENCE, "rollout_importance_sampling_mode": "token_mask"},
            "'sequence' with rollout_importance_sampling_mode = 'token_mask'",
        ),
        (
            {**SEQUENCE, "rollout_importance_sampling_mode": "geometric_mask"},
            "'sequence' with rollout_importance_sampling_mode = 'geometric_mask'",
        ),
        ({"beta": 0.1, "kl_estimator": "k1"}, "has the gradient 1 at every token"),
        (
            {
                "rollout_importance_sampling_mode": "token_mask",
                "rollout_importance_sampling_min": 2.0,
            },
            "is not below rollout_importance_sampling_threshold = 2.0",
        ),
        ({"top_entropy_quantile": 0.0}, "grpo.top_entropy_quantile"),
        ({"rollout_importance_sampling_threshold": 0}, "threshold"),
        ({"off_policy_sequence_mask_delta": 0.0}, "grpo.off_policy_sequence_mask_delta"),
        ({"entropy_coef": -0.1}, "grpo.entropy_coef"),
        ({"loss_type": "cispo", "epsilon_high": 5.0, "epsilon": 0.1}, "grpo.epsilon"),
        ({"loss_type": "sapo", "epsilon_high": 0.1}, "grpo.epsilon_high"),
        ({"sapo_temperature_pos": 2.0}, "grpo.sapo_temperature_pos"),
        ({"loss_type": "sapo", "delta": 3.0}, "grpo.delta"),
        ({"kl_estimator": "k2"}, "grpo.beta is 0"),
        (
            {"beta": 0.1, "kl_estimator": "k2", "use_bias_correction_kl": True},
            "grpo.kl_estimator is 'k2'",
        ),
        ({"rollout_importance_sampling_threshold": 3.0}, "_mode is 'none'"),
        ({"kl_in_reward": True}, "grpo.beta is 0"),
        (
            {"beta": 0.1, "kl_in_reward": True, "use_bias_correction_kl": True},
            "the loss has no KL term",
        ),
        (
            {"beta": 0.1, "kl_in_reward": True, "scale_rewards": "gdpo"},
            "there is no reward to take it off",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(keys: dict[str, Any], says: str) -> None:
    assert says in problems_of(grpo=keys)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"loss_type": "cispo", "epsilon_high": 1.0},
        {"loss_type": "dppo", "epsilon_high": 0.15},
        {"beta": 0.1, "kl_in_reward": True},
        {"delta": 1.21, "beta": 0.1, "use_bias_correction_kl": True},
        {**SEQUENCE, "rollout_importance_sampling_mode": "sequence_mask", "epsilon": 3e-4},
        {"importance_sampling_level": "sequence_token", "top_entropy_quantile": 0.2},
        {"loss_type": "sapo", "sapo_temperature_neg": 1.1, "beta": 0.1, "kl_estimator": "k2"},
    ],
)
def test_what_goes_together_is_accepted(keys: dict[str, Any]) -> None:
    loaded = recipe(grpo=keys)
    free = effect_free_keys(dict(loaded))
    assert not {f"grpo.{key}" for key in keys} & set(free)


def test_a_quantile_of_entropies_needs_a_pass_before_the_update() -> None:
    assert recipe().why_old_pass is None
    why = recipe(grpo={"top_entropy_quantile": 0.2}).why_old_pass
    assert why == "grpo.top_entropy_quantile = 0.2 compares entropies"


def test_a_divergence_in_the_reward_leaves_no_term_in_the_loss() -> None:
    keys = recipe(grpo={"beta": 0.1, "kl_in_reward": True}).grpo
    assert not keys.has_kl_term
    assert keys.why_old_pass == "grpo.kl_in_reward compares with the reference"
    assert recipe(grpo={"beta": 0.1}).grpo.has_kl_term


def test_a_frozen_router_beside_adapters_is_refused_because_all_is_frozen() -> None:
    keys = {"lora": {"rank": 8}, "megatron": {"freeze_moe_router": True}}
    assert "lora.rank is above 0" in problems_of(**keys)
    assert recipe(megatron={"freeze_moe_router": True}).megatron.freeze_moe_router
