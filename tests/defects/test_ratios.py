"""The ratio of trainer to engine starts at 1: same tokens, same distribution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.routing import Routing
from moe_replay.testing.policies import pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import RoutedSample
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = pytest.mark.ranks
TEMPERATURE = 0.7


def both(checkpoint: Path, scored_at: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the engine's and the trainer's log-probabilities with equal weights."""
    actor = start_policy(checkpoint)
    engine = EmbeddedEngine(checkpoint, dtype="float32", device="cpu", record_routes=True)
    prompt = np.arange(10, 20, dtype=np.int32)
    sampling = SamplingParams(
        max_completion_length=16, temperature=TEMPERATURE, top_p=0.9, top_k=20, seed=3
    )
    request = Request(request_id=0, prompt_ids=prompt, num_generations=8)
    (group,) = engine.generate([request], sampling)
    samples = [
        RoutedSample(
            sample_id=number,
            token_ids=np.concatenate([prompt, completion.token_ids]),
            prompt_length=len(prompt),
            rollout_logprobs=completion.rollout_logprobs,
            advantage=0.0,
            trains=True,
            trace=completion.trace,
        )
        for number, completion in enumerate(group.completions)
    ]
    scored = actor.score(pack(samples), temperature=scored_at, routing=Routing.REPLAY).samples
    return (
        np.concatenate([sample.rollout_logprobs for sample in samples]),
        np.concatenate([scored[sample.sample_id].token_logprobs for sample in samples]),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Qwen3-MoE checkpoint."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("ratios"), num_hidden_layers=2)


def test_f8_the_first_importance_ratio_is_one_whatever_the_sampling_leaves_out(checkpoint) -> None:
    rollout, old = run_ranks(both, 1, checkpoint, TEMPERATURE)[0]
    assert np.exp(old - rollout).mean() == pytest.approx(1.0, abs=1e-4)
    assert np.abs(old - rollout).max() < 1e-3


def test_f8_control_log_probabilities_shifted_by_one_token_show(checkpoint) -> None:
    rollout, old = run_ranks(both, 1, checkpoint, TEMPERATURE)[0]
    assert np.exp(np.roll(old, 1) - rollout).mean() > 1.5


def test_f8_control_log_probabilities_of_another_temperature_show(checkpoint) -> None:
    rollout, old = run_ranks(both, 1, checkpoint, 1.0)[0]
    assert abs(np.exp(old - rollout).mean() - 1.0) > 0.05
