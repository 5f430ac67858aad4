"""Several vLLM engines behind one, and their processes: none stays, however the server ends."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.serve.engine import PushRefused
from moe_replay.engines.types import Completion, SamplingParams
from moe_replay.errors import EngineError

from .serving_case import SAMPLING, Served, faulty_processes, gap, prompts, start, write_checkpoints

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]

# Far above what ending takes: a limit for what hangs.
LIMIT_S = 300
# vLLM leaves the ZeroMQ context of a start that failed to the garbage collector.
LEAVES_CONTEXT = pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning")

SERVER = """
import asyncio, sys
from moe_replay.engines.vllm.serving import VllmServing

async def serve():
    options = {"max_batch_size": 4, "kv_cache_gib": 0.05, "tensor_parallel_size": 2}
    engine = VllmServing(sys.argv[1], dtype="float32", **options)
    await engine.start()
    print("started", flush=True)
    await asyncio.Event().wait()

if __name__ == "__main__":
    asyncio.run(serve())
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    # Tied, so that a push must also reach the head, which no tensor of it names.
    return write_checkpoints(tmp_path_factory.mktemp("replicas"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def pair(vllm_imported, checkpoints, tmp_path_factory) -> Iterator[Served]:
    """Two replicas of one worker each."""
    folder = tmp_path_factory.mktemp("pushes")
    with faulty_processes(), asyncio.Runner() as runner:
        pair = start(runner, checkpoints["a"], folder, replicas=2)
        yield pair
        runner.run(pair.engine.close())


def cores() -> list[psutil.Process]:
    """Return vLLM's cores that this process has started, with their workers."""
    found = []
    for child in multiprocessing.active_children():
        if child.name.startswith("EngineCore"):
            core = psutil.Process(child.pid)
            found += [core, *core.children(recursive=True)]
    return found


@pytest.fixture
def dropped_contexts() -> Iterator[None]:
    """Collect what vLLM leaves of a start that failed, before another test is blamed for it."""
    yield
    gc.collect()


def test_replicas_share_the_requests_and_sample_what_the_embedded_engine_does(pair, checkpoints):
    expected = EmbeddedEngine(checkpoints["a"], dtype="float32").generate(prompts(6), SAMPLING)
    assert gap(pair.sample(prompts(6)), expected) < 1e-5
    # Each got every second of the twelve.
    assert [replica._next_id for replica in pair.engine._replicas] == [6, 6]


def test_e24_a_push_that_one_of_two_replicas_fails_goes_back_in_both(pair, checkpoints):
    weights = load_file(checkpoints["b"] / "model.safetensors")
    before = pair.sample(prompts(6))
    pair.run(pair.engine._replicas[1].workers("replay_plant", 0, 20, 1))
    with pytest.raises(PushRefused, match=r"replica 1 of vLLM.*planted"):
        pair.push(weights)
    assert gap(pair.sample(prompts(6)), before) == 0
    pair.push(weights)
    expected = EmbeddedEngine(checkpoints["b"], dtype="float32").generate(prompts(6), SAMPLING)
    assert gap(pair.sample(prompts(6)), expected) < 1e-5


def test_e25_one_replica_that_dies_ends_its_completions_and_is_never_asked_again(pair):
    """The last with this engine.

    A dead replica samples nothing: it would get every request as the one with fewest.
    """
    processes = cores()
    assert len(processes) >= 2
    sampling = SamplingParams(max_completion_length=400, seed=2)
    healthy, dying = pair.engine._replicas

    async def kill_one():
        losing = asyncio.create_task(pair.engine.lost())
        begun = [asyncio.Event(), asyncio.Event()]
        tasks = [
            asyncio.create_task(pair.one(prompts(1)[0], n, sampling, lambda _, n=n: begun[n].set()))
            for n in range(2)
        ]
        await asyncio.gather(*(event.wait() for event in begun))
        assert (healthy.num_running, dying.num_running) == (1, 1)
        assert not losing.done()
        dying._cores[0].kill()
        return await asyncio.gather(*tasks, losing, return_exceptions=True)

    lived, died, lost = pair.run(kill_one())
    assert isinstance(lived, Completion)
    assert "processes of replica 1 of vLLM have ended" in str(died)
    assert lost.startswith("the server has lost its engine: the processes of replica 1 of vLLM")
    with pytest.raises(EngineError, match="processes of replica 1 of vLLM have ended"):
        pair.sample(prompts(1))
    pair.run(pair.engine.close())
    assert cores() == []
    assert psutil.wait_procs(processes, timeout=LIMIT_S)[1] == []


@LEAVES_CONTEXT
def test_e25_a_start_that_one_replica_fails_leaves_no_process(
    checkpoints, tmp_path, monkeypatch, dropped_contexts
):
    from moe_replay.engines.vllm.serving import VllmServing

    config_of = VllmServing._config

    def planted(engine, replica):
        config = config_of(engine, replica)
        if replica == 1:
            config.parallel_config.distributed_executor_backend = "planted"
        return config

    monkeypatch.setattr(VllmServing, "_config", planted)
    with (
        faulty_processes(),
        asyncio.Runner() as runner,
        pytest.raises(EngineError, match=r"did not start replica 1"),
    ):
        start(runner, checkpoints["a"], tmp_path, replicas=2)
    assert cores() == []


@LEAVES_CONTEXT
def test_e25_a_start_that_is_cancelled_leaves_no_process(checkpoints, dropped_contexts):
    from moe_replay.engines.vllm.serving import VllmServing

    engine = VllmServing(
        checkpoints["a"], dtype="float32", max_batch_size=4, kv_cache_gib=0.05, replicas=1
    )

    async def cancelled():
        task = asyncio.create_task(engine.start())
        while not (begun := cores()):
            await asyncio.sleep(0.01)
        task.cancel()
        return begun, (await asyncio.gather(task, return_exceptions=True))[0]

    with faulty_processes(), asyncio.Runner() as runner:
        begun, left = runner.run(cancelled())
    assert isinstance(left, asyncio.CancelledError)
    assert cores() == []
    assert psutil.wait_procs(begun, timeout=LIMIT_S)[1] == []


def test_e25_a_server_that_is_killed_leaves_no_process(checkpoints, tmp_path):
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    server = subprocess.Popen(
        [sys.executable, str(script), str(checkpoints["a"])],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": ":".join(sys.path)},
        start_new_session=True,
    )
    started: list[psutil.Process] = []
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "started\n"
        started = psutil.Process(server.pid).children(recursive=True)
        # The core and its workers, at least.
        assert len(started) >= 3
        server.kill()
        _, left = psutil.wait_procs(started, timeout=LIMIT_S)
        assert left == []
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        for process in started:
            if process.is_running():
                process.kill()
