"""What vLLM would change about a token that is drawn here is refused, wherever it came from."""

from __future__ import annotations

import pytest

from moe_replay.rollout.types import SamplingParams

pytestmark = pytest.mark.vllm
SAMPLING = SamplingParams(max_completion_length=8)


def params(**changes):
    """Return vLLM's parameters of a draw, with others beside it."""
    from vllm import SamplingParams as VllmSamplingParams

    from moe_replay.rollout.vllm_sampler import draw_params

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

    from moe_replay.rollout.vllm_sampler import DrawTokens

    (name,) = option
    with pytest.raises(ValueError, match=rf"{name} = .* generation_config\.json.* vllm"):
        DrawTokens.validate_params(params(**option))
    # A request that is not drawn here may have them.
    DrawTokens.validate_params(VllmSamplingParams(**option))


def test_e22_control_neutral_values_and_options_without_effect_are_accepted():
    from moe_replay.rollout.vllm_sampler import DrawTokens

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


def test_e22_vllm_itself_drops_what_a_draw_has_of_its_own():
    """Why ``min_p`` needs no refusal: nothing is left of it."""
    assert params(min_p=0.3).min_p == 0.0
    assert params(top_p=0.3).top_p == 1.0
