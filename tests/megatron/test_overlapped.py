"""Overlapped reductions and gathers train as those that wait, and nothing stale is ever read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_replay.errors import DivergedError
from moe_replay.megatron import actor as actor_module
from moe_replay.megatron import optimization
from moe_replay.megatron.checkpoint import CheckpointFolder, RunPosition
from moe_replay.megatron.layout import ParallelLayout
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.recipe.sections.training import OptimizerSection
from moe_replay.routing import Routing
from moe_replay.testing.layouts import layout
from moe_replay.testing.policies import gradients, mean_loss, pack, start_policy
from moe_replay.testing.ranks import RankFailure, run_ranks
from moe_replay.testing.samples import make_samples

SEED = 51
# Parameters of a bucket: every layer of the tiny model has several.
REDUCED = {"overlap_grad_reduce": True, "bucket_size": 4000}
GATHERED = REDUCED | {"overlap_param_gather": True}
# Clipping would divide by a norm that is summed bucket by bucket, and so rounds differently.
SETTINGS = OptimizerSection(lr=1e-3, clip_grad=0.0)
# After three steps: gradient norms, the last gradient, weights, scores.
Trained = tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor], list[np.ndarray]]


def _trained(
    checkpoint: Path, sizes: ParallelLayout, ddp: dict[str, Any], options: dict[str, Any]
) -> Trained:
    actor = start_policy(checkpoint, sizes, ddp=ddp, settings=SETTINGS, **options)
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    samples = make_samples(8, seed=SEED)[replica.number :: replica.num_replicas]
    norms = []
    # Packing gives each step another number of microbatches.
    for count in (2, 4, 4):
        microbatches = pack(samples, scorer=actor, count=count, max_tokens=512)
        result = actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.LIVE)
        norms.append(result.norm)
    last = gradients(actor)
    weights = {name: tensor.clone() for name, tensor in actor.weights.tensors()}
    scores = actor.score(microbatches, temperature=1.0, routing=Routing.LIVE).samples
    return norms, last, weights, [scores[i].token_logprobs for i in sorted(scores)]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks", "sizes", "ddp", "options"),
    [
        (2, {}, REDUCED, {}),
        (2, {}, GATHERED, {}),
        (2, {}, GATHERED, {"grouped_experts": True}),
        (2, {}, GATHERED, {"dtype": torch.bfloat16}),
        (2, {"ep": 2}, GATHERED, {}),
        (
            2,
            {},
            GATHERED,
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
        ),
        (4, {"pp": 2, "vpp": 2}, GATHERED, {}),
        (4, {"pp": 2, "vpp": 2}, GATHERED | {"align_param_gather": True}, {}),
        (4, {"tp": 2}, GATHERED, {}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else str(value),
)
def test_overlapping_changes_no_gradient_and_no_weight(
    checkpoint: Path, ranks: int, sizes: dict, ddp: dict, options: dict
) -> None:
    plain = run_ranks(_trained, ranks, checkpoint, layout(**sizes), {}, options)
    overlapped = run_ranks(_trained, ranks, checkpoint, layout(**sizes), ddp, options)
    for (norms, last, weights, scores), found in zip(plain, overlapped, strict=True):
        np.testing.assert_allclose(found[0], norms, rtol=1e-6)
        assert len(set(norms)) == 3
        assert found[1].keys() == last.keys()
        assert [n for n, gradient in last.items() if not torch.equal(found[1][n], gradient)] == []
        assert [n for n, weight in weights.items() if not torch.equal(found[2][n], weight)] == []
        for one, other in zip(scores, found[3], strict=True):
            np.testing.assert_array_equal(other, one)


def _reduces_too_early(checkpoint: Path) -> list[float]:
    optimization._one_or_all = lambda functions: None
    return _trained(checkpoint, layout(), REDUCED, {})[0]


@pytest.mark.ranks
def test_reducing_at_every_microbatch_is_not_what_overlapping_means(checkpoint: Path) -> None:
    """The negative control: without the trainer's no_sync the second step cannot be the same."""
    plain = run_ranks(_trained, 2, checkpoint, layout(), {}, {})[0][0]
    try:
        early = run_ranks(_reduces_too_early, 2, checkpoint)[0]
    except (AssertionError, RankFailure):
        return
    assert abs(early[1] - plain[1]) > 1e-3 * plain[1]


