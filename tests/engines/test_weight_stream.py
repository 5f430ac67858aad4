"""A push is checked while it streams: every tensor once, of its shape, and tied ones equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.weight_stream import checked_weights, lowered_weights
from moe_replay.errors import EngineError

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
UNTIED = ModelFacts(
    vocab_size=4,
    max_context_length=8,
    eos_ids=(),
    routed=None,
    weight_shapes={HEAD: (4, 2), EMBEDDING: (4, 2), NORM: (2,)},
    tied_names=frozenset(),
)
TIED = replace(
    UNTIED,
    weight_shapes={EMBEDDING: (4, 2), NORM: (2,)},
    tied_names=frozenset({HEAD, EMBEDDING}),
)


def names(facts: ModelFacts, **tensors: torch.Tensor) -> list[str]:
    """Return the names passed on from a push of these, ``head``, ``embedding`` and ``norm``."""
    full = {"head": HEAD, "embedding": EMBEDDING, "norm": NORM}
    return [name for name, _ in checked_weights([(full[n], t) for n, t in tensors.items()], facts)]


def test_a_whole_push_is_passed_on_in_order():
    push = {"norm": torch.ones(2), "head": torch.ones(4, 2), "embedding": torch.zeros(4, 2)}
    assert names(UNTIED, **push) == [NORM, HEAD, EMBEDDING]


@pytest.mark.parametrize("given", ["head", "embedding"])
def test_one_of_the_tied_names_is_enough(given):
    assert len(names(TIED, norm=torch.ones(2), **{given: torch.ones(4, 2)})) == 2


def test_equal_tied_tensors_are_passed_on_once():
    push = {"head": torch.ones(4, 2), "embedding": torch.ones(4, 2), "norm": torch.ones(2)}
    assert names(TIED, **push) == [HEAD, NORM]


def test_tied_tensors_that_differ_raise():
    with pytest.raises(EngineError, match="tied in this model"):
        names(TIED, head=torch.ones(4, 2), embedding=torch.zeros(4, 2), norm=torch.ones(2))


def test_a_push_without_any_of_the_tied_names_raises():
    with pytest.raises(EngineError, match="were not pushed"):
        names(TIED, norm=torch.ones(2))


def test_a_missing_tensor_raises_at_the_end():
    with pytest.raises(EngineError, match=r"1 of 3 weights were not pushed: model\.norm\.weight"):
        names(UNTIED, head=torch.ones(4, 2), embedding=torch.ones(4, 2))


def test_a_tensor_of_another_shape_raises_before_it_is_passed_on():
    stream = checked_weights([(NORM, torch.ones(3))], UNTIED)
    with pytest.raises(EngineError, match=r"shape \[3\].*\[2\]"):
        next(stream)


def test_a_tied_tensor_of_another_shape_raises():
    with pytest.raises(EngineError, match=r"shape \[2, 4\]"):
        names(TIED, head=torch.ones(2, 4))


def test_an_unknown_or_repeated_name_raises():
    with pytest.raises(EngineError, match=r"not in this model's checkpoint"):
        list(checked_weights([("model.layers.7.mlp.gate.weight", torch.ones(2))], UNTIED))
    with pytest.raises(EngineError, match="pushed twice"):
        list(checked_weights([(NORM, torch.ones(2))] * 2, UNTIED))


def test_e4_a_push_has_the_number_format_of_the_rollout():
    facts = replace(UNTIED, float32_names=frozenset({NORM}))
    push = [
        (HEAD, torch.tensor([1.0 + 2**-20])),
        (NORM, torch.tensor([1.0 + 2**-20])),
        (EMBEDDING, torch.tensor([0.5], dtype=torch.bfloat16)),
        ("ids", torch.tensor([1 << 40])),
    ]
    lowered = dict(lowered_weights(push, torch.bfloat16, facts))
    assert lowered[HEAD].dtype == torch.bfloat16 and lowered[HEAD].item() == 1.0
    # What engines hold in float32 travels bit for bit.
    assert lowered[NORM].dtype == torch.float32 and torch.equal(lowered[NORM], push[1][1])
    assert lowered[EMBEDDING] is push[2][1] and lowered["ids"] is push[3][1]


def test_e4_a_push_in_float32_passes_as_it_is():
    push = [(HEAD, torch.tensor([1.0 + 2**-20])), (NORM, torch.ones(1, dtype=torch.bfloat16))]
    for (_, given), (_, passed) in zip(
        push, lowered_weights(push, torch.float32, UNTIED), strict=True
    ):
        assert passed is given
