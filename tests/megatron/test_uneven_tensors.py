"""What tensor parallelism does not divide: key and value heads, and the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports
from moe_replay.checkpoint.files import SafetensorsCheckpoint
from moe_replay.errors import UnsupportedError
from moe_replay.megatron import logprobs
from moe_replay.megatron.model import read_model_shape, transformer_config
from moe_replay.routing import Routing
from moe_replay.testing.layouts import Case, Step, layout, replayed_step
from moe_replay.testing.policies import mean_loss, pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import make_samples
from moe_replay.testing.tiny_models import write_tiny_checkpoint

SEED = 61
LAYERS = (0, 1)
MODELS: dict[str, dict[str, Any]] = {
    # 4 query heads over 2 key and value heads: at 4 ranks each pair of ranks shares one.
    "heads": {},
    "one head": {"num_key_value_heads": 1},
    "biases": {"family": "qwen2_moe"},
    # 101 words on 2 ranks are 51 and 50, on 4 ranks three times 26 and 23.
    "words": {"vocab_size": 101},
    "tied words": {"vocab_size": 101, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("uneven")
    return {
        name: write_tiny_checkpoint(folder / name, num_hidden_layers=2, **fields)
        for name, fields in MODELS.items()
    }


def _step(checkpoint: Path, sizes: dict[str, int], ranks: int) -> list[Step]:
    case = Case(layout=layout(**sizes), ranks=ranks)
    return run_ranks(replayed_step, ranks, checkpoint, case, LAYERS)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("model", "sizes", "ranks"),
    [
        ("heads", {"tp": 4}, 4),
        ("one head", {"tp": 2}, 2),
        ("biases", {"tp": 4, "etp": 1}, 4),
        ("words", {"tp": 2}, 2),
        ("words", {"tp": 4}, 4),
        ("tied words", {"tp": 2}, 2),
        ("tied words", {"tp": 2, "pp": 2}, 4),
    ],
)
def test_a_replayed_step_is_that_of_a_single_process(
    checkpoints: dict[str, Path], model: str, sizes: dict[str, int], ranks: int
) -> None:
    (alone,) = _step(checkpoints[model], {}, 1)
    for step in _step(checkpoints[model], sizes, ranks):
        np.testing.assert_allclose(step.loss, alone.loss, rtol=1e-5)
        np.testing.assert_allclose(step.grad_norm, alone.grad_norm, rtol=1e-5)
        for sample_id, values in step.old_logprobs.items():
            np.testing.assert_allclose(values, alone.old_logprobs[sample_id], rtol=1e-5, atol=1e-5)
        assert step.gradients.keys() == alone.gradients.keys()
        for name, gradient in alone.gradients.items():
            error = (step.gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert error < 1e-5, (name, float(error))


def _exported(checkpoint: Path, sizes: dict[str, int]) -> tuple[list[str], list[str], int]:
    """Return what an export changes before any step, what a step leaves as it was, and the rows."""
    actor = start_policy(checkpoint, layout(**sizes))
    changed = []
    before = {}
    with SafetensorsCheckpoint(checkpoint) as source:
        for name, tensor in actor.weights.tensors():
            before[name] = tensor.clone()
            if not torch.equal(tensor, source[name]):
                changed.append(name)
        names = set(source) - ({"lm_head.weight"} if "lm_head.weight" not in before else set())
        changed += sorted(names ^ set(before))
    microbatches = pack(make_samples(4, seed=SEED), scorer=actor, count=2)
    for _ in range(2):
        actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.LIVE)
    still = [n for n, tensor in actor.weights.tensors() if torch.equal(tensor, before[n])]
    return changed, still, len(before["model.embed_tokens.weight"])


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("model", "sizes", "ranks", "words"),
    [
        ("heads", {"tp": 4}, 4, 100),
        ("biases", {"tp": 4, "etp": 1}, 4, 100),
        ("words", {"tp": 2}, 2, 101),
        ("words", {"tp": 4}, 4, 101),
        ("tied words", {"tp": 2}, 2, 101),
    ],
)
def test_an_export_is_the_checkpoint_and_after_a_step_all_of_it_is_new(
    checkpoints: dict[str, Path], model: str, sizes: dict[str, int], ranks: int, words: int
) -> None:
    for changed, still, rows in run_ranks(_exported, ranks, checkpoints[model], sizes):
        assert changed == []
        assert still == []
        assert rows == words


def _scores(checkpoint: Path, counts_padding: bool) -> tuple[list[np.ndarray], float]:
    """Return log-probabilities, and the largest weight of a row that stands for no word."""
    if counts_padding:
        logprobs._num_words = lambda model, layer: layer.output_size_per_partition
    actor = start_policy(checkpoint, layout(tp=4))
    microbatches = pack(make_samples(4, seed=SEED), scorer=actor, count=2)
    for _ in range(2):
        actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.LIVE)
    scores = actor.score(microbatches, temperature=1.0, routing=Routing.LIVE).samples
    (last,) = (
        p for n, p in actor.modules[0].named_parameters() if n.endswith("output_layer.weight")
    )
    # 104 rows for 101 words: the last three of the last rank.
    padding = last[23:] if actor.place.tp_rank == 3 else last[:0]
    largest = float(padding.detach().abs().max()) if len(padding) else 0.0
    return [scores[i].token_logprobs for i in sorted(scores)], largest


@pytest.mark.ranks
def test_padding_of_the_vocabulary_is_never_part_of_a_softmax(checkpoints: dict[str, Path]) -> None:
    honest = run_ranks(_scores, 4, checkpoints["words"], False)
    counted = run_ranks(_scores, 4, checkpoints["words"], True)
    assert all(largest == 0.0 for _, largest in honest)
    # The negative control: rows of zeros take a share, and are pushed away from it.
    assert max(largest for _, largest in counted) > 0
    difference = np.abs(np.concatenate(honest[0][0]) - np.concatenate(counted[0][0])).max()
    assert difference > 1e-3


@pytest.mark.parametrize(
    ("fields", "tensor", "said"),
    [
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 16},
            4,
            "num_query_groups = 3 key and value heads cannot be shared",
        ),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 4, "num_attention_heads = 6"),
        ({"vocab_size": 15}, 4, "leaves a rank of tensor parallelism 4 without a word"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    tmp_path: Path, fields: dict[str, Any], tensor: int, said: str
) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "model", num_hidden_layers=1, **fields)
    with pytest.raises(UnsupportedError, match=said):
        transformer_config(read_model_shape(checkpoint), layout(tp=tensor, etp=1))
