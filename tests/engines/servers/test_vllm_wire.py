"""vLLM's own HTTP format, by answers of vLLM 0.30.0: what is read from them and what is refused."""

from __future__ import annotations

import base64
import io
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.serve.messages import PolicyName
from moe_replay.engines.servers.contract import Ask
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.vllm_wire import (
    PROCESSOR,
    generate_message,
    read_completion,
    read_server,
)
from moe_replay.engines.types import Completion, FinishReason, Request, SamplingParams
from moe_replay.errors import EngineError, RecipeError, TraceError, UnsupportedError
from moe_replay.routing import LayerOrder, RoutedModel

FACTS = ModelFacts(
    vocab_size=100,
    max_context_length=512,
    eos_ids=(1,),
    routed=RoutedModel(moe_layers=(0, 2), num_decoder_layers=3, num_experts=8, topk=2),
    weight_shapes={},
    tied_names=frozenset(),
)
VERSION = {"version": "0.30.0"}
SERVER: dict[str, Any] = {
    "vllm_config": {
        "model_config": {
            "dtype": "torch.bfloat16",
            "logprobs_mode": "processed_logprobs",
            "max_model_len": 256,
            "enable_return_routed_experts": True,
            "logits_processors": None,
            "quantization": None,
        },
        "scheduler_config": {"async_scheduling": True},
        "parallel_config": {"pipeline_parallel_size": 1},
        "device_config": {"device": "cuda"},
        "speculative_config": None,
        "kv_transfer_config": None,
    }
}
DRAWING = {
    "model_config.logits_processors": [PROCESSOR],
    "model_config.logprobs_mode": "processed_logits",
    "scheduler_config.async_scheduling": False,
}
REQUEST = Request(request_id=7, prompt_ids=np.array([5, 6, 7], dtype=np.int32), num_generations=2)
SAMPLING = SamplingParams(max_completion_length=2, temperature=0.5, seed=3)
ROUTES = np.array(
    [
        [[3, 1], [0, 0], [2, 7]],
        [[5, 0], [0, 0], [6, 1]],
        [[2, 4], [0, 0], [0, 3]],
        [[7, 6], [0, 0], [4, 5]],
    ],
    dtype=np.uint8,
)


def server(**changes: Any) -> dict[str, Any]:
    told = deepcopy(SERVER)
    for place, value in changes.items():
        *section, key = place.split(".")
        (told["vllm_config"][section[0]] if section else told["vllm_config"])[key] = value
    return told


def npy(rows: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, rows)
    return base64.b64encode(file.getvalue()).decode()


def answer(**choice: Any) -> dict[str, Any]:
    content = [{"token": f"token_id:{n}", "logprob": p} for n, p in ((54, -0.25), (41, -1.5))]
    fields = {
        "index": 0,
        "logprobs": {"content": content},
        "finish_reason": "length",
        "token_ids": [54, 41],
        "routed_experts": npy(ROUTES),
    }
    return {"request_id": "a", "choices": [{**fields, **choice}]}


def asked(sampling: SamplingParams = SAMPLING) -> Ask:
    return Ask(
        request=REQUEST,
        numbers=(0, 1),
        sampling=sampling,
        policy=PolicyName(run="run", policy_version=4),
        description=read_server(VERSION, SERVER, FACTS, "http://a")[0],
    )


def read(told: Any) -> Completion:
    return read_completion(told, asked(), facts=FACTS, layer_order=LayerOrder(), where="request 7")


def test_a_completion_is_read_with_its_routes():
    completion = read(answer())
    assert completion.token_ids.tolist() == [54, 41]
    assert completion.rollout_logprobs.tolist() == [-0.25, -1.5]
    assert completion.finish_reason is FinishReason.LENGTH and completion.policy_version == 4
    trace = completion.trace
    assert trace.layers == (0, 2) and trace.valid.tolist() == [True] * 4 + [False]
    expected = np.sort(ROUTES[:, [0, 2]])
    assert (np.sort(trace.expert_ids[:4]) == expected).all()
    trace.check_tokens(np.array([5, 6, 7, 54, 41]), where="the answer")


def test_routes_of_a_dense_layer_in_place_of_a_routed_one_are_refused():
    with pytest.raises(TraceError):
        read(answer(routed_experts=npy(ROUTES[:, [0, 2, 1]])))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"routed_experts": None}, "--enable-return-routed-experts"),
        ({"finish_reason": "abort"}, "aborted"),
        ({"token_ids": [54]}, "do not belong together"),
        ({"token_ids": [41, 54]}, "do not belong together"),
        ({"token_ids": []}, "aborted"),
        ({"token_ids": [[54, 41]]}, "aborted"),
        ({"token_ids": [1 << 40, 41]}, "damaged"),
        ({"logprobs": None}, "damaged"),
        ({"logprobs": {"content": [{"logprob": None}] * 2}}, "damaged"),
    ],
)
def test_answers_that_are_no_sample_are_refused(choice, message):
    with pytest.raises(EngineError, match=message):
        read(answer(**choice))