def _exports(checkpoint: Path, forgets: bool) -> tuple[float, float]:
    """Return the largest change of a weight by a step, in what is pushed and in what is saved."""
    actor = start_policy(checkpoint, ddp=GATHERED)
    before = {name: tensor.clone() for name, tensor in actor.weights.tensors()}
    if forgets:
        actor_module.gather_parameters = lambda chunks: None
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    samples = make_samples(8, seed=SEED)[replica.number :: replica.num_replicas]
    microbatches = pack(samples, scorer=actor, count=2)
    actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.LIVE)
    pushed = dict(actor.weights.tensors())
    # The part of the parameters that this rank's optimizer does not hold changes only by a gather.
    unchanged = [torch.equal(pushed[name], weight) for name, weight in before.items()]
    held = torch.cat([(pushed[name] != weight).flatten() for name, weight in before.items()])
    return sum(unchanged), float(held.float().mean())


@pytest.mark.ranks
def test_what_is_pushed_is_new_on_every_rank_and_half_stale_without_the_gather(
    checkpoint: Path,
) -> None:
    for unchanged, changed in run_ranks(_exports, 2, checkpoint, False):
        assert unchanged == 0
        assert changed > 0.99
    stale = run_ranks(_exports, 2, checkpoint, True)
    assert all(changed < 0.6 for _, changed in stale)
    assert any(unchanged > 0 for unchanged, _ in stale)


def _resumed(checkpoint: Path, folder: Path, reads: bool) -> list[float]:
    """Return gradient norms after the checkpoint of step 1, which is written or read."""
    actor = start_policy(checkpoint, ddp=GATHERED)
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    samples = make_samples(8, seed=SEED)[replica.number :: replica.num_replicas]
    microbatches = pack(samples, scorer=actor, count=2)
    checkpoints = CheckpointFolder(folder, save_total_limit=1)
    if reads:
        checkpoints.load(actor, 1)
    else:
        actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.LIVE)
        position = RunPosition(
            step=1,
            policy_version=1,
            next_prompt=0,
            identity={},
            scheduler=actor.scheduler.state_dict(),
        )
        checkpoints.save(actor, position)
    return [
        actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.LIVE).norm
        for _ in range(2)
    ]


@pytest.mark.ranks
def test_a_checkpoint_holds_what_was_not_gathered_yet(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    went_on = run_ranks(_resumed, 2, checkpoint, folder, False)
    resumed = run_ranks(_resumed, 2, checkpoint, folder, True)
    np.testing.assert_allclose(resumed, went_on, rtol=1e-5)
    assert went_on[0][0] != went_on[0][1]


def _broken(checkpoint: Path) -> tuple[str, float]:
    """Return what is said of an infinite loss on one rank, and the norm of a step after it."""
    actor = start_policy(checkpoint, ddp=GATHERED)
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    samples = make_samples(8, seed=SEED)[replica.number :: replica.num_replicas]
    microbatches = pack(samples, scorer=actor, count=2)
    first = actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.LIVE)
    assert first.norm > 0
    victim = microbatches[1].key if dist.get_rank() == 1 else -1

    def loss(microbatch: Any, new_logprobs: torch.Tensor) -> torch.Tensor:
        part = mean_loss(microbatch, new_logprobs)
        return part * torch.inf if microbatch.key == victim else part

    with pytest.raises(DivergedError) as caught:
        actor.update(microbatches, loss, temperature=1.0, routing=Routing.LIVE)
    after = actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.LIVE)
    return str(caught.value), after.norm


@pytest.mark.ranks
def test_a_broken_gradient_is_found_where_it_arose(checkpoint: Path) -> None:
    for said, norm in run_ranks(_broken, 2, checkpoint):
        assert "rank 1: microbatch 1: sample" in said
        assert "rank 0" not in said
        assert np.isfinite(norm)
