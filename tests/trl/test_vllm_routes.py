"""Routes of a vLLM server in TRL: to the process that trains on them, or refused on all."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.served import listening
from tests.trl.test_ranks import join_world

from moe_replay.errors import CodecError, UnsupportedError
from moe_replay.routing import RoutedModel
from moe_replay.testing.ranks import run_ranks

pytest.importorskip("trl")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.ranks, pytest.mark.vllm]
MODEL = RoutedModel(moe_layers=(0, 1), num_decoder_layers=2, num_experts=8, topk=2)
PROMPTS = [[5, 6, 7], [8, 9]]
CONFIG = {
    "model_config": {"enable_return_routed_experts": True, "quantization": None},
    "parallel_config": {"pipeline_parallel_size": 1},
    "speculative_config": None,
    "kv_transfer_config": None,
    "weight_transfer_config": {"backend": "nccl"},
}
"""What a server of vLLM 0.30 says of itself, as far as it is read."""


def routes_of(choice: int, num_rows: int) -> np.ndarray:
    """Return rows that differ between choices, rows and layers."""
    first = np.arange(num_rows)[:, None] + np.arange(2)[None] + 3 * choice
    return np.stack([first % 8, (first + 4) % 8], axis=-1).astype(np.uint8)


def unreadable(answer: dict[str, Any]) -> dict[str, Any]:
    """Damage the routes of the last of the choices."""
    answer["choices"][-1]["routed_experts"] = "no routes"
    return answer


def completions(prompts: list[list[int]], n: int) -> dict[str, Any]:
    """Return what vLLM answers: ``n`` choices a prompt, of two tokens each."""
    choices = []
    for at, prompt in enumerate(prompts):
        for number in range(n):
            choice, file = at * n + number, io.BytesIO()
            np.save(file, routes_of(choice, len(prompt) + 1))
            tokens = [20 + choice, 40 + choice]
            choices.append(
                {
                    "prompt_token_ids": prompt,
                    "token_ids": tokens,
                    "logprobs": {
                        "tokens": [f"token_id:{token}" for token in tokens],
                        "token_logprobs": [-1.0, -2.0],
                        "top_logprobs": [{f"token_id:{token}": -1.0} for token in tokens],
                    },
                    "routed_experts": base64.b64encode(file.getvalue()).decode(),
                }
            )
    return {"choices": choices}


def vllm_with(config: dict[str, Any] | None, change: Callable[[Any], Any] = lambda x: x) -> Any:
    """Return an ASGI application that answers TRL's client as a server of vLLM 0.30 does.

    Without a configuration it fails when it is asked for it. ``change`` is made to completions.
    """

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        path = scope["path"]
        answer: Any = {
            "/health": {},
            "/version": {"version": "0.30.0"},
            "/v1/models": {"data": [{"id": "model"}]},
            "/server_info": {"vllm_config": config},
        }.get(path)
        if path == "/v1/completions":
            asked = json.loads(body)
            answer = change(completions(asked["prompt"], asked["n"]))
        headers = [(b"content-type", b"application/json")]
        status = 404 if path == "/server_info" and config is None else 200
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    return application


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> None:
    """Import what ranks need before they are forked."""
    import trl.generation.vllm_client  # noqa: F401

    import moe_replay.trl.vllm_routes  # noqa: F401


@pytest.fixture
def url() -> Iterator[str]:
    with listening(vllm_with(CONFIG)) as found:
        yield found


def watched(url: str) -> tuple[Any, Any]:
    """Return TRL's client of the main process, and what watches it."""
    from accelerate import PartialState
    from trl.generation.vllm_client import VLLMClient

    from moe_replay.trl.vllm_routes import VllmRoutes

    join_world()
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    client = VLLMClient(base_url=url) if state.is_main_process else None
    generation = SimpleNamespace(mode="server", vllm_client=client)
    return client, VllmRoutes(generation, state, MODEL)


def attached(url: str) -> list[np.ndarray]:
    """Return the routes that a rank gets for its two samples of four."""
    from moe_replay.trl.samples import RoutedSample

    client, routes = watched(url)
    if client is not None:
        client.generate(PROMPTS, n=2, max_tokens=2, logprobs=0)
    rank = torch.distributed.get_rank()
    samples = [
        RoutedSample(
            number=number,
            prompt=rank,
            token_ids=np.array([*PROMPTS[rank], 20 + number, 40 + number]),
            num_prompt_tokens=len(PROMPTS[rank]),
            step=0,
        )
        for number in (2 * rank, 2 * rank + 1)
    ]
    return [sample.trace.expert_ids[sample.trace.valid] for sample in routes.attach(samples)]


def test_each_process_gets_the_routes_of_its_own_completions(url):
    for rank, found in enumerate(run_ranks(attached, 2, url)):
        for number, ids in zip((2 * rank, 2 * rank + 1), found, strict=True):
            assert (ids == routes_of(number, len(PROMPTS[rank]) + 1)).all()


def refusal(url: str) -> str:
    try:
        watched(url)
    except UnsupportedError as error:
        return str(error)
    return ""


def test_a_server_without_routes_is_refused_on_every_process():
    silent = CONFIG | {"model_config": {"enable_return_routed_experts": False}}
    with listening(vllm_with(silent)) as url:
        for message in run_ranks(refusal, 2, url):
            assert "was started without --enable-return-routed-experts" in message
            assert "vllm_mode='colocate'" in message


def test_a_server_that_does_not_describe_itself_is_refused_on_every_process():
    with listening(vllm_with(None)) as url:
        for message in run_ranks(refusal, 2, url, timeout_s=120):
            assert "the server does not say how it was started (The vLLM server at" in message


def unreadable_because(url: str) -> str:
    try:
        attached(url)
    except CodecError as error:
        return str(error)
    return ""


def test_one_completion_whose_routes_cannot_be_read_stops_every_process():
    with listening(vllm_with(CONFIG, unreadable)) as url:
        for message in run_ranks(unreadable_because, 2, url, timeout_s=120):
            assert "not valid base64" in message


def test_a_server_that_is_started_as_it_should_be_is_not_refused(url):
    assert run_ranks(refusal, 2, url) == ["", ""]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"speculative_config": {"method": "mtp"}}, "tokens are drafted"),
        ({"parallel_config": {"pipeline_parallel_size": 2}}, "no routes over pipelines"),
        ({"model_config": {}}, "another form"),
        ({"model_config": CONFIG["model_config"] | {"quantization": "fp8"}}, "full precision"),
    ],
)
def test_options_under_which_routes_are_not_those_of_the_tokens_are_named(change, fault):
    from moe_replay.trl.vllm_routes import unusable_because

    assert unusable_because(CONFIG) is None
    assert fault in (unusable_because(CONFIG | change) or "")
