"""Megatron's own options on a GPU: fusions, dispatchers, fp8 and the optimizer's formats.

Each starts the policy in a process of its own, because Megatron's groups live as long as one.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.megatron.options.typed import option_errors, read_options
from moe_replay.recipe.sections.training import MegatronSection
from moe_replay.routing import Routing
from moe_replay.testing.layouts import layout
from moe_replay.testing.policies import mean_loss, pack, start_policy, with_own_routes
from moe_replay.testing.samples import make_samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SEED = 19
FUSED = {"moe_permute_fusion": True, "apply_rope_fusion": True, "bias_activation_fusion": True}
LEAN = {
    "use_precision_aware_optimizer": True,
    "main_grads_dtype": "bfloat16",
    "exp_avg_dtype": "bfloat16",
    "exp_avg_sq_dtype": "bfloat16",
}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "fused": {"transformer": FUSED},
    "fp8": {"transformer": {"fp8": "hybrid", "fp8_recipe": "tensorwise"}},
    "flash": {"transformer": {"attention_backend": "flash"}},
    "fine-grained offload": {
        "transformer": {
            "fine_grained_activation_offloading": True,
            "offload_modules": ["expert_fc1", "moe_act"],
        }
    },
    "overlapped": {"ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    "lean": {"optimizer": LEAN},
    "host": {"optimizer": {"optimizer_cpu_offload": True, "overlap_cpu_optimizer_d2h_h2d": True}},
    "half on the host": {
        "optimizer": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
    },
}
# Largest mean difference of a log-probability from the plain case after three updates.
TOLERANCE = {"fp8": 0.2}


def _trained(checkpoint: str, tables: dict[str, Any], results: Any, port: int) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    section = MegatronSection(**tables)
    if missing := [str(error) for error in option_errors(section)]:
        results.put(missing)
        return
    options = read_options(section)
    actor = start_policy(
        Path(checkpoint),
        layout(),
        dtype=torch.bfloat16,
        ddp=options.ddp,
        optimizer=options.optimizer,
        **options.transformer,
    )
    samples = with_own_routes(actor, make_samples(8, seed=SEED))
    microbatches = pack(samples, scorer=actor, count=2)
    for _ in range(3):
        actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.REPLAY)
    scores = actor.score(microbatches, temperature=1.0, routing=Routing.REPLAY).samples
    results.put(np.concatenate([scores[i].token_logprobs for i in sorted(scores)]))


def _in_a_process(checkpoint: Path, name: str) -> Any:
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    port = 29600 + list(CASES).index(name)
    child = spawn.Process(target=_trained, args=(str(checkpoint), CASES[name], results, port))
    child.start()
    found = results.get(timeout=300)
    child.join()
    return found


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> np.ndarray:
    return _in_a_process(checkpoint, "plain")


@pytest.mark.parametrize("name", [name for name in CASES if name != "plain"])
def test_an_option_trains_as_without_it(checkpoint: Path, plain: np.ndarray, name: str) -> None:
    print("seed", SEED)
    found = _in_a_process(checkpoint, name)
    if isinstance(found, list):
        pytest.skip("; ".join(found))
    assert np.isfinite(found).all()
    assert np.abs(found - plain).mean() < TOLERANCE.get(name, 0.05)