def test_a_completion_without_its_whole_length_was_cut():
    (choice,) = answer()["choices"]
    short = {"token_ids": [54], "logprobs": {"content": choice["logprobs"]["content"][:1]}}
    with pytest.raises(CallError, match="1 tokens, expected 2") as raised:
        read(answer(**short, routed_experts=npy(ROUTES[:-1])))
    assert raised.value.fault is Fault.CUT


@pytest.mark.parametrize("told", [None, [], {}, {"choices": []}, {"choices": [{}, {}]}])
def test_answers_of_another_form_are_refused(told):
    with pytest.raises(EngineError, match="damaged"):
        read(told)


def test_a_drawing_server_gets_the_noise_of_every_engine():
    told = generate_message(asked(), 1, facts=replace(FACTS, num_known_ids=90), draws=True)
    params = told["sampling_params"]
    assert told["token_ids"] == [5, 6, 7]
    assert params["temperature"] == 0.0 and params["logprobs"] == 0 and "seed" not in params
    assert params["extra_args"]["moe_replay"] == {
        "seed": 3,
        "request_id": 7,
        "completion": 1,
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": 0,
        "num_known_ids": 90,
        "num_before": 0,
        "min_p": 0.0,
        "ticket": None,
    }


def test_answers_are_asked_for_at_once():
    """In pieces, vLLM 0.30 loses the routes where the reader is slow.

    Two merged outputs keep those of the first, which has none.
    """
    assert generate_message(asked(), 0, facts=FACTS, draws=False)["stream"] is False


def test_a_plain_server_samples_without_truncation_only():
    params = generate_message(asked(), 0, facts=FACTS, draws=False)["sampling_params"]
    assert params["temperature"] == 0.5 and "extra_args" not in params
    for change in ({"top_p": 0.9}, {"top_k": 5}):
        truncated = replace(SAMPLING, **change)
        with pytest.raises(RecipeError, match="--logits-processors"):
            generate_message(asked(truncated), 0, facts=FACTS, draws=False)
        generate_message(asked(truncated), 0, facts=FACTS, draws=True)


def test_the_description_tells_what_comes_back():
    plain, draws = read_server(VERSION, SERVER, FACTS, "http://a")
    assert not draws and plain.records_routes
    assert plain.dtype == "bfloat16" and plain.max_context_length == 256
    blind = server(**{"model_config.enable_return_routed_experts": False})
    assert not read_server(VERSION, blind, FACTS, "http://a")[0].records_routes
    assert read_server(VERSION, server(**DRAWING), FACTS, "http://a")[1]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"model_config.logprobs_mode": "raw_logprobs"},
            RecipeError,
            "--logprobs-mode processed_logprobs",
        ),
        (
            {**DRAWING, "model_config.logprobs_mode": "processed_logprobs"},
            RecipeError,
            "--logprobs-mode processed_logits",
        ),
        (
            {**DRAWING, "scheduler_config.async_scheduling": True},
            RecipeError,
            "--no-async-scheduling",
        ),
        ({"device_config.device": "cpu"}, UnsupportedError, "corrupts expert weights"),
        ({"speculative_config": {"model": "m"}}, UnsupportedError, "speculative_config"),
        ({"kv_transfer_config": {"kv_role": "kv_both"}}, UnsupportedError, "kv_transfer_config"),
        ({"parallel_config.pipeline_parallel_size": 2}, UnsupportedError, "pipelines"),
        ({"model_config.quantization": "fp8"}, UnsupportedError, "full precision"),
    ],
)
def test_a_server_that_breaks_replay_is_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        read_server(VERSION, server(**changes), FACTS, "http://a")


@pytest.mark.parametrize("version", ["0.22.0", "0.27.1"])
def test_a_release_that_hides_its_weights_is_refused(version):
    with pytest.raises(UnsupportedError, match=rf"{version}.*0\.28"):
        read_server({"version": version}, SERVER, FACTS, "http://a")


@pytest.mark.parametrize("told", [None, {}, {"vllm_config": "text"}, {"vllm_config": {}}])
def test_a_configuration_of_another_form_is_refused(told):
    with pytest.raises(UnsupportedError, match="another form"):
        read_server(VERSION, told, FACTS, "http://a")


@pytest.mark.parametrize("draws", [False, True])
def test_e22_every_option_is_named_so_that_no_default_of_the_server_applies(draws):
    """A checkpoint's generation_config.json may hold any of these; vLLM takes them as defaults."""
    told = generate_message(asked(), 0, facts=FACTS, draws=draws)["sampling_params"]
    neutral = {
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "logit_bias": None,
    }
    assert {name: told.get(name, "missing") for name in neutral} == neutral
