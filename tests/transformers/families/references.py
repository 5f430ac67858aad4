"""Weights that each family gives to given experts, in float64, written from its published rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Reference = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""(router, logits, ids, router input) -> weights, all of a row a token."""


def normed(weights: Tensor, eps: float = 0.0) -> Tensor:
    return weights / (weights.sum(-1, keepdim=True) + eps)


def softmax(norm: bool | str = False, *, eps: float = 0.0, scale: str = "") -> Reference:
    """Softmax over all experts; normed always, never, or by a setting of the router."""

    def weigh(router: Any, logits: Tensor, ids: Tensor, _: Tensor) -> Tensor:
        weights = logits.softmax(-1).gather(1, ids)
        is_normed = getattr(router, norm) if isinstance(norm, str) else norm
        weights = normed(weights, eps) if is_normed else weights
        return weights * (getattr(router, scale) if scale else 1)

    return weigh


def sigmoid(norm: bool | str = True, *, eps: float = 0.0, scale: str = "") -> Reference:
    """Sigmoid; a bias of the experts takes part in the choice only."""

    def weigh(router: Any, logits: Tensor, ids: Tensor, _: Tensor) -> Tensor:
        weights = logits.sigmoid().gather(1, ids)
        is_normed = getattr(router, norm) if isinstance(norm, str) else norm
        weights = normed(weights, eps) if is_normed else weights
        return weights * (getattr(router, scale) if scale else 1)

    return weigh


def softmax_of_chosen(router: Any, logits: Tensor, ids: Tensor, _: Tensor) -> Tensor:
    return logits.gather(1, ids).softmax(-1)


def softmax_of_chosen_over_topk(router: Any, logits: Tensor, ids: Tensor, _: Tensor) -> Tensor:
    return logits.gather(1, ids).softmax(-1) / router.top_k


def by_selection(router: Any, logits: Tensor, ids: Tensor, _: Tensor) -> Tensor:
    raw = logits.gather(1, ids)
    if router.expert_selection_fn == "softmax":
        return raw.softmax(-1)
    return normed(raw.sigmoid()) if router.norm_topk_prob else raw.sigmoid()


def softmax_clamped(router: Any, logits: Tensor, ids: Tensor, _: Tensor) -> Tensor:
    weights = logits.softmax(-1).gather(1, ids)
    return weights / weights.sum(-1, keepdim=True).clamp(min=router.norm_min)


def of_probabilities(router: Any, probabilities: Tensor, ids: Tensor, _: Tensor) -> Tensor:
    """Gemma's router returns probabilities in place of logits, and scales each expert."""
    return normed(probabilities.gather(1, ids)) * router.per_expert_scale.double()[ids]


def softplus_root(router: Any, logits: Tensor, ids: Tensor, _: Tensor) -> Tensor:
    weights = torch.nn.functional.softplus(logits).sqrt().gather(1, ids)
    return normed(weights, 1e-20) * router.routed_scaling_factor


def with_null_expert(router: Any, logits: Tensor, ids: Tensor, _: Tensor) -> Tensor:
    weights = logits.softmax(-1).gather(1, ids)
    return weights.masked_fill(ids == router.num_experts, 0)


def log_sigmoid_with_shared(router: Any, logits: Tensor, ids: Tensor, hidden: Tensor) -> Tensor:
    """Inkling norms over the chosen and the shared experts; returns the weights of both."""
    rows = hidden.reshape(-1, router.hidden_dim).double()
    shared = (rows @ router.weight.double().T)[:, -router.n_shared_experts :]
    scores = torch.nn.functional.logsigmoid(torch.cat([logits.gather(1, ids), shared], 1))
    weights = (scores - scores.logsumexp(1, keepdim=True)).exp()
    return weights * router.route_scale * router.global_scale.double()


def sparsemixer(router: Any, logits: Tensor, ids: Tensor, _: Tensor) -> Tensor:
    slots = []
    for slot in range(ids.shape[1]):
        own = logits.gather(1, ids[:, slot : slot + 1])
        gap = (own - logits) / torch.maximum(logits.abs(), own)
        dropped = gap > 2 * router.router_jitter_noise
        for before in range(slot):
            dropped = dropped.scatter(1, ids[:, before : before + 1], True)
        near = logits.masked_fill(dropped, -torch.inf).softmax(-1)
        slots.append(near.gather(1, ids[:, slot : slot + 1]))
    return torch.cat(slots, 1)


