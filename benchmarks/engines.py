"""Measure route capture, weight pushes and the wire in vLLM, and the embedded engine.

Every engine lives in a process of its own, and rounds alternate between them; the embedded engine,
the slowest, takes part in every sixth. What else the machine does changes a round by more than
capture does, so neighbouring rounds are compared, and the median of many such pairs is the figure.
A tiny and a ~20M-parameter model, random weights, bfloat16. The figures come last, one JSON object
a line.

    python benchmarks/engines.py [--quick] [--rounds 48]
"""

from __future__ import annotations

import argparse
import base64
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_replay.cli.environment import set_defaults
from moe_replay.engines.types import Engine, Request, RolloutGroup, SamplingParams
from moe_replay.routing import encode_trace

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "20M": {
        "hidden_size": 256,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 96,
        "head_dim": 64,
    },
}
PROMPT_LENGTH = 24
# Rounds.
_EMBEDDED_EVERY = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What every engine samples in a round."""

    num_prompts: int
    """Each completed eight times."""
    max_completion_length: int
    """Tokens; a completion may end earlier."""


def main() -> int:
    """Print what was measured, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the tiny model alone, five rounds of short completions",
    )
    parser.add_argument("--rounds", type=int, help="default 48, quick 5")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (5 if arguments.quick else 48)
    # Per completion a trace is made once, so short completions show it most.
    load = Load(
        num_prompts=4 if arguments.quick else 8,
        max_completion_length=32 if arguments.quick else 64,
    )
    set_defaults(os.environ)
    figures: dict[str, tuple[float, str]] = {}
    for size in ("tiny",) if arguments.quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_model(Path(folder), size)
            found = measure(checkpoint, rounds, load)
        for name, value in found.items():
            print(f"{size:5s} {name:32s} {value[0]:12.4f} {value[1]}")
        # The larger model is nearer to what people run, so its figures bear the names.
        figures |= found
        figures |= {f"{name}.{size}": value for name, value in found.items()}
    for metric, (value, unit) in figures.items():
        print(json.dumps({"metric": metric, "value": round(value, 5), "unit": unit}))
    return 0


def write_model(folder: Path, size: str) -> Path:
    """Write the checkpoint of a size."""
    import torch
    import transformers

    from moe_replay.testing.tiny_models import write_tiny_checkpoint

    transformers.logging.disable_progress_bar()
    return write_tiny_checkpoint(
        folder / "model", initializer_range=0.05, dtype=torch.bfloat16, **SIZES[size]
    )


def measure(checkpoint: Path, rounds: int, load: Load) -> dict[str, tuple[float, str]]:
    """Race the engines, then push weights; return metric -> (value, unit)."""
    kinds = ("vllm capturing", "vllm plain", "embedded")
    with workers(kinds, checkpoint, load) as ask:
        for kind in (*kinds, *kinds[:2]):
            ask(kind, "generate")
        speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(rounds):
            racing = kinds if number % _EMBEDDED_EVERY == 0 else kinds[:2]
            for kind in racing if number % 2 == 0 else racing[::-1]:
                seconds, tokens = ask(kind, "generate")
                speeds[kind].append(tokens / seconds)
        for kind in kinds:
            print(f"      {kind:16s} {statistics.median(speeds[kind]):7.0f} sampled tokens/s")
        low, capture_ratio, high = quartiles(speeds[kinds[0]], speeds[kinds[1]])
        print(f"      capturing / plain: half of the pairs between {low:.3f} and {high:.3f}")
        together = [ask("vllm capturing", "together") for _ in range(3 if rounds < 20 else 9)]
        pushes = [ask("vllm capturing", "push") for _ in range(5)]
        own, native, tokens = ask("vllm capturing", "wire")
    return {
        "capture.throughput_ratio": (capture_ratio, "ratio"),
        "embedded.vs_vllm_ratio": (
            statistics.median(speeds["embedded"]) / statistics.median(speeds["vllm capturing"]),
            "ratio",
        ),
        # One call of all completions against as many in 32 calls at a time, of neighbouring rounds.
        "concurrent.ratio": (statistics.median(one / many for one, many in together), "ratio"),
        "push.seconds": (statistics.median(seconds for seconds, _ in pushes), "s"),
        "push.bytes": (float(pushes[0][1]), "B"),
        "wire.bytes_per_token": (own / tokens, "B"),
        "wire.native_bytes_per_token": (native / tokens, "B"),
    }


