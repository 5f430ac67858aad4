"""vLLM's own server with all that replay needs, what it is asked for, and what must come back."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_replay.checkpoint.facts import ModelFacts, read_facts
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.servers.engine import ServerEngine
from moe_replay.engines.servers.vllm import VllmCalls, connect_vllm
from moe_replay.engines.servers.vllm_wire import PROCESSOR
from moe_replay.engines.types import Request, RolloutGroup, SamplingParams
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from ...support.served import ServerProcess

# An answer is small here, and a machine that does a dozen other things may be silent for long.
LIMITS = {"token": None, "timeout_s": 300.0, "max_answer_bytes": 1 << 20}
REQUESTS = [
    Request(request_id=number, prompt_ids=np.arange(5, 45, dtype=np.int32), num_generations=3)
    for number in range(3)
]
SAMPLING = SamplingParams(max_completion_length=12, temperature=0.9, top_k=20, seed=2)


def plain_vllm(model: Path) -> ServerProcess:
    """Start vLLM's own server with everything that replay needs; it does not answer yet."""
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    options = ["--host", "127.0.0.1", "--dtype", "float32", "--skip-tokenizer-init"]
    options += ["--enforce-eager"]
    options += ["--enable-return-routed-experts", "--enable-scale-out", "--no-async-scheduling"]
    options += ["--logits-processors", PROCESSOR, "--logprobs-mode", "processed_logits"]
    options += ["--block-size", "32", "--max-num-seqs", "16"]
    options += ["--kv-cache-memory-bytes", "50000000"]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    return ServerProcess(model, *options, program=program, environment=environment)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Two checkpoints that differ in every weight, and what is sampled from each."""

    paths: tuple[Path, Path]
    facts: ModelFacts
    folder: Path
    expected: tuple[list[RolloutGroup], list[RolloutGroup]]

    @contextmanager
    def engine(self, urls: Sequence[str], run: str, **options: Any) -> Iterator[ServerEngine]:
        """Return an engine of a run over plain servers."""
        engine = ServerEngine(
            list(urls),
            facts=self.facts,
            run=run,
            dtype="float32",
            record_routes=True,
            connect=partial(connect_vllm, facts=self.facts),
            weights_dir=self.folder,
            **options,
        )
        try:
            yield engine
        finally:
            engine.close()


def write_models(factory: pytest.TempPathFactory, requests: list[Request]) -> Models:
    """Write both, and sample the requests from each in this process."""
    root = factory.mktemp("plain")
    first, second = (
        write_tiny_checkpoint(root / str(seed), seed=seed, num_hidden_layers=3, mlp_only_layers=[1])
        for seed in (0, 1)
    )
    one, other = (
        EmbeddedEngine(model, dtype="float32").generate(requests, SAMPLING)
        for model in (first, second)
    )
    return Models(
        paths=(first, second),
        facts=read_facts(first),
        folder=factory.mktemp("weights"),
        expected=(one, other),
    )


def assert_same(groups: list[RolloutGroup], right: list[RolloutGroup]) -> None:
    for ours, theirs in zip(groups, right, strict=True):
        for a, b in zip(ours.completions, theirs.completions, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            assert np.abs(a.rollout_logprobs - b.rollout_logprobs).max() < 1e-5
            rows = a.trace.valid
            assert (rows == b.trace.valid).all()
            same = np.sort(a.trace.expert_ids[rows]) == np.sort(b.trace.expert_ids[rows])
            assert same.all()


@contextmanager
def onlooker(url: str, facts: ModelFacts) -> Iterator[VllmCalls]:
    """Return calls of its own to a server, for looking at it while an engine uses it."""
    calls = VllmCalls(url, facts=facts, **LIMITS)
    try:
        yield calls
    finally:
        calls.close()


def metric(calls: VllmCalls, *names: str) -> float:
    """Return the sum of some of vLLM's metrics, over all their labels."""
    starts = tuple(f"vllm:{name}{{" for name in names)
    lines = calls.call("GET", "/metrics").decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(starts))


def num_running(calls: VllmCalls) -> float:
    """Return how many completions a server samples, or has waiting."""
    return metric(calls, "num_requests_running", "num_requests_waiting")
