"""What HTTP costs: 64 clients of a rollout server beside one offline batch on the same workers.

The server runs in this process, as `moe-replay serve` runs it; its clients run in another one.
Rounds alternate between them and the same requests asked of the engine directly, all at once. What
else the machine does changes a round by more than HTTP does, so neighbouring rounds are compared,
and the median of the pairs is the figure. Weights are pushed too: whole pushes of the model, and
the bytes of a larger one, which are received and checked, but never loaded: one part to one server
(`serve.push_MBps`), and many parts, exported as they go, to two servers. `serve.push_overlap_ratio`
is the time of sending each part while the next is exported, over that of doing both in turn;
`serve.push_group_ratio` that of sending to both at once over gloo, over that of HTTP to each.
Random weights, bfloat16. The figures come last, one JSON object a line.

    python benchmarks/serve.py [--quick] [--rounds 5] [--tensor-parallel-size 2]

A call costs its client and the server a few milliseconds of CPU, once, whatever its length. Here
both share the cores with the workers, and completions are short: 192 tokens at some 10 ms a step.
With clients on another machine, or completions of thousands of tokens, HTTP costs less than this
says. Several workers wait for each other by spinning, so on as many cores as workers it costs more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moe_replay.cli.environment import set_defaults
from moe_replay.engines.servers.faults import Fault
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.testing.tiny_models import VOCAB_SIZE

NUM_CLIENTS = 64
PROMPT_LENGTH = 24
# Enough for a step of each kind: prompts, a full batch.
_WARM_UP_LENGTH = 16
SIZE: dict[str, Any] = {
    "hidden_size": 256,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 96,
    "head_dim": 64,
}


def main() -> int:
    """Print what was measured, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--rounds", type=int, help="pairs; default 5, quick 3")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="workers")
    parser.add_argument("--length", type=int, default=192, help="of a completion, in tokens")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        return be_client(options.client)
    # As `moe-replay serve` does: two workers of two threads each wait for each other on two cores.
    set_defaults(os.environ, num_workers=options.tensor_parallel_size)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=memory) as pushes:
        checkpoint = write_model(Path(folder), {} if options.quick else SIZE)
        figures = asyncio.run(measure(checkpoint, Path(pushes), options))
    for metric, (value, unit) in figures.items():
        print(json.dumps({"metric": metric, "value": round(value, 4), "unit": unit}))
    return 0


def write_model(folder: Path, size: dict[str, Any]) -> Path:
    """Write a checkpoint of random weights."""
    import torch
    import transformers

    from moe_replay.testing.tiny_models import write_tiny_checkpoint

    transformers.logging.disable_progress_bar()
    return write_tiny_checkpoint(
        folder / "model", initializer_range=0.05, dtype=torch.bfloat16, **size
    )


def requests() -> list[Request]:
    """Return what every round asks for: one completion for each client."""
    rng = np.random.default_rng(0)
    return [
        Request(
            request_id=number,
            prompt_ids=rng.integers(4, VOCAB_SIZE, PROMPT_LENGTH).astype(np.int32),
            num_generations=1,
        )
        for number in range(NUM_CLIENTS)
    ]


def sampling(length: int, seed: int) -> SamplingParams:
    """Return how a round samples; another seed is another round."""
    return SamplingParams(max_completion_length=length, seed=seed)


