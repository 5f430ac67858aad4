"""What vLLM would change about a token that is drawn here is refused, wherever it came from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moe_replay.engines.types import SamplingParams

pytestmark = pytest.mark.vllm
SAMPLING = SamplingParams(max_completion_length=8)


def params(**changes):
    """Return vLLM's parameters of a draw, with others beside it."""
    from vllm import SamplingParams as VllmSamplingParams

    from moe_replay.engines.vllm.sampler import draw_params

    drawn = draw_params(SAMPLING, request_id=1, completion=0, stop_token_ids=(1,))
    fields = {
        name: getattr(drawn, name)
        for name in ("temperature", "max_tokens", "logprobs", "extra_args", "ignore_eos")
    }
    return VllmSamplingParams(**fields | changes)


@pytest.mark.parametrize(
    "option",
    [
        {"repetition_penalty": 1.05},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"logit_bias": {3: 5.0}},
        {"allowed_token_ids": [3, 4]},
        {"bad_words": ["no"]},
        {"min_tokens": 2},
        {"trace_decode_token_ids": [3, 4]},
        {"thinking_token_budget": 4},
    ],
    ids=lambda option: next(iter(option)),
)
def test_e22_options_that_vllm_applies_outside_of_a_draw_are_refused(option):
    from vllm import SamplingParams as VllmSamplingParams

    from moe_replay.engines.vllm.sampler import DrawTokens

    (name,) = option
    with pytest.raises(ValueError, match=rf"{name} = .* generation_config\.json.* vllm"):
        DrawTokens.validate_params(params(**option))
    # A request that is not drawn here may have them.
    DrawTokens.validate_params(VllmSamplingParams(**option))


def test_e22_control_neutral_values_and_options_without_effect_are_accepted():
    from moe_replay.engines.vllm.sampler import DrawTokens

    neutral = {
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "logit_bias": None,
        "bad_words": [],
        "skip_special_tokens": False,
        "stop_token_ids": [1, 2],
    }
    DrawTokens.validate_params(params(**neutral))
    assert DrawTokens.validate_params(params()) is None


def test_e18_ids_that_pad_the_vocabulary_are_never_drawn_in_vllm():
    """Requests that know fewer ids, and those that know all, share a batch."""
    import torch

    from moe_replay.engines.vllm.sampler import LOGPROBS_MODE, DrawTokens, _new_row, draw_params

    config = SimpleNamespace(model_config=SimpleNamespace(logprobs_mode=LOGPROBS_MODE))
    processor = DrawTokens(config, torch.device("cpu"), False)
    for place in range(64):
        drawn = draw_params(
            SAMPLING,
            request_id=place,
            completion=0,
            stop_token_ids=(),
            num_known_ids=3 if place < 32 else None,
        )
        processor._rows[place] = _new_row(drawn, [1], [])
    logits = torch.tensor([0.0, 0.0, 0.0, 5.0, 5.0]).repeat(64, 1)
    ids = processor.apply(logits.clone()).argmax(dim=1)
    assert set(ids[:32].tolist()) == {0, 1, 2}
    assert set(ids[32:].tolist()) >= {3, 4}
    # Of the full vocabulary, as the trainer recomputes it.
    expected = torch.log_softmax(logits, dim=1).gather(1, ids[:, None]).squeeze(1)
    assert torch.allclose(processor.apply(logits.clone()).max(dim=1).values, expected)


def test_e22_vllm_itself_drops_what_a_draw_has_of_its_own():
    """Why ``min_p`` needs no refusal: nothing is left of it."""
    assert params(min_p=0.3).min_p == 0.0
    assert params(top_p=0.3).top_p == 1.0
