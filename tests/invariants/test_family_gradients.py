"""Every gradient of every family is that of a single process, in every kind of layout.

One forked world runs all families in one layout: its process groups are made once, since every
group keeps threads, and building a tiny model and one update take a third of a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings

from moe_replay.batch import Microbatch
from moe_replay.megatron.actor import MegatronActor, build_policy
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.families.rules import FAMILIES as SUPPORTED
from moe_replay.megatron.layout import initialize
from moe_replay.megatron.options.typed import MegatronOptions
from moe_replay.routing import Origin, Routing, RoutingTrace
from moe_replay.testing.layouts import ALLGATHER, CASES, Case, layout
from moe_replay.testing.policies import SETTINGS, gradients, mean_loss, pack
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import RoutedSample, make_samples, random_routes, with_trace
from moe_replay.testing.tiny_models import FAMILIES, write_tiny_checkpoint

pytestmark = pytest.mark.ranks
SEED = 52
BOUND = 1e-5
"""Relative; float32 reductions in another order."""
LAYOUTS = (
    *(
        "dp2",
        "tp2",
        "tp2 etp1",
        "ep2",
        "ep2 allgather",
        "tp2 ep2 etp1",
        "pp2",
        "pp2 vpp2",
        "cp2",
        "cp2 ep2",
    ),
    *("ep2 etp2", "tp2 ep2", "tp2 pp2", "tp2 cp2", "pp2 ep2"),
)
ALONE = Case(layout=layout(), ranks=1)
IN_EVERY_LAYOUT = (
    *("qwen3_moe", "qwen2_moe", "mixtral", "olmoe"),
    *("deepseek_v2", "deepseek_v3", "glm4_moe"),
)
"""The others share parts with these, and run in a layout of each kind."""
OF_EACH_KIND = ("tp2 ep2 etp1", "pp2 vpp2", "cp2 ep2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one update computed."""

    gradients: dict[str, torch.Tensor]
    """Of the whole model, by checkpoint name."""
    grad_norm: float
    """Before clipping."""


def routed_samples(layers: tuple[int, ...], num_experts: int, topk: int) -> list[RoutedSample]:
    """Return four samples with routes that no model would choose; every seventh row is live."""
    samples = []
    for sample in make_samples(4, seed=SEED, min_length=10, max_length=16):
        length = len(sample.token_ids)
        rng = np.random.default_rng([SEED, sample.sample_id])
        ids = np.empty((length, len(layers), topk), dtype=np.int64)
        valid = np.arange(length) % 7 != 6
        trace = RoutingTrace.record(
            random_routes(rng, ids, num_experts),
            token_ids=sample.token_ids,
            valid=valid,
            layers=layers,
            num_experts=num_experts,
            origin=Origin.single(
                engine="random", engine_version="0", policy_version=0, num_rows=length
            ),
        )
        samples.append(with_trace(sample, trace))
    return samples


def update(checkpoint: Path, case: Case) -> Found:
    """Return what one replayed update of ``checkpoint`` computes in the layout of this world."""
    actor = build_policy(
        checkpoint,
        case.layout,
        dtype=torch.float32,
        settings=SETTINGS,
        num_updates=10,
        options=MegatronOptions(transformer=case.overrides),
    )
    grad_norms: list[float] = []

    def norm_only() -> tuple[bool, float, int]:
        actor.optimizer.prepare_grads()
        grad_norms.append(float(actor.optimizer.get_grad_norm()))
        return True, grad_norms[0], 0

    actor.optimizer.step = norm_only
    batches = microbatches(actor, row_multiple=64 if case.overrides == ALLGATHER else 1)
    actor.update(batches, mean_loss, temperature=0.9, routing=Routing.REPLAY)
    return Found(gradients=gradients(actor), grad_norm=grad_norms[0])


def microbatches(actor: MegatronActor, *, row_multiple: int) -> list[Microbatch]:
    """Return this replica's samples in two microbatches."""
    shape = unwrap(actor.modules[0]).model_shape
    samples = routed_samples(shape.moe_layers, shape.num_experts, shape.topk)
    part = len(samples) // parallel_state.get_data_parallel_world_size()
    first = parallel_state.get_data_parallel_rank() * part
    return pack(
        samples[first : first + part],
        scorer=actor,
        max_tokens=1000,
        count=min(2, part),
        row_multiple=row_multiple,
    )


def worst_error(found: Found, expected: Found) -> tuple[float, str]:
    """Return the largest relative error of a gradient or of their norm, and where it is."""
    assert found.gradients.keys() == expected.gradients.keys()
    errors = {
        name: float((found.gradients[name] - gradient).norm() / (gradient.norm() + 1e-12))
        for name, gradient in expected.gradients.items()
    }
    errors["the norm"] = abs(found.grad_norm / expected.grad_norm - 1)
    where = max(errors, key=lambda name: errors[name])
    return errors[where], where


Error = tuple[float, str]
"""The largest relative error, and where it is."""


def errors_of(
    case: Case, checkpoints: dict[str, Path], expected: dict[str, Found]
) -> dict[str, Error]:
    """Return the error of each family in one layout."""
    initialize(case.layout)
    return {
        family: worst_error(update(checkpoint, case), expected[family])
        for family, checkpoint in checkpoints.items()
    }


def alone(checkpoints: dict[str, Path]) -> dict[str, Found]:
    """Return what a single process finds, by family."""
    initialize(ALONE.layout)
    return {family: update(checkpoint, ALONE) for family, checkpoint in checkpoints.items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a checkpoint of four layers of each family, the first dense where it can be."""
    folder = tmp_path_factory.mktemp("checkpoints")
    dense: dict[str, dict[str, list[int]]] = {
        family: {"mlp_only_layers": [0]} for family in ("qwen3_moe", "qwen2_moe")
    }
    return {
        family: write_tiny_checkpoint(folder / family, family, **dense.get(family, {}))
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, Found]:
    """Return the gradients of a single process, by family."""
    return run_ranks(alone, 1, checkpoints)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_t25_every_gradient_of_every_family_is_that_of_a_single_process(
    name: str, checkpoints: dict[str, Path], expected: dict[str, Found]
) -> None:
    print("seed", SEED)
    case = CASES[name]
    some = FAMILIES if name in OF_EACH_KIND else IN_EVERY_LAYOUT
    held = {family: checkpoints[family] for family in some}
    for errors in run_ranks(errors_of, case.ranks, case, held, expected):
        assert errors.keys() == set(some)
        for family, (error, where) in errors.items():
            assert error < BOUND, (family, where, error)


def test_t25_the_families_cover_what_is_supported() -> None:
    assert set(FAMILIES) == set(SUPPORTED)


def forgetful(checkpoint: Path, expected: Found) -> Error:
    """Return the error of a rank that keeps its part of what tensor-parallel ranks sum."""
    case = CASES["tp2"]
    initialize(case.layout)
    mappings._reduce_scatter_along_first_dim = lambda tensor, *_, **__: tensor.chunk(2)[
        parallel_state.get_tensor_model_parallel_rank()
    ].contiguous()
    return worst_error(update(checkpoint, case), expected)


def test_t25_control_a_sum_that_is_left_out_is_seen(
    checkpoints: dict[str, Path], expected: dict[str, Found]
) -> None:
    for error, _ in run_ranks(forgetful, 2, checkpoints["glm4_moe"], expected["glm4_moe"]):
        assert error > 0.1
