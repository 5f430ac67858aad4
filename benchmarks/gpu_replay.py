"""What replay and recording cost on one GPU, with layers shaped as in Qwen3-30B-A3B.

Hidden 2048, 128 experts of width 768, top-8; four such layers and their optimizer take about 50
GiB. Live and replayed steps alternate in one run, and each ratio is the median over neighbouring
pairs. The figures come last, one JSON object a line. Without a GPU it runs a small model on the
CPU, to show that it runs, and names no `gpu.` figure.

    python benchmarks/gpu_replay.py [--quick] [--layers 4] [--tokens 16384]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import Contest, alternate
from transformers import AutoConfig

from moe_replay.batch import Microbatch, Sample
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.layout import ParallelLayout, initialize
from moe_replay.megatron.model import build_model, read_model_shape, transformer_config
from moe_replay.megatron.optimization import wrap_precision
from moe_replay.megatron.scorer import RouteWatch
from moe_replay.routing import Routing
from moe_replay.testing.policies import SETTINGS, mean_loss, pack, with_own_routes
from moe_replay.testing.samples import make_samples

QWEN3_30B_A3B: dict[str, Any] = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "vocab_size": 32_000,
    "norm_topk_prob": True,
}
SMALL: dict[str, Any] = QWEN3_30B_A3B | {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "vocab_size": 512,
}
SEED = 5


def main(arguments: list[str] | None = None) -> int:
    """Print what was measured, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="end within 50 s")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--tokens", type=int, default=16_384, help="of a step, in microbatches of a quarter"
    )
    given = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        print("no CUDA device: a small model on the CPU, whose times say nothing about a GPU")
    tokens = given.tokens if on_gpu else 512
    pairs = 6 if given.quick or not on_gpu else 30
    actor = random_policy(QWEN3_30B_A3B if on_gpu else SMALL, given.layers)
    samples = make_samples(8, seed=SEED, min_length=tokens // 8, max_length=tokens // 8)
    samples = with_own_routes(actor, samples, max_tokens=tokens // 4)
    batches = pack(samples, max_tokens=tokens // 4, scorer=actor)
    parameters = sum(p.numel() for module in actor.modules for p in module.parameters())
    print(
        f"{parameters / 1e9:.2f}G parameters, {tokens} tokens a step, {pairs} pairs on {name_of_device()}"
    )
    step = contest(actor, batches, pairs, update=True)
    print(f"step: {step.describe('live', 'R3')}")
    record = contest(actor, batches, pairs, update=False)
    print(f"pass: {record.describe('plain', 'R2')}")
    if on_gpu:
        figures = {
            "gpu.replay_step_ratio": step.ratio,
            "gpu.record_pass_ratio": record.ratio,
            "gpu.extra_memory_ratio": memory_ratio(actor, batches, samples),
        }
        for metric, value in figures.items():
            print(json.dumps({"metric": metric, "value": round(value, 4), "unit": "ratio"}))
    return 0


def random_policy(fields: dict[str, Any], num_layers: int) -> MegatronActor:
    """Build a policy in bfloat16 with float32 main weights (float32 on the CPU) from a config."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    initialize(ParallelLayout())
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model("qwen3_moe", num_hidden_layers=num_layers, **fields).save_pretrained(
            Path(folder)
        )
        shape = read_model_shape(folder)
    config = transformer_config(shape, ParallelLayout(), dtype=dtype)
    chunks = build_model(shape, config, grouped_experts=True)
    torch.manual_seed(SEED)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(std=0.02)
    return MegatronActor(
        wrap_precision(chunks, config),
        config=config,
        num_experts=shape.num_experts,
        settings=SETTINGS.model_copy(update={"lr": 1e-6}),
        num_updates=10,
    )


def contest(
    actor: MegatronActor, batches: list[Microbatch], pairs: int, *, update: bool
) -> Contest:
    """Compare live with replayed steps, or plain with recording passes."""
    watch = RouteWatch(observe=lambda *_: None)

    def step(routing: Routing) -> None:
        watching = watch if routing is Routing.REPLAY else None
        actor.update(batches, mean_loss, temperature=1.0, routing=routing, watch=watching)

    def score(routing: Routing) -> None:
        actor.score(batches, temperature=1.0, routing=routing)

    if update:
        return alternate(lambda: step(Routing.LIVE), lambda: step(Routing.REPLAY), pairs=pairs)
    return alternate(lambda: score(Routing.LIVE), lambda: score(Routing.RECORD), pairs=pairs)


def memory_ratio(actor: MegatronActor, batches: list[Microbatch], samples: list[Sample]) -> float:
    """Return the device memory of a replayed step beyond a live one, over the routes' bytes."""

    def peak(routing: Routing) -> int:
        torch.cuda.reset_peak_memory_stats()
        actor.update(batches, mean_loss, temperature=1.0, routing=routing)
        return torch.cuda.max_memory_allocated()

    extra = peak(Routing.REPLAY) - peak(Routing.LIVE)
    routes = sum(sample.trace.expert_ids.nbytes for sample in samples)
    print(
        f"memory: {extra / 2**20:.1f} MiB more at the peak, the routes of the step are {routes / 2**20:.1f} MiB"
    )
    return extra / routes


def name_of_device() -> str:
    """Return the name of the GPU, or of nothing."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"


if __name__ == "__main__":
    sys.exit(main())
