"""A weight push into vLLM that breaks off at any point, and what comes after it.

`test_ranks` has several ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Engine, Request, RolloutGroup, SamplingParams
from moe_replay.errors import EngineError
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_imported")]
SAMPLING = SamplingParams(max_completion_length=16, temperature=0.8, seed=5)
REFUSES = "the last weight push failed half-way"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pushes")
    return {
        name: write_tiny_checkpoint(root / name, seed=seed, num_hidden_layers=3)
        for seed, name in enumerate("ab")
    }


@pytest.fixture(scope="module")
def engine(vllm_imported: None, checkpoints: dict[str, Path]) -> Iterator[Engine]:
    from moe_replay.engines.vllm.engine import VllmEngine

    engine = VllmEngine(checkpoints["b"], dtype="float32", max_batch_size=16, kv_cache_gib=0.05)
    yield engine
    engine.close()


def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            request_id=number,
            prompt_ids=rng.integers(4, 100, 40).astype(np.int32),
            num_generations=2,
        )
        for number in range(3)
    ]


def num_right(groups: list[RolloutGroup], checkpoint: Path) -> tuple[int, int]:
    """Return how many completions are a checkpoint's, and how many there are.

    Compared are tokens, log-probabilities and routes.
    """
    expected = EmbeddedEngine(checkpoint, dtype="float32").generate(requests(), SAMPLING)
    right = []
    for group, other in zip(groups, expected, strict=True):
        for mine, theirs in zip(group.completions, other.completions, strict=True):
            right.append(
                mine.token_ids.tolist() == theirs.token_ids.tolist()
                and np.abs(mine.rollout_logprobs - theirs.rollout_logprobs).max() < 1e-4
                and (np.sort(mine.trace.expert_ids) == np.sort(theirs.trace.expert_ids)).all()
            )
    return sum(right), len(right)


def breaking_off(path: Path, at: float, error: BaseException) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the first part of a checkpoint's tensors, then raise."""
    tensors = list(load_file(path / "model.safetensors").items())
    yield from tensors[: int(at * len(tensors))]
    raise error


def whole(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    yield from load_file(path / "model.safetensors").items()


@pytest.mark.parametrize("error", [RuntimeError("the disk is full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", [0.0, 0.03, 0.5, 0.97])
def test_e24_a_push_that_breaks_off_ruins_no_later_one(engine, checkpoints, at, error):
    version = engine.policy_version
    with pytest.raises((EngineError, KeyboardInterrupt)):
        engine.load_weights(breaking_off(checkpoints["b"], at, error), policy_version=version + 1)
    assert engine.policy_version == version
    with pytest.raises(EngineError, match=REFUSES):
        engine.generate(requests(), SAMPLING)
    engine.load_weights(whole(checkpoints["a"]), policy_version=version + 1)
    assert num_right(engine.generate(requests(), SAMPLING), checkpoints["a"]) == (6, 6)


def test_e24_without_finishing_a_push_that_broke_off_the_next_one_is_ruined(
    engine, checkpoints, monkeypatch
):
    """The control: what `_finish_reload` is for."""
    version = engine.policy_version
    half = breaking_off(checkpoints["b"], 0.5, RuntimeError("no"))
    with monkeypatch.context() as patched:
        patched.setattr(type(engine), "_finish_reload", lambda self: None)
        with pytest.raises(EngineError):
            engine.load_weights(half, policy_version=version + 1)
        engine.load_weights(whole(checkpoints["a"]), policy_version=version + 1)
        right, count = num_right(engine.generate(requests(), SAMPLING), checkpoints["a"])
        assert right < count
    engine.load_weights(whole(checkpoints["a"]), policy_version=version + 1)
    assert num_right(engine.generate(requests(), SAMPLING), checkpoints["a"]) == (6, 6)


def test_e24_a_push_whose_end_fails_too_is_finished_before_the_next(
    engine, checkpoints, monkeypatch
):
    from moe_replay.engines.vllm import engine as vllm_engine

    version = engine.policy_version

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("cannot finish")

    with monkeypatch.context() as patched:
        patched.setattr(vllm_engine, "_finish", failing)
        half = breaking_off(checkpoints["b"], 0.5, RuntimeError("no"))
        for weights in (half, whole(checkpoints["a"])):
            with pytest.raises(RuntimeError, match="cannot finish"):
                engine.load_weights(weights, policy_version=version + 1)
    with pytest.raises(EngineError, match=REFUSES):
        engine.generate(requests(), SAMPLING)
    engine.load_weights(whole(checkpoints["a"]), policy_version=version + 1)
    assert num_right(engine.generate(requests(), SAMPLING), checkpoints["a"]) == (6, 6)
