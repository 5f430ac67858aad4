"""Measure rollouts on disk: memory to open one on each rank, speed of writing and reading.

Example:
    $ python benchmarks/rollout_files.py --quick
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_replay.engines.files.format import Manifest, RolloutFile, begin_rollout
from moe_replay.engines.files.writer import RolloutWriter
from moe_replay.engines.types import (
    Completion,
    EngineDescription,
    FinishReason,
    Request,
    RolloutGroup,
    SamplingParams,
)
from moe_replay.routing import Origin, RoutingTrace

NUM_LAYERS, TOPK, NUM_EXPERTS = 4, 8, 128
VOCABULARY, PROMPT = 151_936, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a process of its own found on opening a rollout, in bytes and seconds."""

    open_s: float
    """Until the rollout was open."""
    open_bytes: int
    """Resident memory that it took, pages of the files included."""
    open_anonymous_bytes: int
    """Of which cannot be given back to the system."""
    read_bytes: int
    """Resident memory that a step of it took, pages of the files included."""
    read_anonymous_bytes: int
    """Of which cannot be given back to the system."""
    read_s: float
    """Until that step was read and checked."""


def main() -> None:
    """Write a rollout, open it in another process, and print one JSON line a figure at the end."""
    options = _options()
    tokens = options.groups * options.generations * options.length
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        size = write(Path(folder), options)
        write_s = time.perf_counter() - started
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as processes:
            found = processes.submit(open_rollout, folder, options.step).result()
    step = min(options.step, options.groups) * options.generations * options.length
    print(f"{tokens:,} tokens, {size / 2**20:,.0f} MiB on disk; a step of {step:,} tokens")
    for metric, value, unit in (
        ("rollout_files.open_bytes_per_token", found.open_bytes / tokens, "B"),
        ("rollout_files.open_anonymous_bytes_per_token", found.open_anonymous_bytes / tokens, "B"),
        ("rollout_files.open_ms", found.open_s * 1e3, "ms"),
        ("rollout_files.step_bytes_per_token", found.read_bytes / step, "B"),
        ("rollout_files.step_anonymous_bytes_per_token", found.read_anonymous_bytes / step, "B"),
        ("rollout_files.disk_bytes_per_token", size / tokens, "B"),
        ("rollout_files.write_MBps", size / write_s / 1e6, "MB/s"),
        ("rollout_files.read_MBps", size * step / tokens / found.read_s / 1e6, "MB/s"),
    ):
        print(json.dumps({"metric": metric, "value": round(value, 4), "unit": unit}))


def write(folder: Path, options: argparse.Namespace) -> int:
    """Write the rollout and return the bytes of its files."""
    description = EngineDescription(
        name="benchmark",
        version="1",
        dtype="bfloat16",
        records_routes=True,
        moe_layers=tuple(range(NUM_LAYERS)),
        num_experts=NUM_EXPERTS,
        topk=TOPK,
        max_context_length=options.length + PROMPT,
    )
    manifest = Manifest(
        engine=description,
        policy_version=0,
        sampling=SamplingParams(max_completion_length=options.length),
        first_request=0,
        num_requests=options.groups,
    )
    with RolloutWriter(begin_rollout(folder, manifest)) as writer:
        for group in _groups(options):
            writer.write(group)
        writer.finish()
    return sum(file.stat().st_size for file in folder.iterdir())


def open_rollout(folder: str, step: int) -> Opened:
    """Open the rollout of a folder here, read its first groups, and return the cost."""
    before = _memory()
    started = time.perf_counter()
    rollout = RolloutFile(Path(folder))
    opened = time.perf_counter()
    after = _memory()
    groups = [rollout.group(number) for number in rollout.request_ids[:step]]
    read = time.perf_counter()
    last = _memory()
    assert len(groups) <= step
    return Opened(
        open_s=opened - started,
        open_bytes=after[0] - before[0],
        open_anonymous_bytes=after[1] - before[1],
        read_bytes=last[0] - after[0],
        read_anonymous_bytes=last[1] - after[1],
        read_s=read - opened,
    )


def _groups(options: argparse.Namespace) -> Iterator[RolloutGroup]:
    rng = np.random.default_rng(0)
    rows = options.length + PROMPT
    scores = rng.random((rows, NUM_LAYERS, NUM_EXPERTS), dtype=np.float32)
    routes = np.argpartition(scores, -TOPK, axis=2)[..., -TOPK:].astype(np.uint8)
    valid = np.arange(rows) < rows - 1
    origin = Origin.single(engine="benchmark", engine_version="1", policy_version=0, num_rows=rows)
    for number in range(options.groups):
        prompt = rng.integers(0, VOCABULARY, PROMPT, dtype=np.int32)
        completions = []
        for _ in range(options.generations):
            tokens = rng.integers(0, VOCABULARY, options.length, dtype=np.int32)
            trace = RoutingTrace.record(
                routes,
                token_ids=np.concatenate([prompt, tokens]),
                valid=valid,
                layers=range(NUM_LAYERS),
                num_experts=NUM_EXPERTS,
                origin=origin,
            )
            completions.append(
                Completion(
                    token_ids=tokens,
                    rollout_logprobs=-rng.random(options.length, dtype=np.float32),
                    trace=trace,
                    finish_reason=FinishReason.LENGTH,
                    policy_version=0,
                )
            )
        request = Request(request_id=number, prompt_ids=prompt, num_generations=len(completions))
        yield RolloutGroup(request=request, completions=tuple(completions))


def _memory() -> tuple[int, int]:
    """Return this process's resident bytes, and those among them that belong to no file."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, anonymous = (int(told[key].split()[0]) << 10 for key in ("VmRSS", "RssAnon"))
    return resident, anonymous


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer groups")
    parser.add_argument("--generations", type=int, default=16, help="completions a prompt")
    parser.add_argument("--length", type=int, default=2048, help="tokens a completion")
    parser.add_argument("--step", type=int, default=8, help="groups that a rank reads")
    options = parser.parse_args()
    options.groups = 64 if options.quick else 512
    return options


if __name__ == "__main__":
    main()
