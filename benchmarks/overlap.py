"""What rollout.max_staleness = 1 gains: steps of a run over two servers, beside those without it.

Two `moe-replay serve` processes sample, and the demo's recipe trains over them twice: rollouts
before steps, and rollouts beside them. The two runs take turns of some steps each, stopped
and resumed, so that what else the machine does meets both. The figures come last, one JSON object a
line: the median time of an overlapped step over that of a synchronous one, and how much more reward
the overlapped run earns on held-out prompts in the end.

    python benchmarks/overlap.py [--quick] [--delay 3] [--steps 60] [--turn 20]

Servers and trainer share the cores of one machine here, where the servers would have GPUs of their
own. So a rollout on other machines is simulated by waiting: every answer to a generate call is held
back until ``--delay`` seconds after it was asked, by a relay between trainer and server. Engine,
trainer, pushes and checkpoints are real. With ``--delay 0`` nothing is simulated.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "demo" / "recipe.toml"
RUNS = {"synchronous": 0, "overlapped": 1}
"""Name of a run -> its rollout.max_staleness."""
NOT_OF_A_STEP = ("checkpoint", "eval")
_START_S = 600.0


def main() -> int:
    """Print what was measured, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps, and the embedded engine")
    parser.add_argument("--delay", type=float, help="seconds; default 3, quick 1")
    parser.add_argument("--steps", type=int, help="of each run; default 60, quick 5")
    parser.add_argument("--turn", type=int, help="steps of a turn; default 20, quick 5")
    parser.add_argument("--engine", choices=["vllm", "embedded"], help="of the servers")
    parser.add_argument("--output", type=Path, help="keep the runs in this folder")
    options = parser.parse_args()
    delay_s = options.delay if options.delay is not None else (1.0 if options.quick else 3.0)
    steps = options.steps or (5 if options.quick else 60)
    engine = options.engine or ("embedded" if options.quick else "vllm")
    with ExitStack() as opened:
        folder = options.output or Path(opened.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        urls = [
            opened.enter_context(delayed(url, delay_s))
            for url in opened.enter_context(serving(RECIPE.parent / "model", engine, folder))
        ]
        take_turns(
            folder,
            urls,
            steps=steps,
            turn=options.turn or (5 if options.quick else 20),
            quick=options.quick,
        )
        figures = figures_of(folder, delay_s)
    for metric, (value, unit) in figures.items():
        print(json.dumps({"metric": metric, "value": round(value, 4), "unit": unit}))
    return 0


def take_turns(folder: Path, urls: list[str], *, steps: int, turn: int, quick: bool) -> None:
    """Train both runs, some steps at a time."""
    for number, until in enumerate(range(turn, steps + turn, turn)):
        names = list(RUNS) if number % 2 == 0 else list(RUNS)[::-1]
        for name in names:
            train_until(folder / name, urls, RUNS[name], steps=steps, until=until, quick=quick)


def train_until(
    output: Path, urls: list[str], staleness: int, *, steps: int, until: int, quick: bool
) -> None:
    """Train the demo in a process of its own until step ``until`` is finished and saved."""
    from moe_replay.grpo.loop import train
    from moe_replay.grpo.records import StepRecord
    from moe_replay.grpo.stopping import StopRequest
    from moe_replay.recipe.load import load_recipe
    from moe_replay.recipe.recipe import ProcessSpec
    from moe_replay.report import RunDirectory, build_reporter
    from moe_replay.testing.ranks import run_ranks

    keys = {
        "run.output_dir": output,
        "run.max_steps": steps,
        "rollout.engine": "vllm-server",
        "rollout.urls": json.dumps(urls),
        "rollout.max_staleness": staleness,
        # All groups of a step are asked for at once, as they fit on a GPU.
        "rollout.max_batch_size": 1024,
        "checkpoint.save_steps": 10 * steps,
        "checkpoint.export": "false",
    }
    if quick:
        keys |= {"batch.global_batch_size": 32, "data.eval_size": 8, "optimizer.warmup_steps": 1}
    recipe = load_recipe(RECIPE, [(key, str(value)) for key, value in keys.items()])

    def call() -> None:
        stop = StopRequest()
        with build_reporter(recipe, rank=0, run_directory=RunDirectory(output)) as reporter:
            said = reporter.step

            def step(record: StepRecord, completions: Any) -> None:
                said(record, completions)
                if record.step >= until < steps:
                    stop.ask("the other run's turn")

            reporter.step = step
            train(
                recipe,
                process=ProcessSpec(rank=0, world_size=1),
                reporter=reporter,
                stop=stop,
            )
            print(f"{output.name}: until step {until}", flush=True)

    run_ranks(call, 1, timeout_s=24 * 3600)


def figures_of(folder: Path, delay_s: float) -> dict[str, tuple[float, str]]:
    """Compare the two runs in ``folder``, and print what the figures are made of."""
    step_s, rewards = {}, {}
    for name in RUNS:
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        times = [
            sum(s for station, s in record["seconds"].items() if station not in NOT_OF_A_STEP)
            for record in records
        ]
        waited = [record["seconds"]["rollout"] for record in records]
        last = max(1, len(records) // 10)
        # The first steps load and warm up, on either side, and beside the last nothing is sampled.
        step_s[name] = statistics.median(times[2:-1])
        reward = statistics.fmean(record["reward"] for record in records[-last:])
        said = f"{name}: {len(records)} steps, median {step_s[name]:.2f} s, of which rollout "
        said += f"{statistics.median(waited[2:-1]):.2f} s; reward {records[0]['reward']:.3f} at "
        said += f"first, {reward:.3f} over the last {last}"
        evaluations = (folder / name / "eval.jsonl").read_text().splitlines()
        held_out = [json.loads(line)["eval/reward"] for line in evaluations]
        rewards[name] = held_out[-1]
        print(f"{said}; held out {held_out[0]:.3f} before, {held_out[-1]:.3f} after")
    print(f"answers of the servers were held back for {delay_s:g} s")
    return {
        "overlap.step_ratio": (step_s["overlapped"] / step_s["synchronous"], "ratio"),
        "overlap.reward_gap": (rewards["overlapped"] - rewards["synchronous"], "reward"),
    }


@contextmanager
def serving(model: Path, engine: str, folder: Path) -> Iterator[list[str]]:
    """Start two `moe-replay serve`, and yield their addresses when they answer."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--engine", engine, "--dtype", "bfloat16", "--max-batch-size", "128"]
    if engine == "vllm":
        options += ["--kv-cache-gib", "0.1"]
    started: list[subprocess.Popen[bytes]] = []
    urls = []
    with ExitStack() as logs:
        try:
            for number in range(2):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    port = probe.getsockname()[1]
                log = logs.enter_context((folder / f"server-{number}.log").open("wb"))
                command = [sys.executable, "-m", "moe_replay.cli.main", "serve", str(model)]
                command += ["--port", str(port), *options]
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
                urls.append(f"http://127.0.0.1:{port}")
            for process, url in zip(started, urls, strict=True):
                _wait_for(process, url)
            yield urls
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait()


def _wait_for(process: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/status", timeout=10):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    raise SystemExit(f"{url} does not answer; its log is in the folder of the runs (--output)")


@contextmanager
def delayed(url: str, delay_s: float) -> Iterator[str]:
    """Relay to the server at ``url``, holding back what it says to a generate call."""
    loop = asyncio.new_event_loop()
    ready, address = threading.Event(), []
    stopping = asyncio.Event()
    port = int(url.rpartition(":")[2])

    async def relay() -> None:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
            not_before = [0.0]
            with suppress(ConnectionError, asyncio.CancelledError):
                await asyncio.gather(
                    _pass_on(reader, server_writer, not_before, delay_s, is_call=True),
                    _pass_on(server_reader, writer, not_before, delay_s, is_call=False),
                )

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        address.append(server.sockets[0].getsockname()[1])
        ready.set()
        await stopping.wait()
        server.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(relay())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{address[0]}"
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join()


async def _pass_on(
    source: asyncio.StreamReader,
    target: asyncio.StreamWriter,
    not_before: list[float],
    delay_s: float,
    *,
    is_call: bool,
) -> None:
    """Pass bytes on; a call sets when its answer may pass, and an answer waits for that."""
    try:
        while piece := await source.read(1 << 16):
            if is_call and piece.startswith(b"POST /generate"):
                not_before[0] = time.monotonic() + delay_s
            elif not is_call:
                await asyncio.sleep(max(0.0, not_before[0] - time.monotonic()))
            target.write(piece)
            await target.drain()
    finally:
        target.close()


if __name__ == "__main__":
    raise SystemExit(main())
