"""Adapters on a GPU: bfloat16, Megatron-Core's own layers, grouped products of experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_replay.megatron.actor import MegatronActor, build_policy
from moe_replay.recipe.sections.lora import LoraSection
from moe_replay.recipe.sections.training import ParallelLayout
from moe_replay.routing import Routing
from moe_replay.testing.policies import SETTINGS, mean_loss, pack, with_own_routes
from moe_replay.testing.samples import make_samples

pytestmark = [
    pytest.mark.gpu,
    # Megatron's, of its own call.
    pytest.mark.filterwarnings("ignore:.*tp_group is None:DeprecationWarning"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def logprobs(policy: MegatronActor) -> np.ndarray:
    scored = policy.score(
        pack(make_samples(8, seed=17), scorer=policy), temperature=1.0, routing=Routing.LIVE
    )
    return np.concatenate([scored.samples[key].token_logprobs for key in sorted(scored.samples)])


@pytest.mark.parametrize("grouped", [False, True])
def test_adapters_learn_beside_frozen_weights(
    actor: MegatronActor, checkpoint: Path, grouped: bool
) -> None:
    assert actor.device.type == "cuda"
    adapted = build_policy(
        checkpoint,
        ParallelLayout(),
        dtype=torch.bfloat16,
        settings=SETTINGS,
        num_updates=10,
        grouped_experts=grouped,
        lora=LoraSection(rank=8),
    )
    adapters = adapted.adapters
    assert adapters is not None
    kinds = {type(module).__module__.split(".")[0] for module in adapted.modules[0].modules()}
    assert "transformer_engine" not in kinds
    frozen = {n: p.clone() for n, p in adapted.modules[0].named_parameters() if not p.requires_grad}
    before = logprobs(adapted)
    with adapters.off():
        assert np.abs(logprobs(adapted) - before).mean() < 5e-3
    samples = with_own_routes(adapted, make_samples(8, seed=17))
    for _ in range(4):
        gradient = adapted.update(
            pack(samples, scorer=adapted), mean_loss, temperature=1.0, routing=Routing.REPLAY
        )
        assert gradient.norm > 0
    after = logprobs(adapted)
    assert after.mean() > before.mean() + 0.01
    with adapters.off():
        assert np.abs(logprobs(adapted) - before).mean() < 5e-3
    now = dict(adapted.modules[0].named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in frozen.items())
