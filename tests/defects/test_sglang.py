"""Defects of SGLang and of what reads it: each test would fail if the defect came back."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.servers.engine import ServerEngine
from moe_replay.engines.servers.sglang import SglangCalls
from moe_replay.engines.types import Completion, Request, SamplingParams
from moe_replay.errors import RecipeError
from moe_replay.routing import RoutedModel

from ..support.served import listening
from ..support.sglang_like import SglangLike

pytestmark = pytest.mark.vllm

FACTS = ModelFacts(
    vocab_size=32,
    max_context_length=4096,
    eos_ids=(1,),
    routed=RoutedModel(moe_layers=(0, 1), num_decoder_layers=2, num_experts=8, topk=2),
    weight_shapes={},
    tied_names=frozenset(),
)


def sampled(*, record_routes: bool = True, **options: Any) -> list[Completion]:
    """Return six completions of an SGLang server."""
    application = SglangLike(FakeEngine(), num_decoder_layers=2, **options).application()
    requests = [
        Request(
            request_id=number, prompt_ids=np.array([4, 5 + number], np.int32), num_generations=2
        )
        for number in range(3)
    ]
    with listening(application) as url:
        engine = ServerEngine(
            [url],
            facts=FACTS,
            run="defects",
            dtype="float32",
            record_routes=record_routes,
            connect=partial(SglangCalls, facts=FACTS),
            calls_per_server=1,
        )
        try:
            groups = engine.generate(requests, SamplingParams(max_completion_length=8))
        finally:
            engine.close()
    return [completion for group in groups for completion in group.completions]


def test_d8_an_sglang_server_without_the_capture_flag_is_refused_before_the_first_step():
    blind = {"enable_return_routed_experts": False}
    with pytest.raises(RecipeError, match="--enable-return-routed-experts"):
        sampled(options=blind)
    assert [c.trace for c in sampled(options=blind, record_routes=False)] == [None] * 6


def test_f3_a_retracted_completion_is_kept_without_its_recomputed_routes():
    # Two trial completions come before the first step.
    ours, theirs = sampled(retracted=frozenset({2 + 3})), sampled()
    # Which of the six it is depends on which call arrives fourth.
    (hit,) = [number for number, c in enumerate(ours) if not c.trace.valid.any()]
    assert [bool(c.trace.valid.any()) for c in theirs] == [True] * 6
    assert ours[hit].token_ids.tolist() == theirs[hit].token_ids.tolist()
    assert ours[hit].rollout_logprobs.tolist() == theirs[hit].rollout_logprobs.tolist()
