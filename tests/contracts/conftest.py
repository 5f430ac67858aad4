"""Every engine that this machine can run, as an EngineCase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moe_replay.checkpoint.facts import ModelFacts, read_facts
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.servers.engine import ServerEngine
from moe_replay.engines.servers.sglang import SglangCalls
from moe_replay.engines.types import Engine, RolloutGroup
from moe_replay.routing import RoutedModel
from moe_replay.testing.tiny_models import VOCAB_SIZE, write_tiny_checkpoint
from moe_replay.transformers import record_routes

from ..support.served import listening, served
from ..support.sglang_like import SglangLike
from .engine_contract import SAMPLING, EngineCase, Weights, mixed_requests

SEEDS = (0, 1)
FAKE_FACTS = ModelFacts(
    vocab_size=32,
    max_context_length=4096,
    eos_ids=(1,),
    routed=RoutedModel(moe_layers=(0, 2), num_decoder_layers=3, num_experts=8, topk=2),
    weight_shapes={"model.embed.weight": (4, 2), "model.layers.0.mlp.gate.weight": (8, 2)},
    tied_names=frozenset(),
)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return two checkpoints of one shape by seed.

    Layer 1 is dense, so that a layer's number is not its place among the MoE layers.
    """
    root = tmp_path_factory.mktemp("engines")
    return {
        seed: write_tiny_checkpoint(
            root / str(seed), seed=seed, num_hidden_layers=3, mlp_only_layers=[1]
        )
        for seed in SEEDS
    }


def _fake_case() -> EngineCase:
    shapes = FAKE_FACTS.weight_shapes

    def make() -> FakeEngine:
        return FakeEngine(weight_shapes=shapes, moe_layers=FAKE_FACTS.routed.moe_layers)

    def weights(seed: int) -> Weights:
        return [(name, torch.full(shape, float(seed))) for name, shape in shapes.items()]

    def forced(token_ids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        engine = make()
        engine.load_weights(weights(seed), policy_version=seed)
        return engine.next_logits(token_ids), engine.routes_of(token_ids)

    def make_at(seed: int) -> FakeEngine:
        engine = make()
        engine.load_weights(weights(seed), policy_version=seed)
        return engine

    return EngineCase(
        name="fake",
        make=make,
        make_at=make_at,
        weights=weights,
        forced=forced,
        vocab_size=32,
        exact=True,
    )


def _model_case(name: str, dtype: str, checkpoints: dict[int, Path]) -> EngineCase:
    from transformers import AutoModelForCausalLM

    models = {
        seed: AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        for seed, path in checkpoints.items()
    }

    def make_at(seed: int) -> Engine:
        if name == "vllm":
            from moe_replay.engines.vllm.engine import VllmEngine

            # Prompts longer than 32 tokens are run in chunks, and cached in blocks of 32.
            return VllmEngine(
                checkpoints[seed],
                dtype=dtype,
                max_batch_size=16,
                max_tokens_per_forward=32,
                kv_cache_gib=0.05,
            )
        return EmbeddedEngine(checkpoints[seed], dtype=dtype, max_batch_size=16)

    def weights(seed: int) -> Weights:
        return list(load_file(checkpoints[seed] / "model.safetensors").items())

    def forced(token_ids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad(), record_routes(models[seed]) as recorder:
            logits = models[seed](torch.from_numpy(token_ids).long()[None]).logits[0]
        return logits.float().numpy(), recorder.take().numpy()

    return EngineCase(
        name=f"{name}-{dtype}",
        make=lambda: make_at(0),
        make_at=make_at,
        weights=weights,
        forced=forced,
        vocab_size=VOCAB_SIZE,
        exact=dtype == "float32",
    )


class Served(ServerEngine):
    """An engine behind a server of this process, which ends with it.

    ``serve`` is the scope that serves it.
    """

    def __init__(
        self,
        engine: Engine,
        facts: ModelFacts,
        serve: Callable[[Engine], AbstractContextManager[str]],
        **options: Any,
    ) -> None:
        self._opened = ExitStack()
        self._opened.callback(engine.close)
        url = self._opened.enter_context(serve(engine))
        super().__init__(
            [url], facts=facts, run="contract", dtype="float32", record_routes=True, **options
        )

    def close(self) -> None:
        super().close()
        self._opened.close()


def _sglang_served(engine: Engine, *, num_layers: int) -> AbstractContextManager[str]:
    return listening(SglangLike(engine, num_decoder_layers=num_layers).application())


ENGINES = [
    "fake",
    "embedded-float32",
    "embedded-bfloat16",
    pytest.param("vllm-float32", marks=pytest.mark.vllm),
    pytest.param("vllm-bfloat16", marks=pytest.mark.vllm),
    pytest.param("served-fake", marks=pytest.mark.vllm),
    pytest.param("served-vllm-float32", marks=pytest.mark.vllm),
    pytest.param("sglang-fake", marks=pytest.mark.vllm),
    pytest.param("sglang-embedded-float32", marks=pytest.mark.vllm),
]


# Closed with the module: vLLM holds the default process group of a process that has no trainer.
@pytest.fixture(scope="module", params=ENGINES)
def case(
    request: pytest.FixtureRequest,
    checkpoints: dict[int, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> EngineCase:
    """Return each engine in turn."""
    name, _, dtype = request.param.removeprefix("served-").removeprefix("sglang-").partition("-")
    if name == "vllm":
        request.getfixturevalue("vllm_imported")
    case = _fake_case() if name == "fake" else _model_case(name, dtype, checkpoints)
    if not request.param.startswith(("served-", "sglang-")):
        return case

    def make_at(seed: int) -> Engine:
        facts = FAKE_FACTS if name == "fake" else read_facts(checkpoints[seed])
        engine = case.make_at(seed)
        if request.param.startswith("served-"):
            return Served(engine, facts, served)
        return Served(
            engine,
            facts,
            partial(_sglang_served, num_layers=facts.routed.num_decoder_layers),
            connect=partial(SglangCalls, facts=facts),
            weights_dir=tmp_path_factory.mktemp("weights"),
        )

    return replace(case, name=request.param, make_at=make_at, make=lambda: make_at(0))


@pytest.fixture(scope="module")
def engine(case: EngineCase) -> Iterator[Engine]:
    """Return one engine for all tests that leave it as it is."""
    engine = case.make()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def groups(case: EngineCase, engine: Engine) -> list[RolloutGroup]:
    """Return what the engine makes of `mixed_requests` under `SAMPLING`."""
    return engine.generate(mixed_requests(case), SAMPLING)


@pytest.fixture
def fresh_engine(case: EngineCase) -> Iterator[Engine]:
    """Return an engine that a test may push to and close."""
    engine = case.make()
    yield engine
    engine.close()
