"""Every engine names diverged weights as such, and no token is drawn from what is not a number."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moe_replay.engines.checks import check_group
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.noise import NOT_A_LOGPROB, refuse_no_numbers, sample_tokens
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.engines.weight_stream import finite_weights
from moe_replay.errors import DivergedError, EngineError
from moe_replay.testing.tiny_models import write_tiny_checkpoint

NAN, INF = float("nan"), float("inf")
SAMPLING = SamplingParams(max_completion_length=4)
REQUEST = Request(request_id=3, prompt_ids=np.arange(5, 9, dtype=np.int32), num_generations=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("diverged"), num_hidden_layers=1)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("limits", [{}, {"top_k": 2}, {"top_p": 0.7}], ids=str)
def test_r6_logits_that_are_no_numbers_give_a_lawful_token_and_say_so(
    bad, place, temperature, limits
):
    logits = torch.zeros(2, 5)
    logits[1, place] = bad
    drawn = sample_tokens(
        logits, torch.tensor([0.99, 0.99], dtype=torch.float64), temperature=temperature, **limits
    )
    ids, logprobs = drawn.ids, drawn.rollout_logprobs
    assert ((ids >= 0) & (ids < 5)).all()
    assert logprobs.isnan().tolist() == [False, True]
    assert logprobs[0].item() == pytest.approx(-np.log(5))
    assert drawn.among_kept()[0].isnan().tolist() == [False, True]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_r6_a_pushed_weight_that_is_not_finite_is_named(checkpoint, bad, dtype):
    push = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.mlp.gate.weight"
    push = {key: tensor.to(dtype) for key, tensor in push.items()}
    push[name][3, 7] = bad
    engine = EmbeddedEngine(checkpoint, dtype="float32")
    with pytest.raises(
        DivergedError, match=rf"weight {name} .* 1 of {push[name].numel()} values .*lr"
    ):
        engine.load_weights(push.items(), policy_version=1)
    with pytest.raises(EngineError, match="push again"):
        engine.generate([REQUEST], SAMPLING)
    engine.close()


def test_r6_control_extreme_numbers_whole_numbers_and_nothing_are_passed_on():
    push = {
        "large": torch.tensor([3e38, -3e38]),
        "whole": torch.tensor([1, 2]),
        "none": torch.zeros(0, 4),
    }
    assert [name for name, _ in finite_weights(push.items())] == list(push)


def test_r6_weights_that_overflow_name_the_policy_in_place_of_an_index(checkpoint):
    engine = EmbeddedEngine(checkpoint, dtype="float32")
    push = load_file(checkpoint / "model.safetensors")
    push["lm_head.weight"] *= 1e38
    engine.load_weights(push.items(), policy_version=7)
    with pytest.raises(DivergedError, match=r"token 0 are not finite under policy version 7.*lr"):
        engine.generate([REQUEST], SAMPLING)
    engine.close()


def test_r6_a_completion_without_numbers_is_refused_whichever_engine_returns_it():
    engine = FakeEngine()
    (group,) = engine.generate([REQUEST], SAMPLING)
    first, *rest = group.completions
    logprobs = first.rollout_logprobs.copy()
    logprobs[1] = NAN
    bad = replace(group, completions=(replace(first, rollout_logprobs=logprobs), *rest))
    with pytest.raises(DivergedError, match=r"completion 0: rollout_logprobs are NaN .* token 1"):
        check_group(bad, engine.description)


@pytest.mark.parametrize("stand_in", [NAN, NOT_A_LOGPROB])
def test_r6_the_stand_in_of_a_server_is_read_as_no_number(stand_in):
    logprobs = np.array([-1.0, -2.0, stand_in], dtype=np.float32)
    with pytest.raises(DivergedError, match=r"here: .* token 2 .* version 0, .* the checkpoint"):
        refuse_no_numbers(logprobs, where="here", policy_version=0)
    refuse_no_numbers(logprobs[:2], where="here", policy_version=0)


@pytest.mark.vllm
def test_r6_vllm_draws_a_lawful_token_from_logits_that_are_no_numbers():
    from moe_replay.engines.vllm.sampler import LOGPROBS_MODE, DrawTokens, _new_row, draw_params

    config = SimpleNamespace(model_config=SimpleNamespace(logprobs_mode=LOGPROBS_MODE))
    processor = DrawTokens(config, torch.device("cpu"), False)
    params = draw_params(SAMPLING, request_id=0, completion=0, stop_token_ids=())
    processor._rows = {place: _new_row(params, [1], []) for place in range(2)}
    logits = torch.zeros(2, 6)
    logits[1, 4] = NAN
    drawn = processor.apply(logits)
    assert drawn.argmax(dim=1)[1] == 0
    assert drawn[1].max() == NOT_A_LOGPROB
    assert drawn[0].max().item() == pytest.approx(-np.log(6))


class Diverged(FakeEngine):
    """A fake engine whose weights have diverged."""

    def generate(self, requests, sampling):
        raise DivergedError("the logits of sampled token 0 are not finite under policy version 2")


@pytest.mark.vllm
def test_r6_a_server_says_that_its_weights_diverged_and_is_asked_once():
    from ..support.served import served
    from .server_case import SHAPES, client, requests

    with served(Diverged(weight_shapes=SHAPES)) as url:
        engine = client(url)
        with pytest.raises(EngineError, match="token 0 are not finite under policy version 2"):
            engine.generate(requests(1), SAMPLING)
        assert sum(engine.faults.values()) == 0
        engine.close()
