"""YaRN scaling of grouped-query attention, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports
from moe_replay.errors import UnsupportedError
from moe_replay.megatron.model import read_model_shape
from moe_replay.routing import Routing
from moe_replay.testing.layouts import layout
from moe_replay.testing.policies import pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import make_samples
from moe_replay.testing.tiny_models import write_tiny_checkpoint

SEED = 62
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _difference(checkpoint: Path, tensor: int, context: int) -> float:
    """Return the largest difference of a log-probability from that of transformers."""
    from transformers import AutoModelForCausalLM

    actor = start_policy(checkpoint, layout(tp=tensor, cp=context))
    samples = make_samples(6, seed=SEED)
    scored = actor.score(pack(samples, scorer=actor), temperature=1.0, routing=Routing.LIVE).samples
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    worst = 0.0
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        rows = logprobs[sample.prompt_length - 1 : -1]
        expected = rows.gather(1, ids[sample.prompt_length :, None])[:, 0].numpy()
        found = scored[sample.sample_id].token_logprobs
        worst = max(worst, float(np.abs(found - expected).max()))
    return worst


def _checkpoint(folder: Path, family: str = "qwen3_moe", **rope: Any) -> Path:
    return write_tiny_checkpoint(
        folder,
        family,
        num_hidden_layers=2,
        rope_parameters=YARN | rope,
        max_position_embeddings=128,
    )


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("family", "rope", "tensor", "context"),
    [
        ("qwen3_moe", {}, 1, 1),
        ("qwen3_moe", {}, 2, 1),
        ("qwen3_moe", {}, 1, 2),
        ("qwen3_moe", {"beta_fast": 16.0, "beta_slow": 2.0}, 1, 1),
        ("qwen3_moe", {"mscale": 1.2, "mscale_all_dim": 0.5}, 1, 1),
        ("qwen2_moe", {}, 1, 1),
    ],
)
def test_scores_equal_those_of_transformers(
    tmp_path: Path, family: str, rope: dict[str, Any], tensor: int, context: int
) -> None:
    checkpoint = _checkpoint(tmp_path / "model", family, **rope)
    ranks = tensor * context
    assert max(run_ranks(_difference, ranks, checkpoint, tensor, context)) < 2e-5


def _unscaled(checkpoint: Path) -> float:
    from moe_replay.megatron.families import common

    common._yarn = lambda hf: {}
    return _difference(checkpoint, 1, 1)


@pytest.mark.ranks
def test_without_the_scaling_they_do_not(tmp_path: Path) -> None:
    """The negative control."""
    assert run_ranks(_unscaled, 1, _checkpoint(tmp_path / "model"))[0] > 1e-3


def _refused(folder: Path, family: str, **rope: Any) -> Path:
    checkpoint = write_tiny_checkpoint(folder, family, num_hidden_layers=1)
    config = json.loads((checkpoint / "config.json").read_text())
    config["rope_parameters"] = YARN | rope
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def test_what_megatron_cannot_scale_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="attention_factor"):
        read_model_shape(_refused(tmp_path / "a", "qwen3_moe", attention_factor=1.5))
    with pytest.raises(UnsupportedError, match="supported: rope_type 'default'"):
        read_model_shape(_refused(tmp_path / "b", "mixtral"))
    with pytest.raises(UnsupportedError, match=r"partial_rotary_factor = 0\.5"):
        read_model_shape(_refused(tmp_path / "c", "qwen3_moe", partial_rotary_factor=0.5))
    assert (
        read_model_shape(_refused(tmp_path / "d", "qwen3_moe")).yarn["rotary_scaling_factor"] == 4
    )