_SCALED = "routed_scaling_factor"
_BY_SETTING = "norm_topk_prob"
_RULES: list[tuple[str, Reference, str]] = [
    (
        "softmax, normed if `norm_topk_prob`",
        softmax(_BY_SETTING),
        "qwen2_moe qwen3_moe qwen3_next qwen3_omni_moe qwen4_exp olmoe flex_olmo mellum",
    ),
    (
        "softmax, normed",
        softmax(True),
        "qwen3_5_moe qwen3_vl_moe mixtral minimax hunyuan_v1_moe dbrx",
    ),
    ("softmax", softmax(), "jamba"),
    (
        "softmax, scaled",
        softmax(scale=_SCALED),
        "deepseek_v2 deepseek_ocr2 unlimited_ocr longcat_flash",
    ),
    (
        "softmax, normed if `norm_topk_prob`, scaled",
        softmax(_BY_SETTING, eps=1e-20, scale=_SCALED),
        "mistral4",
    ),
    ("softmax, normed, scaled", softmax(True, eps=1e-20, scale=_SCALED), "mistral_large4"),
    (
        "softmax of the chosen logits",
        softmax_of_chosen,
        "aria gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared",
    ),
    (
        "softmax of the chosen logits, over top-k",
        softmax_of_chosen_over_topk,
        "openai_privacy_filter",
    ),
    ("softmax or sigmoid of the chosen logits", by_selection, "cohere2_moe"),
    ("softmax, normed by a clamped sum", softmax_clamped, "ernie4_5_moe ernie4_5_vl_moe"),
    (
        "softmax of the normed input, normed, a scale an expert",
        of_probabilities,
        "gemma4 diffusion_gemma",
    ),
    ("root of softplus, normed, scaled", softplus_root, "deepseek_v4"),
    ("softmax with a null expert, which weighs 0", with_null_expert, "zaya"),
    ("log-sigmoid, normed with the shared experts", log_sigmoid_with_shared, "inkling"),
    ("sparsemixer: a softmax a slot", sparsemixer, "phimoe"),
    (
        "sigmoid, normed if `norm_topk_prob`, scaled",
        sigmoid(_BY_SETTING, eps=1e-20, scale=_SCALED),
        "deepseek_v3 deepseek_v32 glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa dots1 dots3_note "
        "exaone_moe kimi_linear mimo_v2_flash nemotron_h solar_open hy_v4 axk1 bailing_hybrid axk2",
    ),
    (
        "sigmoid, normed if `norm_topk_prob`, scaled",
        sigmoid(_BY_SETTING, eps=1e-6, scale=_SCALED),
        "lfm2_moe",
    ),
    ("sigmoid, normed if `norm_topk_prob`", sigmoid(_BY_SETTING, eps=1e-20), "beam"),
    ("sigmoid, normed if `norm_topk_prob`", sigmoid(_BY_SETTING), "flint kolibri1"),
    ("sigmoid, normed", sigmoid(), "minimax_m2 minimax_m3_vl step3p7 laguna"),
    ("sigmoid, normed, scaled", sigmoid(eps=1e-15, scale=_SCALED), "muse_spark"),
    ("sigmoid, normed, scaled", sigmoid(eps=1e-20, scale="route_scale"), "afmoe"),
    ("sigmoid, normed, scaled", sigmoid(eps=1e-20, scale="router_scaling_factor"), "hy_v3"),
    ("sigmoid, normed, scaled", sigmoid(eps=1e-20, scale=_SCALED), "inkling2"),
    ("sigmoid, scales the experts' input", sigmoid(False), "llama4"),
]


REFERENCES = {family: rule for _, rule, names in _RULES for family in names.split()}
"""Family -> what its router gives to given experts."""

WORDS = {family: words for words, _, names in _RULES for family in names.split()}
"""Family -> its reference in words."""