def quartiles(first: list[float], second: list[float]) -> list[float]:
    """Return the quartiles of first / second over neighbouring rounds."""
    return statistics.quantiles(
        [a / b for a, b in zip(first, second, strict=True)], n=4, method="inclusive"
    )


@contextmanager
def workers(
    kinds: tuple[str, ...], checkpoint: Path, load: Load
) -> Iterator[Callable[[str, str], tuple[float, ...]]]:
    """Start a process for each engine; yield a function (engine, command) -> answer."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    try:
        for kind in kinds:
            pipes[kind], theirs = spawn.Pipe()
            process = spawn.Process(target=work, args=(kind, checkpoint, load, theirs))
            process.start()
            processes.append(process)

        def ask(kind: str, command: str) -> tuple[float, ...]:
            pipes[kind].send(command)
            return pipes[kind].recv()

        yield ask
    finally:
        for kind in pipes:
            pipes[kind].send("end")
        for process in processes:
            process.join()


def work(kind: str, checkpoint: Path, load: Load, pipe: Any) -> None:
    """Hold one engine and do what is asked."""
    engine = open_engine(kind, checkpoint)
    rng = np.random.default_rng(3)
    requests = [
        Request(
            request_id=number,
            prompt_ids=rng.integers(4, 90, PROMPT_LENGTH).astype(np.int32),
            num_generations=8,
        )
        for number in range(load.num_prompts)
    ]
    sampling = SamplingParams(max_completion_length=load.max_completion_length)
    version = 0
    while (command := pipe.recv()) != "end":
        started = time.perf_counter()
        if command == "push":
            weights = list(tensors_of(checkpoint))
            started, version = time.perf_counter(), version + 1
            engine.load_weights(iter(weights), policy_version=version)
            size = sum(tensor.numel() * tensor.element_size() for _, tensor in weights)
            pipe.send((time.perf_counter() - started, size))
            continue
        if command == "together":
            pipe.send(one_and_many(engine, sampling, rng))
            continue
        groups = engine.generate(requests, sampling)
        if command == "wire":
            pipe.send(wire_bytes(groups))
        else:
            sampled = sum(len(c.token_ids) for group in groups for c in group.completions)
            pipe.send((time.perf_counter() - started, sampled))
    engine.close()


def one_and_many(
    engine: Engine, sampling: SamplingParams, rng: np.random.Generator
) -> tuple[float, ...]:
    """Return the seconds of one call of 128 completions, and of 32 concurrent calls of four."""
    requests = [
        Request(
            request_id=number,
            prompt_ids=rng.integers(4, 90, PROMPT_LENGTH).astype(np.int32),
            num_generations=4,
        )
        for number in range(32)
    ]
    started = time.perf_counter()
    engine.generate(requests, sampling)
    between = time.perf_counter()
    with ThreadPoolExecutor(len(requests)) as threads:
        list(threads.map(lambda request: engine.generate([request], sampling), requests))
    return between - started, time.perf_counter() - between


def open_engine(kind: str, checkpoint: Path) -> Engine:
    """Start an engine."""
    if kind == "embedded":
        from moe_replay.engines.embedded.engine import EmbeddedEngine

        return EmbeddedEngine(checkpoint, dtype="bfloat16", device="cpu", record_routes=True)
    from moe_replay.engines.vllm.engine import VllmEngine

    return VllmEngine(
        checkpoint, dtype="bfloat16", kv_cache_gib=0.25, record_routes=kind == "vllm capturing"
    )


def tensors_of(checkpoint: Path) -> Iterator[tuple[str, Any]]:
    """Yield the weights of a checkpoint."""
    from safetensors.torch import load_file

    yield from load_file(checkpoint / "model.safetensors").items()


def wire_bytes(groups: list[RolloutGroup]) -> tuple[float, ...]:
    """Return the bytes of all routes in our codec, in vLLM's base64 of a .npy, and their tokens."""
    traces = [c.trace for group in groups for c in group.completions if c.trace is not None]
    own = sum(len(encode_trace(trace)) for trace in traces)
    # vLLM sends one array for each completion: all decoder layers, a byte an id, P + T - 1 rows, a
    # header of 128 bytes.
    native = sum(
        len(base64.b64encode(bytes(128 + trace.expert_ids[:-1].nbytes))) for trace in traces
    )
    return own, native, sum(len(trace) for trace in traces)


if __name__ == "__main__":
    sys.exit(main())
