"""Adam on the host: the same training as on the device, and checkpoints that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.megatron.checkpoint import CheckpointFolder, RunPosition
from moe_replay.megatron.optimization import optimizer_config
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.recipe.sections.training import MegatronSection, OptimizerSection
from moe_replay.routing import Routing
from moe_replay.testing.layouts import layout
from moe_replay.testing.policies import mean_loss, pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import make_samples

SEED = 52
SETTINGS = OptimizerSection(lr=1e-2, clip_grad=0.0, weight_decay=0.1)
HOST = MegatronSection(optimizer={"optimizer_cpu_offload": True}).optimizer_fields()


def _start(checkpoint: Path, optimizer: dict[str, Any], sizes: dict[str, int]) -> tuple[Any, Any]:
    actor = start_policy(
        checkpoint,
        layout(**sizes),
        dtype=torch.bfloat16,
        optimizer=optimizer,
        settings=SETTINGS,
        ddp={"grad_reduce_in_fp32": optimizer.get("main_grads_dtype") is not torch.bfloat16},
    )
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    samples = make_samples(8, seed=SEED)[replica.number :: replica.num_replicas]
    return actor, pack(samples, scorer=actor, count=2)


def _update(actor: Any, microbatches: Any, steps: int) -> list[float]:
    return [
        actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.LIVE).norm
        for _ in range(steps)
    ]


def _trained(
    checkpoint: Path, optimizer: dict[str, Any], sizes: dict[str, int]
) -> tuple[list[float], dict[str, torch.Tensor], set[str]]:
    actor, microbatches = _start(checkpoint, optimizer, sizes)
    norms = _update(actor, microbatches, 3)
    kinds = {type(part.optimizer).__name__ for part in actor.optimizer.chained_optimizers}
    return norms, {n: t.float() for n, t in actor.weights.tensors()}, kinds


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks", "sizes", "changed"),
    [
        (1, {}, {}),
        (2, {}, {}),
        (2, {"ep": 2}, {}),
        (1, {}, {"optimizer_offload_fraction": 0.5}),
        (1, {}, {"overlap_cpu_optimizer_d2h_h2d": True}),
    ],
)
def test_adam_on_the_host_trains_as_on_the_device(
    checkpoint: Path, ranks: int, sizes: dict[str, int], changed: dict[str, Any]
) -> None:
    there = run_ranks(_trained, ranks, checkpoint, {}, sizes)
    host = run_ranks(_trained, ranks, checkpoint, HOST | changed, sizes)
    for (norms, weights, kinds), (found, others, here) in zip(there, host, strict=True):
        assert (kinds, here) == ({"AdamW"}, {"HybridDeviceOptimizer"})
        np.testing.assert_allclose(found, norms, rtol=2e-3)
        for name, weight in weights.items():
            # A fused kernel rounds its float32 otherwise, which may round a bfloat16 otherwise.
            error = (others[name] - weight).abs().max() / weight.abs().max()
            assert error < 2**-7, (name, float(error))


def _stopped(checkpoint: Path, folder: Path, reads: bool, resumes: str) -> list[float]:
    """Return the norms of steps 3 and 4, after steps 1 and 2 or after their checkpoint."""
    actor, microbatches = _start(checkpoint, HOST, {})
    checkpoints = CheckpointFolder(folder, save_total_limit=1)
    if not reads:
        _update(actor, microbatches, 2)
        position = RunPosition(
            step=2,
            policy_version=2,
            next_prompt=0,
            identity={},
            scheduler=actor.scheduler.state_dict(),
        )
        checkpoints.save(actor, position)
    elif resumes == "complete":
        checkpoints.load(actor, 2)
    else:
        # The negative control: weights alone, without moments and main weights.
        with torch.no_grad():
            optimizer, actor._optimizer = actor._optimizer, _Ignoring(actor._optimizer)
            checkpoints.load(actor, 2)
            actor._optimizer = optimizer
    return _update(actor, microbatches, 2)


class _Ignoring:
    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def load_state_dict(self, state: Any) -> None: ...


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_of_it_goes_on(checkpoint: Path, tmp_path: Path, ranks: int) -> None:
    folder = tmp_path / "checkpoints"
    went_on = run_ranks(_stopped, ranks, checkpoint, folder, False, "")
    resumed = run_ranks(_stopped, ranks, checkpoint, folder, True, "complete")
    np.testing.assert_allclose(resumed, went_on, rtol=1e-5)
    empty = run_ranks(_stopped, ranks, checkpoint, folder, True, "without state")
    # The first gradient is that of the same weights, the second that of another step.
    assert abs(empty[0][1] - went_on[0][1]) > 1e-3 * went_on[0][1]


def test_the_configuration_has_what_was_asked_for() -> None:
    from types import SimpleNamespace

    from moe_replay.megatron.options.typed import read_options

    section = MegatronSection(
        optimizer={
            "optimizer_cpu_offload": True,
            "overlap_cpu_optimizer_d2h_h2d": True,
            "pin_cpu_grads": False,
            "main_grads_dtype": "bfloat16",
        }
    )
    model = SimpleNamespace(bf16=True, params_dtype=torch.bfloat16, fp8=None, fp8_recipe="delayed")
    built = optimizer_config(OptimizerSection(lr=3e-4), model, read_options(section))
    assert built.optimizer_offload_fraction == 1.0
    assert built.use_precision_aware_optimizer is True
    assert built.overlap_cpu_optimizer_d2h_h2d is True
    assert (built.pin_cpu_grads, built.pin_cpu_params) == (False, True)
    assert built.main_grads_dtype is torch.bfloat16
    assert (built.lr, built.adam_beta2, built.fp8_recipe) == (3e-4, 0.999, None)