async def measure(
    checkpoint: Path, pushes: Path, options: argparse.Namespace
) -> dict[str, tuple[float, str]]:
    """Run the server, race clients against its engine, push; return metric -> (value, unit)."""
    from moe_replay.checkpoint.facts import read_facts
    from moe_replay.engines.serve.app import EngineServer
    from moe_replay.engines.serve.run import web_server
    from moe_replay.engines.serve.socket import bind
    from moe_replay.engines.vllm.serving import VllmServing

    # It loads its libraries while the workers load the model.
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        "--client",
        str(checkpoint),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    engine = VllmServing(
        checkpoint,
        dtype="bfloat16",
        tensor_parallel_size=options.tensor_parallel_size,
        kv_cache_gib=0.25,
    )
    webs: list[Any] = []
    serving: list[Any] = []

    def serve(facts: Any) -> str:
        own = Path(tempfile.mkdtemp(dir=pushes))
        server = EngineServer(engine, facts=facts, push_folder=own)
        server.ready()
        listening = bind("127.0.0.1", 0)
        webs.append(web_server(server.application()))
        serving.append(asyncio.create_task(webs[-1].serve(sockets=[listening])))
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    try:
        await engine.start()
        print(f"{options.tensor_parallel_size} workers; {engine.capacity()}")
        await ask(client, "connect", serve(read_facts(checkpoint)))
        raced = await race(engine, client, options)
        # Without facts a server takes the bytes of a model of any size.
        others = [serve(None), serve(None)]
        return raced | await push(client, others, options)
    finally:
        client.kill()
        await client.wait()
        for web in webs:
            web.should_exit = True
        await asyncio.gather(*serving)
        await engine.close()


async def race(
    engine: Any, client: asyncio.subprocess.Process, options: argparse.Namespace
) -> dict[str, tuple[float, str]]:
    """Alternate rounds of the clients and of the engine alone."""

    async def alone(seed: int, length: int = options.length) -> float:
        start = time.perf_counter()
        every = await asyncio.gather(
            *(
                engine.complete(
                    request,
                    0,
                    sampling(length, seed),
                    policy_version=0,
                    progress=lambda count: None,
                )
                for request in requests()
            )
        )
        return sum(len(c.token_ids) for c in every) / (time.perf_counter() - start)

    async def served(seed: int, length: int = options.length) -> float:
        seconds, tokens = await ask(client, "generate", length, seed)
        return tokens / seconds

    await served(0, _WARM_UP_LENGTH), await alone(0, _WARM_UP_LENGTH)
    speeds: dict[Any, list[float]] = {alone: [], served: []}
    for seed in range(1, 1 + (options.rounds or (3 if options.quick else 5))):
        for kind in (alone, served) if seed % 2 else (served, alone):
            speeds[kind].append(await kind(seed))
    ratios = [s / a for s, a in zip(speeds[served], speeds[alone], strict=True)]
    print(
        f"{NUM_CLIENTS} clients {statistics.median(speeds[served]):.0f} tokens/s, one batch "
        f"{statistics.median(speeds[alone]):.0f}; pairs: "
        + ", ".join(f"{ratio:.3f}" for ratio in ratios)
    )
    return {
        "serve.concurrent_ratio": (statistics.median(ratios), "ratio"),
        "serve.tokens_per_second": (statistics.median(speeds[served]), "1/s"),
    }


async def push(
    client: asyncio.subprocess.Process, others: list[str], options: argparse.Namespace
) -> dict[str, tuple[float, str]]:
    """Push the model as a trainer does, and the bytes of a larger one in three ways."""
    whole = [await ask(client, "push", version) for version in range(1, 4)]
    megabytes = 256 if options.quick else 2048
    seconds, size = await ask(client, "upload", others[0], megabytes)
    times: dict[str, list[float]] = {way: [] for way in ("in turn", "overlapped", "gloo")}
    for number in range(3):
        for way in list(times) if number % 2 else reversed(list(times)):
            taken, sent = await ask(client, "deliver", others, megabytes, way)
            times[way].append(taken)
    middle = {way: statistics.median(of_way) for way, of_way in times.items()}
    print(
        f"{sent / 1e6:.0f} MB exported and sent to {len(others)} servers: "
        + ", ".join(f"{way} {value:.2f} s" for way, value in middle.items())
    )
    return {
        "serve.push_overlap_ratio": (middle["overlapped"] / middle["in turn"], "ratio"),
        "serve.push_group_ratio": (middle["gloo"] / middle["overlapped"], "ratio"),
        "serve.push_MBps": (size / seconds / 1e6, "MB/s"),
        "serve.whole_push_seconds": (statistics.median(s for s, _ in whole), "s"),
        "serve.whole_push_bytes": (float(whole[0][1]), "B"),
    }


