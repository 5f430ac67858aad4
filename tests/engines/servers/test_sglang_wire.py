"""SGLang's wire format, by answers written by hand: what is read from them, and what is refused."""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.serve.messages import CHECKPOINT, PolicyName
from moe_replay.engines.servers.contract import Ask
from moe_replay.engines.servers.sglang_wire import (
    generate_message,
    read_completion,
    read_description,
)
from moe_replay.engines.types import FinishReason, Request, SamplingParams
from moe_replay.errors import CodecError, EngineError, RecipeError, TraceError, UnsupportedError
from moe_replay.routing import LayerOrder, RoutedModel

# Decoder layer 0 is dense; layers 1 and 2 choose 2 of 8 experts.
FACTS = ModelFacts(
    vocab_size=32,
    max_context_length=64,
    eos_ids=(1,),
    routed=RoutedModel(moe_layers=(1, 2), num_decoder_layers=3, num_experts=8, topk=2),
    weight_shapes={},
    tied_names=frozenset(),
)
SERVER = {
    "version": "0.5.23",
    "dtype": "bfloat16",
    "enable_return_routed_experts": True,
    "max_req_input_len": 58,
}
# A prompt of 3 tokens with 2 sampled ones: 4 fed tokens.
REQUEST = Request(request_id=7, prompt_ids=np.array([4, 5, 6], dtype=np.int32), num_generations=1)
SAMPLING = SamplingParams(max_completion_length=8, temperature=0.5, seed=3)
ROUTES = [
    [[0, 0], [3, 1], [2, 7]],
    [[0, 0], [5, 0], [6, 1]],
    [[0, 0], [2, 4], [0, 3]],
    [[0, 0], [7, 6], [4, 5]],
]


def packed(routes: Any = ROUTES) -> str:
    ids = np.array(routes).ravel().tolist()
    return base64.b64encode(struct.pack(f"<{len(ids)}i", *ids)).decode()


def answer(**meta: Any) -> dict[str, Any]:
    return {
        "text": "",
        "output_ids": [9, 1],
        "meta_info": {
            "finish_reason": {"type": "stop", "matched": 1},
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "weight_version": "run:2",
            "num_retractions": 0,
            "output_token_logprobs": [[-0.25, 9, None], [-1.5, 1, None]],
            "routed_experts": packed(),
            **meta,
        },
    }


def asked(facts: ModelFacts = FACTS) -> Ask:
    return Ask(
        request=REQUEST,
        numbers=(0,),
        sampling=SAMPLING,
        policy=PolicyName(run="run", policy_version=2),
        description=read_description(SERVER, facts, "http://a"),
    )


def read(told: Any, *, facts: ModelFacts = FACTS) -> Any:
    return read_completion(
        told, asked(facts), facts=facts, layer_order=LayerOrder(), where="request 7"
    )


def test_a_completion_is_read_with_its_routes():
    completion, policy = read(answer())
    assert completion.token_ids.tolist() == [9, 1]
    assert completion.rollout_logprobs.tolist() == [-0.25, -1.5]
    assert completion.finish_reason is FinishReason.STOP
    assert policy == PolicyName(run="run", policy_version=2)
    trace = completion.trace
    assert trace.layers == (1, 2) and trace.valid.tolist() == [True] * 4 + [False]
    expected = [[[1, 3], [2, 7]], [[0, 5], [1, 6]], [[2, 4], [0, 3]], [[6, 7], [4, 5]]]
    assert np.sort(trace.expert_ids[:4]).tolist() == expected
    trace.check_tokens(np.array([4, 5, 6, 9, 1]), where="the answer")


