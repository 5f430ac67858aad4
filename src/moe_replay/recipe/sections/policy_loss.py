"""Keys of ``[grpo]`` that say what the loss of a token is, and how losses are averaged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moe_replay.recipe.sections.base import Key, Section

EngineCorrection = Literal[
    "none",
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_truncate",
    "geometric_mask",
]
"""Whose engine gap is tested, and what becomes of one that is too far from 1."""


class PolicyLossKeys(Section):
    """The loss: what is compared, what limits it, what corrects it, and what is added to it."""

    loss_type: Annotated[
        Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "dppo"],
        Key(also_called=("loss_agg_mode", "loss_mode")),
    ] = "grpo"
    """What limits a token's ratio, and how tokens are averaged: clipped, with the mean over each
    sample (``grpo``), over all tokens of the update (``dapo``, and ``bnpo``, which is the same
    here), or over ``rollout.max_completion_length`` (``dr_grpo``); ratios as constant weights
    (``cispo``); a sigmoid (``sapo``); clipped by probabilities (``dppo``)."""
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = "token"
    """Whose ratio a token is compared by: its own, or the geometric mean of its sample (GSPO).
    ``sequence`` and ``sequence_token`` have the same gradient; where tokens of a sample weigh
    differently only ``sequence_token`` has a meaning."""
    epsilon: Annotated[
        float, Key(also_called=("clip_ratio", "clip_ratio_low", "eps_clip", "ratio_clip_min"))
    ] = Field(default=0.2, gt=0, lt=1)
    """The importance ratio is clipped below at 1 - epsilon; with ``dppo`` it is the probability
    that a token may lose. Ranges of sequences are some 500 times smaller than those of tokens."""
    epsilon_high: Annotated[
        float,
        Key(
            default="epsilon",
            also_called=("clip_ratio_high", "eps_clip_high", "ratio_clip_max", "eps_clip_higher"),
        ),
    ] = Field(default_factory=lambda grpo: grpo["epsilon"], gt=0)
    """The importance ratio is clipped above at 1 + epsilon_high; ``epsilon`` by default. With
    ``cispo`` it is the largest weight itself, such as 5.0; with ``dppo`` the probability that a
    token may gain."""
    delta: Annotated[
        float | None, Key(also_called=("clip_ratio_c", "eps_clip_c", "ratio_clip_c", "c_clip"))
    ] = Field(default=None, gt=0)
    """Largest ratio of a token with a negative advantage (dual clip), above 1 + epsilon_high;
    unlimited by default."""
    sapo_temperature_pos: Annotated[float, Key(also_called=("tau_pos",))] = Field(default=1.0, gt=0)
    """With ``sapo``: steepness of the sigmoid for positive advantages."""
    sapo_temperature_neg: Annotated[float, Key(also_called=("tau_neg",))] = Field(
        default=1.05, gt=0
    )
    """With ``sapo``: steepness of the sigmoid for the other advantages."""
    beta: Annotated[
        float,
        Key(also_called=("kl_coef", "kl_loss_coef", "reference_policy_kl_penalty")),
    ] = Field(default=0.0, ge=0)
    """Weight of the KL term towards the reference model; 0 loads no reference model."""
    kl_estimator: Annotated[
        Literal["k1", "k2", "k3"], Key(also_called=("kl_loss_type", "kl_penalty"))
    ] = "k3"
    """Estimate of the KL term: ``k3``, or ``k2``, whose gradient is that of the reverse KL while
    the policy is the one that sampled."""
    use_bias_correction_kl: Annotated[bool, Key(also_called=("use_unbiased_kl",))] = False
    """With ``k3``: multiply it by the token's ratio new / old, so that its gradient is that of the
    reverse KL after several updates too."""
    kl_in_reward: Annotated[bool, Key(also_called=("use_kl_in_reward",))] = False
    """Take ``beta`` times the sum of old minus reference log-probabilities of a completion's tokens
    off its reward, before completions are compared, in place of a term in the loss."""
    entropy_coef: Annotated[float, Key(also_called=("entropy_coeff",))] = Field(default=0.0, ge=0)
    """Weight of an entropy bonus, a mean over the tokens of the update; 0 adds none."""
    top_entropy_quantile: float = Field(default=1.0, gt=0, le=1)
    """Let the policy term act on this share of an update's tokens only, those with the highest
    entropy before the step; 1 on all."""
    rollout_importance_sampling_mode: Annotated[
        EngineCorrection,
        Key(also_called=("vllm_importance_sampling_mode", "rollout_is", "use_tis", "use_mis")),
    ] = "none"
    """Correct the engine gap: multiply a token's policy term by old / engine probability, of the
    token, of its sample (their product) or their geometric mean. ``truncate`` limits the weight,
    ``mask`` omits what is outside the limits. ``none`` only measures it."""
    rollout_importance_sampling_threshold: Annotated[
        float,
        Key(also_called=("vllm_importance_sampling_clip_max", "rollout_is_threshold", "tis_clip")),
    ] = Field(default=2.0, gt=0)
    """Largest weight of the correction, or the largest that is kept."""
    rollout_importance_sampling_min: Annotated[
        float | None, Key(also_called=("vllm_importance_sampling_clip_min", "tis_clip_low"))
    ] = Field(default=None, gt=0)
    """Smallest weight of the correction, or the smallest that is kept; by default there is none."""
    off_policy_sequence_mask_delta: Annotated[
        float | None, Key(also_called=("off_policy_mask_threshold", "opsm_delta"))
    ] = Field(default=None, gt=0)
    """Omit a sample with a negative advantage from the policy term when the mean of its tokens'
    engine minus new log-probabilities is above this; none is omitted by default."""

    @property
    def clips_ratios(self) -> bool:
        """Whether the loss clips ratios between 1 - epsilon and 1 + epsilon_high."""
        return self.loss_type in ("grpo", "bnpo", "dr_grpo", "dapo")

    @property
    def has_kl_term(self) -> bool:
        """Whether the loss has a term towards the reference model."""
        return self.beta > 0 and not self.kl_in_reward

    @property
    def compares_engine(self) -> bool:
        """Whether the loss looks at the engine's log-probabilities."""
        return (
            self.rollout_importance_sampling_mode != "none"
            or self.off_policy_sequence_mask_delta is not None
        )

    @property
    def weighs_tokens(self) -> str | None:
        """The key that gives the tokens of one sample different weights; None where none does."""
        if self.top_entropy_quantile < 1:
            return f"top_entropy_quantile = {self.top_entropy_quantile}"
        mode = self.rollout_importance_sampling_mode
        if mode.startswith("token_") or mode == "geometric_mask":
            return f"rollout_importance_sampling_mode = {mode!r}"
        return None

    @property
    def why_old_pass(self) -> str | None:
        """Why the loss needs old values before its own forward pass; None where it does not."""
        if self.top_entropy_quantile < 1:
            return f"grpo.top_entropy_quantile = {self.top_entropy_quantile} compares entropies"
        return "grpo.kl_in_reward compares with the reference" if self.kl_in_reward else None