async def ask(client: asyncio.subprocess.Process, *command: Any) -> list[float]:
    """Return what the clients' process answers: seconds, and how much came of them."""
    client.stdin.write(json.dumps(command).encode() + b"\n")
    line = await client.stdout.readline()
    if not line:
        raise RuntimeError("the process of the clients has ended")
    return json.loads(line)


def be_client(checkpoint: str) -> int:
    """Do what standard input asks for, and answer on standard output."""
    from moe_replay.checkpoint.facts import checkpoint_tensors, read_facts
    from moe_replay.engines.servers.engine import ServerEngine

    facts = read_facts(checkpoint)
    engine: Any = None
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        start, done = time.perf_counter(), 0
        if what == "connect":
            engine = ServerEngine(
                arguments,
                facts=facts,
                run="benchmark",
                dtype="bfloat16",
                record_routes=True,
                calls_per_server=NUM_CLIENTS,
            )
        elif what == "generate":
            groups = engine.generate(requests(), sampling(*arguments))
            done = sum(len(c.token_ids) for group in groups for c in group.completions)
        elif what == "push":
            engine.load_weights(checkpoint_tensors(checkpoint), policy_version=arguments[0])
            done = sum(tensor.nbytes for _, tensor in checkpoint_tensors(checkpoint))
        elif what == "deliver":
            done = deliver(*arguments)
        else:
            done = upload(*arguments)
        print(json.dumps([time.perf_counter() - start, done]), flush=True)
    return 0


def upload(url: str, megabytes: int) -> int:
    """Send a part of that many bytes as our client does, and return its length."""
    from moe_replay.engines.servers.own import ServerCalls
    from moe_replay.engines.servers.push_files import WeightPart, WeightsFolder

    with tempfile.TemporaryDirectory() as unused:
        folder = WeightsFolder(Path(unused))
        part = WeightPart(0, [memoryview(bytes(1 << 20) * megabytes)], folder, "benchmark")
        calls = ServerCalls(url, token=None, timeout_s=600.0, max_answer_bytes=1 << 20)
        calls.put_weights(part)
        calls.close()
    return part.num_bytes


def deliver(urls: list[str], megabytes: int, way: str) -> int:
    """Export tensors and send them to all servers, without a commit; return the bytes of a copy.

    ``in turn``: a part is made when the last one has arrived everywhere. ``overlapped``: while it
    travels. ``gloo``: the same, sent once to all.
    """
    import torch

    from moe_replay.engines.servers.broadcast import Broadcast
    from moe_replay.engines.servers.own import ServerCalls
    from moe_replay.engines.servers.push import Delivery
    from moe_replay.engines.servers.push_files import WeightsFolder, weight_parts

    servers = [
        ServerCalls(url, token=None, timeout_s=600.0, max_answer_bytes=1 << 20) for url in urls
    ]
    weight = torch.randn(8 << 20)

    def export() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(megabytes // 16):
            yield f"w{number}", weight.to(torch.bfloat16)

    faults: Counter[Fault] = Counter()
    broadcast = Broadcast("gloo", servers, faults) if way == "gloo" else None
    if broadcast is not None:
        broadcast.form(servers, must_form=True)
    delivery = Delivery(servers, faults, broadcast)
    with (
        weight_parts(
            export(), folder=WeightsFolder(None), push="benchmark", bucket_bytes=64 << 20
        ) as parts,
        ThreadPoolExecutor(len(servers)) as threads,
    ):
        delivery.begin(threads)
        for part in parts:
            delivery.offer(part)
            del part
            delivery.wait_for_room(1 if way == "in turn" else 2)
        delivery.end()
    assert not faults and len(delivery.left) == len(servers)
    if broadcast is not None:
        broadcast.close()
    for server in servers:
        server.close()
    return delivery.num_bytes


if __name__ == "__main__":
    sys.exit(main())
