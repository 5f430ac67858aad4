import numpy as np
import torch

from moe_replay.engines.checks import check_group
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.types import Request, SamplingParams


def test_any_push_is_taken_without_declared_shapes():
    engine = FakeEngine()
    engine.load_weights([("anything", torch.zeros(1))], policy_version=3)
    assert engine.policy_version == 3


def test_a_repeated_token_is_routed_differently_along_the_prompt():
    routes = FakeEngine().routes_of(np.full(40, 7))
    assert len(np.unique(routes[:, 0], axis=0)) > 1


def test_more_than_256_experts_come_as_uint16():
    engine = FakeEngine(num_experts=384, topk=8, moe_layers=(3,))
    request = Request(request_id=0, prompt_ids=np.arange(4, 32, dtype=np.int32), num_generations=1)
    (group,) = engine.generate([request], SamplingParams(max_completion_length=30))
    check_group(group, engine.description)
    trace = group.completions[0].trace
    assert trace.expert_ids.dtype == np.uint16
    assert trace.expert_ids.max() > 255
