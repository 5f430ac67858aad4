"""Measure the embedded engine, with and without recording, beside transformers' generate.

Example:
    $ python benchmarks/embedded.py --quick
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.testing.tiny_models import write_tiny_checkpoint

GENERATIONS_PER_PROMPT = 8


def main() -> None:
    """Run the benchmark and print one JSON line a metric, after a table for people."""
    arguments = _arguments()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    requests = _requests(arguments.batch_size // GENERATIONS_PER_PROMPT, arguments.prompt_length)
    sampling = SamplingParams(max_completion_length=arguments.completion_length)
    with tempfile.TemporaryDirectory() as directory:
        path = write_tiny_checkpoint(
            Path(directory) / "model", num_hidden_layers=4, hidden_size=128
        )
        contestants = {
            "recording": _engine(path, arguments, requests, sampling, record_routes=True),
            "not recording": _engine(path, arguments, requests, sampling, record_routes=False),
            "generate": _generate(path, arguments, requests, sampling),
        }
        speeds = _race(contestants, arguments.rounds)
    for name, speed in speeds.items():
        print(f"{name:15s} {speed:10.0f} tokens/s")
    _report("embedded.record_ratio", speeds["recording"] / speeds["not recording"], "ratio")
    _report("embedded.vs_generate_ratio", speeds["recording"] / speeds["generate"], "ratio")
    _report("embedded.tokens_per_s", speeds["recording"], "tokens/s")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three rounds instead of ten")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=128, help="a multiple of 8")
    parser.add_argument("--prompt-length", type=int, default=20)
    parser.add_argument("--completion-length", type=int, default=16)
    arguments = parser.parse_args()
    arguments.rounds = 3 if arguments.quick else 10
    return arguments


def _requests(count: int, prompt_length: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            request_id=number,
            prompt_ids=rng.integers(4, 99, prompt_length).astype(np.int32),
            num_generations=GENERATIONS_PER_PROMPT,
        )
        for number in range(count)
    ]


def _engine(
    path: Path,
    arguments: argparse.Namespace,
    requests: list[Request],
    sampling: SamplingParams,
    *,
    record_routes: bool,
) -> Callable[[], int]:
    engine = EmbeddedEngine(
        path,
        dtype=arguments.dtype,
        device=arguments.device,
        max_batch_size=arguments.batch_size,
        record_routes=record_routes,
    )

    def run() -> int:
        groups = engine.generate(requests, sampling)
        return sum(
            len(completion.token_ids) for group in groups for completion in group.completions
        )

    return run


def _generate(
    path: Path, arguments: argparse.Namespace, requests: list[Request], sampling: SamplingParams
) -> Callable[[], int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, arguments.dtype)
    ).to(arguments.device)
    model.set_experts_implementation("grouped_mm")
    prompts = torch.from_numpy(np.stack([request.prompt_ids for request in requests])).long()
    prompts = prompts.to(arguments.device)

    def run() -> int:
        tokens = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            num_return_sequences=GENERATIONS_PER_PROMPT,
            max_new_tokens=sampling.max_completion_length,
        )
        # Ended rows are filled with the padding token, which the model may sample too: hence the
        # first end counts.
        completion = tokens[:, prompts.shape[1] :]
        ended = (completion == model.generation_config.eos_token_id).cumsum(1)
        return int((ended == 0).sum() + (ended[:, -1] > 0).sum())

    return run


def _race(contestants: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Return each contestant's best tokens per second; they take turns on a busy machine."""
    best = dict.fromkeys(contestants, 0.0)
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            num_tokens = run()
            best[name] = max(best[name], num_tokens / (time.perf_counter() - start))
    return best


def _report(metric: str, value: float, unit: str) -> None:
    print(json.dumps({"metric": metric, "value": round(value, 3), "unit": unit}))


if __name__ == "__main__":
    main()
