"""Two plain vLLM servers behind one engine: both are tried, sample, take each push; one may die."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from moe_replay.checkpoint.facts import checkpoint_tensors
from moe_replay.engines.servers.engine import ServerEngine
from moe_replay.engines.servers.faults import Fault
from moe_replay.engines.types import Request, RolloutGroup, SamplingParams
from moe_replay.errors import EngineError

from ...support.rounds import asking_all
from ...support.served import ServerProcess
from .plain_vllm_case import (
    SAMPLING,
    Models,
    assert_same,
    metric,
    num_running,
    onlooker,
    plain_vllm,
    write_models,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

REQUESTS = [
    Request(
        request_id=number,
        prompt_ids=np.arange(5 + number, 35, dtype=np.int32),
        num_generations=2,
    )
    for number in range(16)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two real servers of the first of two models."""

    servers: tuple[ServerProcess, ServerProcess]
    models: Models

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    @contextmanager
    def engine(self, run: str, **options: Any) -> Iterator[ServerEngine]:
        """Return an engine of both, which take part in every round."""
        with self.models.engine(self.urls, run, calls_per_server=2, **options) as engine:
            yield asking_all(engine)

    def num_sampled(self) -> list[float]:
        """Return how many completions each of them has sampled so far."""
        counts = []
        for url in self.urls:
            with onlooker(url, self.models.facts) as calls:
                counts.append(metric(calls, "request_success_total"))
        return counts


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    models = write_models(tmp_path_factory, REQUESTS)
    with ExitStack() as stack:
        first, second = (stack.enter_context(plain_vllm(models.paths[0])) for _ in range(2))
        for server in (first, second):
            server.wait()
        yield Pair(servers=(first, second), models=models)


def servers_of(groups: list[RolloutGroup]) -> Counter[str | None]:
    return Counter(c.server for group in groups for c in group.completions)


def test_e8_the_start_pushes_to_each_replica_and_samples_once_on_each(pair):
    before = pair.num_sampled()
    with pair.engine("start") as engine:
        made = pair.num_sampled()
        engine.restore(pair.models.paths[1])
        restored = pair.num_sampled()
        groups = engine.generate(REQUESTS, SAMPLING)
    assert np.diff([before, made, restored], axis=0).tolist() == [[1, 1], [1, 1]]
    # Both were started with the first model.
    assert servers_of(groups).keys() == set(pair.urls)
    assert_same(groups, pair.models.expected[1])
    assert list(pair.models.folder.iterdir()) == []


def test_replicas_share_the_requests_and_both_sample_by_each_push(pair):
    with pair.engine("pushes") as engine:
        engine.restore(pair.models.paths[0])
        seen = [engine.generate(REQUESTS, SAMPLING)]
        for version in (1, 2):
            weights = checkpoint_tensors(pair.models.paths[version % 2])
            engine.load_weights(weights, policy_version=version)
            seen.append(engine.generate(REQUESTS, SAMPLING))
        assert engine.faults == dict.fromkeys(engine.faults, 0)
    for version, groups in enumerate(seen):
        # Every completion is held to the model pushed last, so none of either server is by another.
        assert servers_of(groups).keys() == set(pair.urls)
        assert_same(groups, pair.models.expected[version % 2])
        assert {c.policy_version for group in groups for c in group.completions} == {version}
    # Control: the two models can be told apart by any of these requests.
    for ours, theirs in zip(*pair.models.expected, strict=True):
        assert ours.completions[0].token_ids.tolist() != theirs.completions[0].token_ids.tolist()


def test_e8_a_replica_that_another_run_pushed_to_is_stale_and_the_other_does_its_work(pair):
    with pair.engine("ours") as engine, pair.models.engine(pair.urls[1:], "theirs") as other:
        engine.restore(pair.models.paths[0])
        other.restore(pair.models.paths[1])
        groups = engine.generate(REQUESTS, SAMPLING)
        assert engine.faults[Fault.STALE] >= 1
    assert servers_of(groups).keys() == {pair.urls[0]}
    assert_same(groups, pair.models.expected[0])


def test_what_a_killed_replica_was_asked_for_is_sampled_by_the_other(pair):
    """kill -9 while it samples: nothing of the round is lost, and pushes go on to the one left."""
    # Nothing stops these before their end, so that they run when the server is killed.
    endless = replace(pair.models, facts=replace(pair.models.facts, eos_ids=()))
    long, requests = SamplingParams(max_completion_length=400, seed=4), REQUESTS[:8]
    living, dying = pair.servers
    with (
        endless.engine(pair.urls, "mortal", calls_per_server=4) as engine,
        onlooker(dying.url, endless.facts) as calls,
        ThreadPoolExecutor(1) as thread,
    ):
        engine.restore(endless.paths[0])
        work = thread.submit(asking_all(engine).generate, requests, long)
        while not num_running(calls):
            assert not work.done()
        dying.kill()
        groups = work.result()
        # What it did not finish, the other sampled as it would have.
        again = engine.generate(requests, long)
        assert servers_of(again).keys() == {living.url}
        assert engine.faults[Fault.UNREACHABLE] >= 1
        assert engine.faults[Fault.STALE] == engine.faults[Fault.CORRUPT] == 0
        assert_same(groups, again)
        engine.load_weights(checkpoint_tensors(endless.paths[1]), policy_version=1)
        pushed = engine.generate(requests[:2], long)
        assert servers_of(pushed).keys() == {living.url}
    assert {len(c.token_ids) for group in groups for c in group.completions} == {400}
    assert {c.policy_version for group in pushed for c in group.completions} == {1}
    for ours, theirs in zip(pushed, groups[:2], strict=True):
        assert ours.completions[0].token_ids.tolist() != theirs.completions[0].token_ids.tolist()


def test_a_start_with_a_dead_replica_and_a_round_without_a_living_one_name_them(pair):
    """The last of these tests: no server is left after it."""
    living, dead = pair.servers
    dead.kill()
    with (
        pytest.raises(EngineError, match=f"{dead.url}.*no connection"),
        pair.engine("late"),
    ):
        pass
    with pair.models.engine([living.url], "last", max_attempts=2) as engine:
        engine.restore(pair.models.paths[0])
        living.kill()
        with pytest.raises(EngineError, match=rf"failed 2 times.*{living.url}.*can be resumed"):
            engine.generate(REQUESTS, SAMPLING)
        with pytest.raises(EngineError, match=f"no server took policy version 1: {living.url}"):
            engine.load_weights(checkpoint_tensors(pair.models.paths[1]), policy_version=1)