def test_a_request_names_every_option_and_asks_for_all_rows():
    each = [generate_message(asked(), number, facts=FACTS, rid="a") for number in range(2)]
    told = each[0]
    first, second = (message["sampling_params"] for message in each)
    seeds = first.pop("sampling_seed"), second.pop("sampling_seed")
    assert len(set(seeds)) == 2 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert first == second
    assert first == {
        "max_new_tokens": 8,
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "logit_bias": None,
        "stop": [],
        "stop_token_ids": [1],
        "ignore_eos": False,
        "no_stop_trim": True,
        "skip_special_tokens": False,
    }
    del told["sampling_params"]
    assert json.loads(json.dumps(told)) == {
        "rid": "a",
        "input_ids": [4, 5, 6],
        "return_logprob": True,
        "return_text_in_logprobs": False,
        "return_routed_experts": True,
        "routed_experts_start_len": 0,
        "stream": False,
    }


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (ROUTES[:-1], "3 rows, expected 4"),
        ([*ROUTES, ROUTES[0]], "5 rows, expected 4"),
        (ROUTES[2:], "2 rows, expected 4"),
        ([[[0, 0], [3, 1], [2, 8]], *ROUTES[1:]], "8"),
        ([[[0, 0], [3, 3], [2, 7]], *ROUTES[1:]], "3"),
        ([[[0, 0]] * 3, *ROUTES[1:]], "unwritten"),
    ],
)
def test_routes_that_cannot_be_those_of_the_tokens_are_refused(routes, message):
    with pytest.raises(TraceError, match=message):
        read(answer(routed_experts=packed(routes)))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (packed()[:-4], "expected 4 rows of 24 bytes"),
        ("", "expected 4 rows"),
        ("no base64!", "not valid base64"),
    ],
)
def test_damaged_routes_are_refused(field, message):
    with pytest.raises(CodecError, match=message):
        read(answer(routed_experts=field))


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"routed_experts": None}, "--enable-return-routed-experts"),
        ({"prompt_tokens": 2}, "cut the prompt"),
        ({"completion_tokens": 3}, "do not belong"),
        ({"output_token_logprobs": [[-0.25, 9, None]], "completion_tokens": 1}, "do not belong"),
        ({"output_token_logprobs": []}, "damaged"),
        ({"output_token_logprobs": [[None, 9, None], [-1.5, 1, None]]}, "damaged"),
        ({"output_token_logprobs": [[-0.25, 1 << 40, None], [-1.5, 1, None]]}, "damaged"),
        ({"finish_reason": {"type": "abort", "message": "Aborted"}}, "aborted"),
        ({"finish_reason": {"type": "stop", "matched": "NaN happened"}}, "an unknown token"),
        ({"finish_reason": {"type": "length", "length": 2}}, "2 tokens, expected 8"),
        ({"finish_reason": None}, "aborted"),
        (
            {
                "weight_versions": [
                    {"version": "run:1", "start": 0, "end": 1},
                    {"version": "run:2", "start": 1, "end": 2},
                ]
            },
            "one after the other",
        ),
    ],
)
def test_answers_that_are_no_sample_are_refused(meta, message):
    with pytest.raises(EngineError, match=message):
        read(answer(**meta))


@pytest.mark.parametrize("told", [None, [], "text", {}, {"meta_info": []}, {"meta_info": {}}])
def test_answers_of_another_form_are_refused(told):
    with pytest.raises(EngineError, match="damaged"):
        read(told)


def test_every_field_of_an_answer_that_is_read_is_needed():
    needed = [key for key in answer()["meta_info"] if key != "routed_experts"]
    for key in needed:
        told = answer()
        del told["meta_info"][key]
        with pytest.raises(EngineError, match=key):
            read(told)


def test_a_release_that_hides_retractions_is_refused():
    read_description({**SERVER, "version": "0.5.12.post1"}, FACTS, "http://a")
    for version in ("0.5.7", "0.5.9", "0.5.11"):
        with pytest.raises(UnsupportedError, match=rf"{version}.*retracted.*0\.5\.12"):
            read_description({**SERVER, "version": version}, FACTS, "http://a")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("speculative_algorithm", "EAGLE"),
        ("enable_hierarchical_cache", True),
        ("enable_lmcache", True),
        ("disaggregation_mode", "decode"),
        ("pp_size", 2),
        ("quantization", "fp8"),
    ],
)
def test_an_option_that_parts_routes_from_tokens_is_refused(option, value):
    flag = option.replace("_", "-")
    with pytest.raises(UnsupportedError, match=f"{option} = {value!r}.*without --{flag}"):
        read_description({**SERVER, option: value}, FACTS, "http://a")


def test_the_description_tells_whether_routes_come_back():
    described = read_description(SERVER, FACTS, "http://a")
    assert described.records_routes and described.moe_layers == (1, 2)
    assert described.max_context_length == 58
    blind = read_description({**SERVER, "enable_return_routed_experts": False}, FACTS, "http://a")
    dense = read_description(SERVER, replace(FACTS, routed=None), "http://a")
    assert not blind.records_routes and not dense.records_routes


@pytest.mark.parametrize("told", [None, [], {}, {**SERVER, "max_req_input_len": None}])
def test_a_server_of_another_kind_is_refused(told):
    with pytest.raises(RecipeError, match="not an SGLang server"):
        read_description(told, FACTS, "http://a")


def test_weight_versions_name_run_and_version():
    policy = PolicyName(run="7f3a", policy_version=12)
    assert policy.weight_version == "7f3a:12" and PolicyName.read("7f3a:12") == policy
    assert PolicyName.read("default").run == CHECKPOINT
    assert PolicyName.read("someone else's").run == "someone else's"
