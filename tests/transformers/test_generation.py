"""Recording of ``generate``: each sequence gets the routes and log-probabilities of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_replay.errors import ReplayScopeError, TokenMismatchError, UnsupportedError
from moe_replay.transformers import record_generation, record_routes

PROMPTS = ([5, 6, 7, 8, 9], [40, 41])
TEMPERATURE = 1.5


@pytest.fixture(scope="module")
def sampled(family_dirs):
    """Return model, recorder and sequences; the second prompt is padded, the first ends early."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family_dirs["qwen3_moe"], dtype=torch.float32)
    ids = torch.tensor([PROMPTS[0], [0, 0, 0, *PROMPTS[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    torch.manual_seed(11)
    print("seed 11")
    options = {"attention_mask": mask, "do_sample": True, "temperature": TEMPERATURE, "top_k": 0}
    with torch.no_grad():
        free = model.generate(ids, **options, max_new_tokens=6, eos_token_id=-1)
        torch.manual_seed(11)
        # The first sequence's third token ends it, while the other goes on.
        end = int(free[0, 7])
        with record_generation(model, temperature=TEMPERATURE) as recorder:
            out = model.generate(ids, **options, max_new_tokens=6, eos_token_id=end, pad_token_id=0)
    assert out[0, 8:].tolist() == [0, 0, 0]
    assert end not in out[1, 5:].tolist()
    return model, recorder, [out[0, :8].tolist(), out[1, 3:].tolist()]


def test_each_sequence_has_the_routes_and_logprobs_of_a_forward_of_its_own(sampled):
    model, recorder, texts = sampled
    found = recorder.sequences(texts, [5, 2], policy_version=3)
    for text, start, one in zip(texts, (5, 2), found, strict=True):
        with torch.no_grad(), record_routes(model) as alone:
            logits = model(torch.tensor([text])).logits[0] / TEMPERATURE
        routes = alone.take().numpy()
        assert (one.trace.expert_ids[:-1] == routes[:-1]).all()
        assert one.trace.valid.tolist() == [True] * (len(text) - 1) + [False]
        assert one.trace.origin.spans[0].policy_version == 3
        one.trace.check_tokens(np.array(text), where="sequence")
        expected = logits.log_softmax(-1)[range(start - 1, len(text) - 1), text[start:]]
        assert one.rollout_logprobs == pytest.approx(expected.numpy(), abs=1e-5)


def test_other_tokens_than_those_fed_are_refused(family_dirs, sampled):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family_dirs["qwen3_moe"], dtype=torch.float32)
    with torch.no_grad(), record_generation(model) as recorder:
        out = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, eos_token_id=-1)
    text = out[0].tolist()
    changed = [*text[:6], text[6] + 1, text[7]]
    with pytest.raises(TokenMismatchError, match="other tokens"):
        recorder.sequences([changed], [5])
    with pytest.raises(ReplayScopeError, match="2 are asked for"):
        recorder.sequences([text, text], [5, 5])


def test_generation_without_a_cache_is_refused(sampled):
    model, _, _ = sampled
    with (
        torch.no_grad(),
        record_generation(model),
        pytest.raises(UnsupportedError, match="use_cache"),
    ):
        model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, use_cache=False)
