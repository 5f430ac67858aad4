"""What replay and recording cost on Megatron-Core, on one CPU process and about 20M parameters.

Live and replayed steps of the same samples, and plain and recording passes, alternate in one run;
each ratio is the median over neighbouring pairs, so that what else the machine does cancels. The
samples carry the routes that the model itself would take, so that both sides run the same experts.
The figures come last, one JSON object a line.

    python benchmarks/megatron_replay.py [--quick] [--pairs 40]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import alternate

from moe_replay.batch import Microbatch
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.scorer import RouteWatch
from moe_replay.routing import Routing
from moe_replay.testing.policies import mean_loss, pack, start_policy, with_own_routes
from moe_replay.testing.samples import make_samples, with_trace
from moe_replay.testing.synthetic_routes import synthetic_trace
from moe_replay.testing.tiny_models import write_tiny_checkpoint

MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 64,
}
SEED = 5


def main() -> int:
    """Print what was measured, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="end within 50 s")
    parser.add_argument("--pairs", type=int, help="default 40, quick 8")
    arguments = parser.parse_args()
    pairs, num_samples = (8, 4) if arguments.quick else (40, 8)
    pairs = arguments.pairs or pairs
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_tiny_checkpoint(Path(folder), initializer_range=0.05, **MODEL)
        actor = start_policy(checkpoint)
        samples = make_samples(num_samples, seed=SEED, min_length=128, max_length=128)
        samples = with_own_routes(actor, samples, max_tokens=512)
        batches = pack(samples, max_tokens=512, scorer=actor)
        parameters = sum(p.numel() for module in actor.modules for p in module.parameters())
        tokens = sum(len(sample.token_ids) for sample in samples)
        print(
            f"{parameters / 1e6:.1f}M parameters, {tokens} tokens a step, {pairs} pairs, 1 thread"
        )
        figures = {
            "replay.step_ratio": step_ratio(actor, batches, pairs),
            "record.pass_ratio": pass_ratio(actor, batches, pairs),
            "replay.resident_bytes_ratio": resident_bytes_ratio(actor),
        }
    for metric, value in figures.items():
        print(json.dumps({"metric": metric, "value": round(value, 4), "unit": "ratio"}))
    return 0


def step_ratio(actor: MegatronActor, batches: list[Microbatch], pairs: int) -> float:
    """Return the time of a replayed step, guard evidence included, over that of a live one."""
    watch = RouteWatch(observe=lambda *_: None)

    def step(routing: Routing) -> None:
        watching = watch if routing is Routing.REPLAY else None
        actor.update(batches, mean_loss, temperature=1.0, routing=routing, watch=watching)

    found = alternate(lambda: step(Routing.LIVE), lambda: step(Routing.REPLAY), pairs=pairs)
    print(f"step: {found.describe('live', 'R3')}")
    return found.ratio


def pass_ratio(actor: MegatronActor, batches: list[Microbatch], pairs: int) -> float:
    """Return the time of a recording pass over that of a plain one."""

    def score(routing: Routing) -> None:
        actor.score(batches, temperature=1.0, routing=routing)

    found = alternate(lambda: score(Routing.LIVE), lambda: score(Routing.RECORD), pairs=pairs)
    print(f"pass: {found.describe('plain', 'R2')}")
    return found.ratio


def resident_bytes_ratio(actor: MegatronActor) -> float:
    """Return what routes add to the memory of a step's microbatches, over their bare bytes.

    The routes are random: what they hold does not depend on them. The step is large enough that a
    few kilobytes which the first sharing of a process keeps do not count.
    """
    shape = {
        "num_layers": MODEL["num_hidden_layers"],
        "num_experts": MODEL["num_experts"],
        "topk": MODEL["num_experts_per_tok"],
    }
    samples = [
        with_trace(sample, synthetic_trace(sample.token_ids, seed=sample.sample_id, **shape))
        for sample in make_samples(64, seed=SEED, min_length=128, max_length=128)
    ]

    def held(*, routed: bool) -> int:
        gc.collect()
        tracemalloc.start()
        batches = pack(samples, max_tokens=512, scorer=actor, routed=routed)
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        del batches
        return size

    extra = held(routed=True) - held(routed=False)
    rows = sum(len(sample.token_ids) for sample in samples)
    expected = rows * shape["num_layers"] * shape["topk"]
    print(f"memory: routes add {extra} bytes, {expected} are rows x layers x top-k")
    return extra / expected


if __name__ == "__main__":
    sys.exit(main())
