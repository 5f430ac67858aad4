from dataclasses import replace

import numpy as np
import pytest

from moe_replay.errors import EngineError, TokenMismatchError
from moe_replay.rollout.fake import FakeEngine
from moe_replay.rollout.types import Request, SamplingParams, check_group


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def group(engine):
    request = Request(
        request_id=0, prompt_ids=np.array([5, 6, 7], dtype=np.int32), num_generations=2
    )
    return engine.generate([request], SamplingParams(max_completion_length=8))[0]


def with_first(group, **changes):
    """Return the group with fields of its first completion replaced."""
    first, *rest = group.completions
    return replace(group, completions=(replace(first, **changes), *rest))


def test_check_group_accepts_what_the_fake_returns(engine, group):
    check_group(group, engine.description)


def test_check_group_counts_completions(engine, group):
    with pytest.raises(EngineError, match="got 1 completions, asked for 2"):
        check_group(replace(group, completions=group.completions[:1]), engine.description)


def test_check_group_refuses_a_completion_without_tokens(engine, group):
    empty = {"token_ids": np.zeros(0, np.int32), "rollout_logprobs": np.zeros(0, np.float32)}
    with pytest.raises(EngineError, match="0 tokens"):
        check_group(with_first(group, **empty), engine.description)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 0.5])
def test_check_group_refuses_impossible_logprobs(engine, group, value):
    wrong = group.completions[0].rollout_logprobs.copy()
    wrong[0] = value
    with pytest.raises(EngineError, match="finite and at most 0"):
        check_group(with_first(group, rollout_logprobs=wrong), engine.description)


def test_check_group_misses_no_trace(engine, group):
    with pytest.raises(EngineError, match="no trace"):
        check_group(with_first(group, trace=None), engine.description)


def test_check_group_lets_an_engine_without_routes_have_none(engine, group):
    description = replace(engine.description, records_routes=False)
    check_group(with_first(group, trace=None), description)


def test_check_group_compares_layers_with_the_model(engine, group):
    with pytest.raises(EngineError, match=r"\(0, 1\).*\(1, 2\)"):
        check_group(group, replace(engine.description, moe_layers=(1, 2)))


def test_check_group_binds_routes_to_tokens(engine, group):
    tokens = group.completions[0].token_ids.copy()
    tokens[0] = (tokens[0] + 1) % 32
    with pytest.raises(TokenMismatchError, match="row 3"):
        check_group(with_first(group, token_ids=tokens), engine.description)


def test_check_group_refuses_a_routed_last_row(engine, group):
    trace = group.completions[0].trace
    routed = replace(trace, valid=np.ones_like(trace.valid))
    with pytest.raises(EngineError, match="shifted by one row"):
        check_group(with_first(group, trace=routed), engine.description)
