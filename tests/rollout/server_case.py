"""A fake engine behind servers, and what is asked of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moe_replay.rollout.fake import FakeEngine
from moe_replay.rollout.model_facts import ModelFacts
from moe_replay.rollout.server_engine import ServerEngine
from moe_replay.rollout.server_messages import (
    CONTENT_TYPE,
    PolicyName,
)
from moe_replay.rollout.types import Request, SamplingParams
from moe_replay.routing import RoutedModel

SAMPLING = SamplingParams(max_completion_length=6, seed=3)
SHAPES = {"model.embed_tokens.weight": (4, 2), "lm_head.weight": (4, 2)}
FACTS = ModelFacts(
    vocab_size=32,
    max_context_length=4096,
    eos_ids=(1,),
    routed=RoutedModel(moe_layers=(0, 1), num_decoder_layers=2, num_experts=8, topk=2),
    weight_shapes=SHAPES,
    tied_names=frozenset(),
)
POLICY = PolicyName(run="test", policy_version=0)
HEADERS = {"content-type": CONTENT_TYPE}


def fake() -> FakeEngine:
    return FakeEngine(weight_shapes=SHAPES)


def requests(count: int = 6, *, first: int = 0) -> list[Request]:
    rng = np.random.default_rng(first)
    return [
        Request(
            request_id=first + number,
            prompt_ids=rng.integers(4, 32, 5).astype(np.int32),
            num_generations=2,
        )
        for number in range(count)
    ]


def weights(value: float = 1.0) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.full(shape, value)) for name, shape in SHAPES.items()]


def client(*urls: str, **options: Any) -> ServerEngine:
    fields = {
        "facts": FACTS,
        "run": "test",
        "dtype": "float32",
        "record_routes": True,
        "timeout_s": 300.0,
        **options,
    }
    return ServerEngine(list(urls), **fields)


def tokens(groups: Any) -> list[list[int]]:
    return [c.token_ids.tolist() for group in groups for c in group.completions]
