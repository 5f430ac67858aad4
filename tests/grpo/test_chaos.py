"""A run over two real vLLM servers: one is killed and restarted, one damages answers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_replay.engines.types import Request, RolloutGroup, SamplingParams
from moe_replay.grpo.engines import recipe_engine
from moe_replay.recipe.recipe import Recipe

from ..support.faults import Faulty, Relay
from ..support.rounds import asking_all
from ..support.served import ServerProcess, listening
from .test_loop import run

pytestmark = [pytest.mark.ranks, pytest.mark.vllm, pytest.mark.slow]
NUM_STEPS = 10
TIMEOUT_S = 10.0
SILENT_IN, KILLED_IN = 3, 5


class Shaken:
    """The engine of a recipe, every server of which is asked in every round.

    One of them is silent for one round and killed before another.
    """

    def __init__(self, recipe: Recipe, device: torch.device, pid: int) -> None:
        self._engine, self._pid = asking_all(recipe_engine(recipe, device)), pid
        self._num_rounds = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        self._num_rounds += 1
        if self._num_rounds == KILLED_IN:
            os.kill(self._pid, signal.SIGKILL)
        if self._num_rounds != SILENT_IN:
            return self._engine.generate(requests, sampling)
        os.kill(self._pid, signal.SIGSTOP)
        try:
            return self._engine.generate(requests, sampling)
        finally:
            os.kill(self._pid, signal.SIGCONT)


@contextmanager
def restarted_once(server: ServerProcess) -> Iterator[None]:
    """Start a server again when it has ended."""

    def restart() -> None:
        server.ended()
        server.restart()

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        yield
    finally:
        # Where the run did not come so far.
        server.kill()
        thread.join()


def test_a_run_survives_vllm_servers_that_stall_die_and_lie(
    recipe: Callable[..., Recipe], workspace: Path
) -> None:
    options = ["--dtype", "float32", "--kv-cache-gib", "0.05", "--max-batch-size", "16"]
    with (
        ServerProcess(workspace / "model", *options) as mortal,
        ServerProcess(workspace / "model", *options) as honest,
        listening(
            liar := Faulty(Relay(honest.url), ["flip", "cut", "fail"], share=0.5, seed=2)
        ) as liar_url,
    ):
        shaken = recipe(
            rollout__engine="vllm-server",
            rollout__urls=f'["{mortal.url}", "{liar_url}"]',
            rollout__dtype="float32",
            rollout__timeout_s=TIMEOUT_S,
            # Two requests at once of four, so that neither server takes all of them.
            rollout__max_batch_size=8,
            run__max_steps=NUM_STEPS,
        )
        mortal.wait()
        honest.wait()
        pid = mortal.pid
        with restarted_once(mortal):
            records = run(shaken, make_engine=lambda r, device: Shaken(r, device, pid))
    samples = (shaken.run.output_dir / "completions.jsonl").read_text().splitlines()
    assert len(records) == NUM_STEPS
    assert len(samples) == NUM_STEPS * shaken.batch.global_batch_size
    counted = {
        n.removeprefix("rollout/faults_"): v
        for n, v in records[-1].items()
        if n.startswith("rollout/faults_")
    }
    # The liar is asked once a step at least, and answers every second call wrongly.
    assert sum(liar.made.values()) >= NUM_STEPS // 2, liar.made
    assert sum(counted.values()) >= sum(liar.made.values()) + 2, counted
    assert counted["corrupt"] and counted["failed"], counted
    # Once it was silent, and once it refused connections.
    assert counted["slow"] and counted["unreachable"], counted
    for record in records:
        # Equal numerics on both sides, so routes that belonged to other tokens would not agree
        # everywhere.
        assert record["replay/agreement"] == record["replay/coverage"] == 1.0
        assert record["rollout_correction/k3_kl"] < 1e-9
