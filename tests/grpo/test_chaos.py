"""A run over two real vLLM servers: one is killed and restarted, one damages answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_replay.recipe.recipe import Recipe

from ..support.faults import Faulty, Relay
from ..support.served import ServerProcess, listening
from .test_loop import run

pytestmark = [pytest.mark.ranks, pytest.mark.vllm, pytest.mark.slow]
NUM_STEPS = 10
TIMEOUT_S = 10.0


@contextmanager
def conducted(recipe: Recipe, actions: dict[int, Callable[[], None]]) -> Iterator[None]:
    """Do each action as soon as the run has reported so many steps."""
    over = threading.Event()
    left = dict(actions)

    def conduct() -> None:
        while left and not over.wait(0.1):
            metrics = recipe.run.output_dir / "metrics.jsonl"
            reported = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            for step in [step for step in left if step <= reported]:
                left.pop(step)()

    thread = threading.Thread(target=conduct)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not left, f"the run ended before {sorted(left)} steps were reported"


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
            run__max_steps=NUM_STEPS,
        )
        mortal.wait()
        honest.wait()
        with conducted(shaken, {2: lambda: mortal.stall(1.5 * TIMEOUT_S), 4: mortal.restart}):
            records = run(shaken)
    samples = (shaken.run.output_dir / "completions.jsonl").read_text().splitlines()
    assert len(records) == NUM_STEPS
    assert len(samples) == NUM_STEPS * shaken.batch.global_batch_size
    counted = {n: v for n, v in records[-1].items() if n.startswith("rollout/faults_")}
    # How many calls go to which server depends on how fast each is.
    assert sum(counted.values()) >= 10, counted
    # It was silent, then refused connections, then answered that it loads: how much of it a call
    # meets depends on how long the others take meanwhile.
    met = ("slow", "unreachable", "loading")
    assert any(counted[f"rollout/faults_{kind}"] for kind in met), counted
    assert counted["rollout/faults_corrupt"] and sum(liar.made.values()) >= 5, counted
    for record in records:
        # Equal numerics on both sides, so routes that belonged to other tokens would not agree
        # everywhere.
        assert record["replay/agreement"] == record["replay/coverage"] == 1.0
        assert record["rollout_correction/k3_kl"] < 1e-9
