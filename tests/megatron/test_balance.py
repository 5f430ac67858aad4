"""The auxiliary loss that is reported, against its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_replay.routing import Routing
from moe_replay.testing.policies import mean_loss, pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import make_samples

EXPERTS, TOPK = 16, 4


def _reported_and_by_hand(checkpoint: Path) -> tuple[float | None, float]:
    actor = start_policy(checkpoint, moe_aux_loss_coeff=0.5)
    by_hand = []
    for router in actor.routers.values():
        heard: Any = router
        stock = heard.gating

        def gating(hidden: torch.Tensor, stock: Any = stock) -> torch.Tensor:
            logits = stock(hidden)
            shares = logits.detach().reshape(-1, EXPERTS).softmax(-1)
            rows = len(shares)
            chosen = shares.topk(TOPK).indices
            counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
            # Switch Transformer, arXiv 2101.03961, equation 4, with top-k choices a token.
            by_hand.append(float(EXPERTS * (counts / (TOPK * rows)) @ shares.mean(0)))
            return logits

        heard.gating = gating
    packed = pack(make_samples(6, seed=30), max_tokens=60)
    gradient = actor.backward(packed, mean_loss, temperature=1.0, routing=Routing.LIVE)
    assert len(by_hand) == 4 * len(packed)
    return gradient.balancing_loss, sum(by_hand) / len(by_hand)


@pytest.mark.ranks
def test_t16_the_reported_loss_is_the_mean_over_layers_and_microbatches(checkpoint: Path) -> None:
    reported, by_hand = run_ranks(_reported_and_by_hand, 1, checkpoint)[0]
    assert reported == pytest.approx(by_hand, rel=1e-5)
