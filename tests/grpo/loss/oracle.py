"""The loss of a mini-batch in numpy, sample by sample, with gradients derived by hand.

Written from the papers' formulas; it shares no line with `moe_replay.grpo.loss`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

LIMIT = 20.0
"""Completions are at most so long, for ``dr_grpo``."""
LIMITS: dict[str, dict[str, Any]] = {
    "grpo": {"epsilon": 0.2, "epsilon_high": 0.28},
    "bnpo": {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.6},
    "dr_grpo": {"epsilon": 0.2, "epsilon_high": 0.28, "delta": 2.0},
    "dapo": {"epsilon": 0.2, "epsilon_high": 0.28},
    "cispo": {"epsilon_high": 1.3},
    "sapo": {"sapo_temperature_pos": 1.5, "sapo_temperature_neg": 2.5},
    "dppo": {"epsilon": 0.05, "epsilon_high": 0.1},
}
"""Keys of each loss under which it is tried: random ratios lie on both sides of its limits."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Sampled tokens of one sample; every array has one entry for each."""

    new: np.ndarray
    old: np.ndarray
    mu: np.ndarray
    ref: np.ndarray
    entropy: np.ndarray
    advantage: float
    trains: bool = True

    def part(self, rows: slice) -> Completion:
        """Return some of its tokens."""
        names = ("new", "old", "mu", "ref", "entropy")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


def slope(kind: str, r: float, a: float, keys: dict[str, Any]) -> tuple[float, float]:
    """Return L(r) and dL/dr of the losses that are functions of the ratio."""
    if kind == "sapo":
        tau = keys.get("sapo_temperature_pos", 1.0) if a > 0 else keys["sapo_temperature_neg"]
        s = 1 / (1 + math.exp(-tau * (r - 1)))
        return -s * 4 / tau * a, -4 * s * (1 - s) * a
    top = 1 + keys["epsilon_high"]
    if a >= 0:
        return (-r * a, -a) if r <= top else (-top * a, 0.0)
    bottom = 1 - keys["epsilon"]
    if r < bottom:
        return -bottom * a, 0.0
    if keys.get("delta") and r > keys["delta"]:
        return -keys["delta"] * a, 0.0
    return -r * a, -a


def correction(sample: Completion, keys: dict[str, Any]) -> np.ndarray:
    """Return the weight of each token's engine gap."""
    mode = keys.get("rollout_importance_sampling_mode", "none")
    n = len(sample.new)
    if mode == "none":
        return np.ones(n)
    hi = keys["rollout_importance_sampling_threshold"]
    lo = keys.get("rollout_importance_sampling_min") or 0.0
    g = [math.exp(o - m) for o, m in zip(sample.old, sample.mu, strict=True)]
    level, action = mode.split("_")
    tested = {
        "token": g,
        "sequence": [math.prod(g)] * n,
        "geometric": [math.prod(g) ** (1 / n)] * n,
    }[level]
    if action == "truncate":
        return np.array([min(max(x, lo), hi) for x in tested])
    weight = [min(max(x, lo), hi) for x in g] if level == "geometric" else tested
    return np.array([w if lo <= x <= hi else 0.0 for w, x in zip(weight, tested, strict=True)])


def off_policy(sample: Completion, keys: dict[str, Any]) -> bool:
    delta = keys.get("off_policy_sequence_mask_delta")
    if delta is None or sample.advantage >= 0:
        return False
    return float(np.mean(sample.mu - sample.new)) > delta


def kl(sample: Completion, keys: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the KL term and its gradient by the new log-probability."""
    d = sample.ref - sample.new
    k3 = np.exp(d) - d - 1
    if keys.get("kl_estimator", "k3") == "k2":
        return d**2 / 2, -d
    if keys.get("use_bias_correction_kl"):
        r = np.exp(sample.new - sample.old)
        # r (k3 + 1 - e^d) is r k1.
        return r * k3, -r * d
    return k3, 1 - np.exp(d)


def weight(kind: str, n: int, num_samples: int, num_tokens: int) -> float:
    if kind in ("grpo", "sapo"):
        return 1 / num_samples / n
    return 1 / num_samples / LIMIT if kind == "dr_grpo" else 1 / num_tokens


def policy_term(sample: Completion, keys: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return each token's L, and dL/d(log ratio) at its level."""
    kind, a = keys["loss_type"], sample.advantage
    log_r = sample.new - sample.old
    if keys.get("importance_sampling_level", "token") != "token":
        log_r = np.full(len(log_r), log_r.mean())
    r = np.exp(log_r)
    if kind == "cispo":
        w = np.minimum(r, keys["epsilon_high"])
        return -w * a * sample.new, -w * a
    if kind == "dppo":
        moved = np.exp(sample.new) - np.exp(sample.old)
        stops = moved > keys["epsilon_high"] if a > 0 else moved < -keys["epsilon"]
        stops = stops & (a != 0)
        return -r * a, np.where(stops, 0.0, -r * a)
    found = [slope(kind, float(x), a, keys) for x in r]
    return np.array([f for f, _ in found]), np.array([s for _, s in found]) * r


def loss_of(batch: list[Completion], keys: dict[str, Any]) -> tuple[float, list[np.ndarray]]:
    """Return the loss of a mini-batch, and its gradient by the new log-probabilities of each."""
    trained = [sample for sample in batch if sample.trains]
    num_samples, num_tokens = len(trained), sum(len(sample.new) for sample in trained)
    rho = keys.get("top_entropy_quantile", 1.0)
    every = np.concatenate([sample.entropy for sample in trained])
    threshold = np.quantile(every, 1 - rho) if rho < 1 else -np.inf
    beta, bonus = keys.get("beta", 0.0), keys.get("entropy_coef", 0.0)
    total, gradients = 0.0, []
    for sample in batch:
        if not sample.trains:
            gradients.append(np.zeros(len(sample.new)))
            continue
        n = len(sample.new)
        value, pull = policy_term(sample, keys)
        kept = sample.entropy >= threshold
        factor = correction(sample, keys) * kept * (not off_policy(sample, keys))
        value, pull = value * factor, pull * factor
        if keys.get("importance_sampling_level") == "sequence" and keys["loss_type"] != "cispo":
            # The mean's gradient: all of the sample pull together, and each takes 1/n of it.
            pull = np.full(n, pull.sum() / n)
        divergence, its_pull = kl(sample, keys)
        w = weight(keys["loss_type"], n, num_samples, num_tokens)
        total += float((w * (value + beta * divergence)).sum())
        total -= bonus * float((sample.entropy * kept).sum()) / int((every >= threshold).sum())
        gradients.append(w * (pull + beta * its_pull))
    return total, gradients
