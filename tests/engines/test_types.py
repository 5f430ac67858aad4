import copy
from dataclasses import replace

import numpy as np
import pytest

from moe_replay.engines.checks import check_group, check_groups
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.types import FinishReason, Request, SamplingParams
from moe_replay.errors import EngineError, TokenMismatchError


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


EMPTY = {"token_ids": np.zeros(0, np.int32), "rollout_logprobs": np.zeros(0, np.float32)}


def test_check_group_refuses_a_completion_without_tokens(engine, group):
    with pytest.raises(EngineError, match="0 tokens"):
        check_group(with_first(group, **EMPTY), engine.description)


@pytest.mark.parametrize("num_fed", [0, 1, 2])
def test_e16_a_completion_aborted_before_its_first_token_is_taken(engine, group, num_fed):
    trace = group.completions[0].trace.crop(0, 3)
    fed = replace(trace, valid=np.arange(3) < num_fed)
    aborted = with_first(group, **EMPTY, trace=fed, finish_reason=FinishReason.ABORTED)
    check(engine, aborted, group.request)


@pytest.mark.parametrize("value", [-np.inf, 0.5])
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


SAMPLING = SamplingParams(max_completion_length=8)


def forged(group, **fields):
    """Return the group with its first completion changed, as an engine without annotations may."""
    first, *rest = group.completions
    first = copy.copy(first)
    for name, value in fields.items():
        object.__setattr__(first, name, value)
    return replace(group, completions=(first, *rest))


def check(engine, group, request, *, policy_versions=range(1), vocab_size=32, sampling=SAMPLING):
    check_groups(
        [group],
        [request],
        sampling,
        engine.description,
        vocab_size=vocab_size,
        policy_versions=policy_versions,
    )


def test_t3_what_was_asked_for_is_accepted(engine, group):
    check(engine, group, group.request)
    check(engine, group, group.request, policy_versions=None)


@pytest.mark.parametrize(
    ("field", "dtype", "wanted"),
    [
        ("token_ids", np.int64, "int32"),
        ("token_ids", np.uint16, "int32"),
        ("token_ids", np.float32, "int32"),
        ("rollout_logprobs", np.float64, "float32"),
        ("rollout_logprobs", np.float16, "float32"),
    ],
)
def test_t3_foreign_dtypes_are_refused(engine, group, field, dtype, wanted):
    foreign = getattr(group.completions[0], field).astype(dtype)
    message = f"{field} are a 1-dimensional array of {np.dtype(dtype)}.*dtype=np.{wanted}"
    with pytest.raises(EngineError, match=message):
        check(engine, forged(group, **{field: foreign}), group.request)


@pytest.mark.parametrize("shape", [list, lambda ids: ids[None]])
def test_t3_lists_and_tables_are_refused(engine, group, shape):
    tokens = shape(group.completions[0].token_ids)
    with pytest.raises(EngineError, match="expected a 1-dimensional numpy array of int32"):
        check(engine, forged(group, token_ids=tokens), group.request)


def test_t3_ids_beyond_the_vocabulary_are_refused_with_their_place(engine, group):
    without_routes = copy.copy(engine)
    without_routes._description = replace(engine.description, records_routes=False)
    for wrong in (-1, 32, 2**30):
        tokens = group.completions[0].token_ids.copy()
        tokens[-1] = wrong
        changed = with_first(group, token_ids=tokens)
        with pytest.raises(EngineError, match=f"token {len(tokens) - 1} is {wrong}.*0 to 31"):
            check(without_routes, changed, group.request)


def test_t3_more_tokens_than_asked_for_are_refused(engine, group):
    longest = max(len(completion.token_ids) for completion in group.completions)
    with pytest.raises(EngineError, match=f"{longest} tokens, expected at most {longest - 1}"):
        check(
            engine, group, group.request, sampling=SamplingParams(max_completion_length=longest - 1)
        )


def test_t3_a_finish_reason_that_is_only_its_text_is_refused(engine, group):
    # It equals the member and is not the member: compared with `is`, a cut completion would count
    # as finished.
    assert FinishReason.LENGTH == "length"
    with pytest.raises(EngineError, match=r"finish_reason is 'length'.*FinishReason\.LENGTH"):
        check(engine, forged(group, finish_reason="length"), group.request)


def test_t3_groups_for_other_requests_are_refused(engine, group):
    request = group.request
    others = [
        replace(request, request_id=7),
        replace(request, prompt_ids=np.array([5, 6, 8], dtype=np.int32)),
    ]
    for asked in others:
        with pytest.raises(EngineError, match="one group for each request, in their order"):
            check(engine, group, asked)
    with pytest.raises(EngineError, match="1 groups for 2 requests"):
        check_groups(
            [group],
            [request, request],
            SAMPLING,
            engine.description,
            vocab_size=32,
            policy_versions=range(1),
        )


def test_t15_completions_of_other_weights_are_refused(engine, group):
    with pytest.raises(EngineError, match="policy version 0, the trainer is at 3"):
        check(engine, group, group.request, policy_versions=range(3, 4))


def test_older_completions_are_accepted_as_far_as_allowed(engine, group):
    at = {
        version: with_first(group, policy_version=version, trace=None) for version in (1, 2, 3, 4)
    }
    without_routes = copy.copy(engine)
    without_routes._description = replace(engine.description, records_routes=False)
    for version in (2, 3):
        rest = tuple(replace(c, policy_version=version) for c in at[version].completions)
        check(
            without_routes,
            replace(at[version], completions=rest),
            group.request,
            policy_versions=range(2, 4),
        )
    for version in (1, 4):
        with pytest.raises(EngineError, match=f"version {version}, the trainer is at 3.*2 to 3"):
            check(without_routes, at[version], group.request, policy_versions=range(2, 4))
    # A push came while it was sampled: its oldest token counts.
    crossed = with_first(group, policy_version=3, began_under=1)
    with pytest.raises(EngineError, match="version 1 to 3, the trainer is at 3"):
        check(without_routes, crossed, group.request, policy_versions=range(2, 4))


def test_e6_a_completion_keeps_what_it_was_made_with(engine, group):
    tokens, logprobs = (
        getattr(group.completions[0], name).copy() for name in ("token_ids", "rollout_logprobs")
    )
    made = replace(group.completions[0], token_ids=tokens, rollout_logprobs=logprobs)
    kept = made.token_ids.tolist(), made.rollout_logprobs.tolist()
    # The engine's next answer.
    tokens[:], logprobs[:] = 1, -9.0
    assert (made.token_ids.tolist(), made.rollout_logprobs.tolist()) == kept
    assert kept != (tokens.tolist(), logprobs.tolist())
    with pytest.raises(ValueError, match="read-only"):
        made.token_ids[0] = 1
