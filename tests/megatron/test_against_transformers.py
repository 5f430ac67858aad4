"""The same routes in Megatron and transformers give equal log-probabilities and gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_replay.megatron.weights import export_hf_weights
from moe_replay.routing import Routing
from moe_replay.testing.policies import mean_loss, pack, start_policy, with_own_routes
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import make_samples, random_routes, with_routes
from moe_replay.transformers.replay import replay_routes

SEED = 40


def _differences(checkpoint: Path, shift: int) -> tuple[float, float]:
    """Compare both models; ``shift`` moves the routes of transformers by so many tokens."""
    from transformers import AutoModelForCausalLM

    actor = start_policy(checkpoint)
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    samples = [
        with_routes(s, random_routes(rng, s.trace.expert_ids, 16))
        for s in with_own_routes(actor, make_samples(5, seed=SEED))
    ]
    scored = actor.score(pack(samples), temperature=1.0, routing=Routing.REPLAY).samples
    actor.optimizer.step = lambda: (True, 0.0, 0)
    actor.update(pack(samples), mean_loss, temperature=1.0, routing=Routing.REPLAY)
    ours = dict(export_hf_weights(actor.modules, read=lambda p: p.main_grad))

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    worst = 0.0
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))
        routes = np.roll(sample.trace.expert_ids, shift, axis=0)
        with replay_routes(model, routes, sample.trace.valid, layers=sample.trace.layers):
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        theirs = logprobs[sample.prompt_length - 1 : -1].gather(
            1, ids[sample.prompt_length :, None]
        )
        (-theirs.sum() / 64).backward()
        found = scored[sample.sample_id].token_logprobs
        worst = max(worst, float(np.abs(theirs[:, 0].detach().numpy() - found).max()))
    errors = [
        float((parameter.grad - ours[name]).norm() / (ours[name].norm() + 1e-12))
        for name, parameter in model.named_parameters()
        if name in ours and parameter.grad is not None
    ]
    assert sum("gate.weight" in name for name in ours) == 4
    return worst, max(errors)


@pytest.mark.ranks
def test_replay_in_megatron_equals_replay_in_transformers(checkpoint: Path) -> None:
    logprob_error, gradient_error = run_ranks(_differences, 1, checkpoint, 0)[0]
    assert logprob_error < 2e-5
    assert gradient_error < 2e-5


@pytest.mark.ranks
def test_comparison_with_transformers_sees_a_shift_by_one_token(checkpoint: Path) -> None:
    logprob_error, gradient_error = run_ranks(_differences, 1, checkpoint, 1)[0]
    assert logprob_error > 0.1
    assert gradient_error > 0.1
