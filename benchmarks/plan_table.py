"""The tables of docs/plan.md: what `doctor --plan` says of four models, and of published peaks.

Nothing is measured here, and nothing runs on a GPU: the figures are computed from the config.json
files under recipes/.

    python benchmarks/plan_table.py [--write docs/plan.md]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_replay.megatron.model import read_model_shape
from moe_replay.plan.advice import remedies
from moe_replay.plan.machine import read_machine
from moe_replay.plan.memory import MemoryPlan, plan_memory
from moe_replay.plan.trainer.kernels import GPU
from moe_replay.plan.trainer.settings import AdamStorage, Settings
from moe_replay.plan.trainer.training import TrainerBytes, trainer_bytes
from moe_replay.recipe.load import recipe_from_table
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.training import MegatronSection

ROOT = Path(__file__).parents[1]
TOKENS = 16384
GIB = 2**30
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
LEAN = {
    "use_precision_aware_optimizer": True,
    "main_grads_dtype": "bfloat16",
    "exp_avg_dtype": "bfloat16",
    "exp_avg_sq_dtype": "bfloat16",
}
HOST = {"optimizer_cpu_offload": True, "use_precision_aware_optimizer": True}
BOTH = HOST | {"main_grads_dtype": "bfloat16"}
STATES = {"float32": {}, "bf16": LEAN, "host": HOST, "host, bf16 gradients": BOTH}
NAMES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "last": "num_layers_in_last_pipeline_stage",
}
LAYOUTS: dict[str, tuple[str, dict[int, dict[str, int]]]] = {
    "Qwen3-30B-A3B": (
        "qwen3-30b-a3b",
        {8: {"tp": 4, "ep": 8}, 64: {"tp": 4, "ep": 8}, 512: {"tp": 4, "ep": 8}},
    ),
    "Qwen3-235B-A22B": (
        "qwen3-235b-a22b",
        {
            8: {"tp": 4, "ep": 8},
            64: {"tp": 4, "pp": 4, "cp": 2, "ep": 16, "last": 22},
            512: {"tp": 4, "pp": 4, "cp": 2, "ep": 16, "last": 22},
        },
    ),
    "DeepSeek-V3": (
        "deepseek-v3",
        {
            8: {"tp": 8, "ep": 8},
            64: {"tp": 8, "pp": 8, "ep": 8, "last": 5},
            512: {"tp": 8, "pp": 8, "ep": 32, "last": 5},
        },
    ),
    "GLM-4.5-Air": (
        "glm-4.5-air",
        {
            8: {"tp": 4, "ep": 8},
            64: {"tp": 2, "pp": 4, "ep": 8, "last": 10},
            512: {"tp": 2, "pp": 4, "ep": 8, "last": 10},
        },
    ),
}
MOONLIGHT = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_theta": 50000.0,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 163840,
}
_QWEN = json.loads((ROOT / "recipes/qwen3-30b-a3b/model/config.json").read_text())


def recipe_for(folder: str, sizes: dict[str, int], optimizer: dict[str, Any], gpus: int) -> Recipe:
    """Return a recipe for servers, so that the trainer has its GPUs to itself."""
    layout = {NAMES[name]: size for name, size in sizes.items()} | {NAMES["etp"]: 1}
    return recipe_from_table(
        {
            "run": {"output_dir": "/nowhere", "max_steps": 1},
            "model": {"path": str(ROOT / "recipes" / folder / "model"), "dtype": "bfloat16"},
            "data": {"train": "reasoning_gym:countdown", "max_prompt_length": 1024},
            "rewards": [{"function": "reasoning_gym"}],
            "rollout": {
                "engine": "vllm-server",
                "urls": ["http://127.0.0.1:1"],
                "max_completion_length": TOKENS - 1024,
            },
            "batch": {
                "global_batch_size": 16 * gpus,
                "max_tokens_per_microbatch": TOKENS,
                "logprob_chunk_size": 1024,
            },
            "megatron": {**layout, **FULL, "optimizer": optimizer},
        }
    )


def table() -> Iterator[str]:
    """Yield the lines of the table of models."""
    yield (
        "| model | GPUs | layout | weights | gradients | Adam | passes | float32 state | bf16 state | Adam on the host | "
        "the same, bf16 gradients | host, a node |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for model, (folder, of_gpus) in LAYOUTS.items():
        shape = read_model_shape(ROOT / "recipes" / folder / "model")
        for gpus, sizes in of_gpus.items():
            machine = read_machine([f"gpus={gpus}x80GB"])
            plans = {
                name: plan_memory(recipe_for(folder, sizes, state, gpus), shape, machine)
                for name, state in STATES.items()
            }
            first = plans["float32"]
            update = {phase.name: phase.parts for phase in first.phases}["update"]
            passes = sum(update.get(name, 0.0) for name in ("activations", "logits", "routes"))
            words = " ".join(f"{name.upper()}{size}" for name, size in sizes.items())
            cells = [
                *(f"{update[name] / 1e9:.1f}" for name in ("weights", "gradients", "optimizer")),
                f"{passes / 1e9:.1f}",
                *(_peak(plan) for plan in plans.values()),
                f"{plans['host'].host.total / 1e12:.2f} TB",
            ]
            yield f"| {model} | {gpus} | {words} | {' | '.join(cells)} |"
            if not any(plan.fits for plan in plans.values()):
                found = remedies(recipe_for(folder, sizes, BOTH, gpus), shape, machine)
                assert not found, f"{model} on {gpus} GPUs fits with {found[0].keys}"


def _peak(plan: MemoryPlan) -> str:
    text = f"{plan.peak.total / 1e9:.1f}"
    return text if plan.fits else f"{text} !"


class Published(NamedTuple):
    """A peak that others measured, and what they ran."""

    what: str
    """Who, and what of."""
    peak: float
    """GiB on the fullest GPU."""
    with_cuda: bool
    """Whether CUDA's and NCCL's own memory is counted in."""
    config: dict[str, Any]
    """config.json of the model."""
    keys: dict[str, Any]
    """Fields of `Settings`."""


PUBLISHED = (
    Published(
        "Megatron-Bridge, Qwen3-30B-A3B, 16 H100, EP16, 4k tokens, bf16 gradients, float32 moments, no recompute "
        "(allocated)",
        62.2,
        with_cuda=False,
        config=_QWEN,
        keys={
            "num_ranks": 16,
            "megatron": MegatronSection(expert_model_parallel_size=16),
            "adam": AdamStorage(
                dtype_bytes=2, gradient_bytes=2, main_gradient_bytes=2, main_parameter_bytes=2
            ),
            "max_tokens": 4096,
        },
    ),
    Published(
        "Megatron-Bridge, Moonlight-16B, 8 H100, TP2 EP8, 4k tokens, bf16 gradients and moments, no recompute "
        "(allocated)",
        36.6,
        with_cuda=False,
        config=MOONLIGHT,
        keys={
            "num_ranks": 8,
            "megatron": MegatronSection(
                tensor_model_parallel_size=2,
                expert_model_parallel_size=8,
                expert_tensor_parallel_size=1,
            ),
            "adam": AdamStorage(
                dtype_bytes=2,
                gradient_bytes=2,
                main_gradient_bytes=2,
                main_parameter_bytes=2,
                moment_bytes=(2, 2),
            ),
            "max_tokens": 4096,
        },
    ),
    Published(
        "ms-swift, Qwen3-30B-A3B, 8 x 80 GB, TP4 PP2 EP4, 8k tokens, float32 gradients and Adam, full recompute "
        "(with CUDA and NCCL)",
        76.0,
        with_cuda=True,
        config=_QWEN,
        keys={
            "num_ranks": 8,
            "megatron": MegatronSection(
                tensor_model_parallel_size=4,
                pipeline_model_parallel_size=2,
                expert_model_parallel_size=4,
                expert_tensor_parallel_size=1,
                **FULL,
            ),
            "adam": AdamStorage(dtype_bytes=2),
            "max_tokens": 8192,
            "num_microbatches": 4,
        },
    ),
)


def published() -> Iterator[str]:
    """Yield the lines of the table of published peaks, in GiB."""
    yield "| case | published | formulas | with 10 % on all but parameters |"
    yield "|---|---|---|---|"
    for case in PUBLISHED:
        worst = _fullest_rank(case)
        rest = worst.update.total + GPU.other_bytes * case.with_cuda
        plain, more = (
            f"{found / GIB:.1f} ({found / GIB / case.peak - 1:+.0%})"
            for found in (worst.resident.total + rest, worst.resident.total + 1.1 * rest)
        )
        yield f"| {case.what} | {case.peak} | {plain} | {more} |"


def _fullest_rank(case: Published) -> TrainerBytes:
    """Return the bytes of the rank that needs most, by our formulas."""
    tokens = case.keys["max_tokens"]
    # Their logits exist for all tokens at once.
    settings = Settings(
        max_sequence_length=tokens,
        chunk_rows=tokens,
        replays=False,
        **{"dtype_bytes": 2} | case.keys,
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case.config))
        shape = read_model_shape(folder)
    stages = settings.layout.pipeline_model_parallel_size
    size = shape.num_layers // stages
    layers = [range(stage * size, (stage + 1) * size) for stage in range(stages)]
    ranks = trainer_bytes(shape, settings, layers, GPU)
    return max(ranks, key=lambda found: found.resident.total + found.update.total)


def main() -> None:
    """Print the tables, or put them into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", metavar="PAGE", type=Path, help="put them into this page")
    options = parser.parse_args()
    parts = {"models": list(table()), "published": list(published())}
    for name, lines in parts.items():
        print(*lines, sep="\n")
        if options.write is not None:
            text = options.write.read_text()
            begin, end = f"<!-- plan-{name}: begin -->\n", f"<!-- plan-{name}: end -->"
            head, _, rest = text.partition(begin)
            _, _, tail = rest.partition(end)
            options.write.write_text(head + begin + "\n".join(lines) + "\n" + end + tail)


if __name__ == "__main__":
    main()
