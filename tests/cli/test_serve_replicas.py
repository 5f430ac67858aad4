"""`moe-replay serve --data-parallel-size 2`: both replicas sample and load pushes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from moe_replay.checkpoint.facts import checkpoint_tensors, read_facts
from moe_replay.cli.stages import START_AGAIN
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.servers.engine import ServerEngine
from moe_replay.engines.types import Request, RolloutGroup, SamplingParams
from moe_replay.errors import EngineError
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from ..support.served import ServerProcess

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SAMPLING = SamplingParams(max_completion_length=12, temperature=0.9, seed=2)
# The first has two completions, which begin together, so on two replicas; the others go to the one
# that samples the fewest.
REQUESTS = [
    Request(
        request_id=number,
        prompt_ids=np.arange(5, 15, dtype=np.int32),
        num_generations=1 if number else 2,
    )
    for number in range(4)
]
# For what hangs.
LIMIT_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server of two replicas of the first of two models."""

    server: ServerProcess
    models: tuple[Path, Path]
    expected: tuple[list[RolloutGroup], list[RolloutGroup]]
    log: Path

    @contextmanager
    def engine(self, run: str) -> Iterator[ServerEngine]:
        engine = ServerEngine(
            [self.server.url],
            facts=read_facts(self.models[0]),
            run=run,
            dtype="float32",
            record_routes=True,
        )
        try:
            yield engine
        finally:
            engine.close()

    def cores(self) -> list[psutil.Process]:
        """Return vLLM's core of each replica, whose one worker runs in it."""
        return [process for process in self.started() if "EngineCore" in process.name()]

    def started(self) -> list[psutil.Process]:
        """Return every process that the server has started."""
        return psutil.Process(self.server.pid).children(recursive=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("replicas")
    first, second = (
        write_tiny_checkpoint(folder / str(seed), seed=seed, num_hidden_layers=2) for seed in (0, 1)
    )
    one, other = (
        EmbeddedEngine(model, dtype="float32").generate(REQUESTS, SAMPLING)
        for model in (first, second)
    )
    options = ["--dtype", "float32", "--kv-cache-gib", "0.05", "--data-parallel-size", "2"]
    options += ["--max-batch-size", "16", "--weights-dir", str(folder)]
    log = folder / "log"
    with ServerProcess(first, *options, log=log) as server:
        server.wait()
        yield Served(server=server, models=(first, second), expected=(one, other), log=log)


@contextmanager
def held(processes: list[psutil.Process]) -> Iterator[None]:
    """Keep processes from doing anything while the scope is open."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def sampled_by_each(served: Served, engine: ServerEngine) -> list[RolloutGroup]:
    """Return the completions of all requests, of which each replica sampled at least one.

    One replica is held with one of the first two completions, while the other is done with its own,
    and with all requests that come after. Were both of one replica, they would be over before
    those.
    """
    lengths = {len(c.token_ids) for groups in served.expected for c in groups[0].completions}
    core = served.cores()[0]
    with ThreadPoolExecutor(1) as thread:
        with held([core]):
            both = thread.submit(engine.generate, REQUESTS[:1], SAMPLING)
            while engine.progress.num_tokens not in lengths:
                assert not both.done()
            later = [engine.generate([request], SAMPLING)[0] for request in REQUESTS[1:]]
            assert not both.done()
        return both.result() + later


def assert_same(groups: list[RolloutGroup], expected: list[RolloutGroup]) -> None:
    for ours, theirs in zip(groups, expected, strict=True):
        for mine, other in zip(ours.completions, theirs.completions, strict=True):
            assert mine.token_ids.tolist() == other.token_ids.tolist()
            assert np.abs(mine.rollout_logprobs - other.rollout_logprobs).max() < 1e-4
            ids, others = (np.sort(c.trace.expert_ids[:-1]) for c in (mine, other))
            assert (ids == others).all()


def test_both_replicas_sample_and_take_a_push(served):
    assert len(served.cores()) == 2
    with served.engine("pushes") as engine:
        assert_same(sampled_by_each(served, engine), served.expected[0])
        engine.load_weights(checkpoint_tensors(served.models[1]), policy_version=1)
        assert_same(sampled_by_each(served, engine), served.expected[1])
        assert engine.faults == dict.fromkeys(engine.faults, 0)
    # Control: the two models can be told apart by any of these requests.
    for ours, theirs in zip(*served.expected, strict=True):
        assert ours.completions[0].token_ids.tolist() != theirs.completions[0].token_ids.tolist()


def assert_ends(served: Served, victim: psutil.Process) -> None:
    """Kill (-9) a process of a server while all its replicas sample, and see the server end."""
    started = served.started()
    # So many that they last, whatever tokens come.
    many = [replace(request, num_generations=256) for request in REQUESTS]
    long = SamplingParams(max_completion_length=400, seed=2)
    with served.engine("mortal") as engine, ThreadPoolExecutor(1) as thread:
        engine.load_weights(checkpoint_tensors(served.models[0]), policy_version=1)
        work = thread.submit(engine.generate, many, long)
        while not engine.progress.num_tokens:
            assert not work.done()
        victim.send_signal(signal.SIGKILL)
        with pytest.raises(EngineError, match=r"has lost its engine: .* replica [01] of vLLM"):
            work.result()
    assert served.server.ended() == START_AGAIN
    assert psutil.wait_procs(started, timeout=LIMIT_S)[1] == []
    assert "moe-replay: the server has lost its engine" in served.log.read_text()


def test_e25_a_replica_that_is_killed_ends_the_server_which_says_so(served):
    """The last test of this server: it leaves none."""
    assert_ends(served, served.cores()[0])


def test_e25_a_worker_that_is_killed_ends_the_server_which_says_so(served, tmp_path):
    log = tmp_path / "log"
    options = ["--dtype", "float32", "--kv-cache-gib", "0.05", "--tensor-parallel-size", "2"]
    with ServerProcess(served.models[0], *options, log=log) as server:
        server.wait()
        of_two_workers = replace(served, server=server, log=log)
        worker, _ = (p for p in of_two_workers.started() if "Worker" in p.name())
        assert_ends(of_two_workers, worker)
