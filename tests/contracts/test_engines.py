from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_replay.engines.checks import check_group, check_groups
from moe_replay.engines.types import FinishReason
from moe_replay.errors import EngineError, RecipeError, TokenMismatchError, UnsupportedError

from .engine_contract import (
    BF16_AGREEMENT,
    SAMPLING,
    changed,
    common_prefix,
    completions_of,
    ends_as_it_says,
    filled_ids,
    forced_agreement,
    forced_logprob_gap,
    long_requests,
    mixed_requests,
    route_agreement,
    shifted_ids,
    truncated_gap,
)


def test_groups_keep_the_contract(engine, groups):
    for group in groups:
        check_group(group, engine.description)


def test_groups_come_back_in_the_order_asked(case, engine):
    requests = mixed_requests(case)[::-1]
    groups = engine.generate(requests, SAMPLING)
    assert [group.request for group in groups] == requests
    assert [len(group.completions) for group in groups] == [r.num_generations for r in requests]


def test_no_requests_give_no_groups(engine):
    assert engine.generate([], SAMPLING) == []


def test_completions_of_one_prompt_differ(case, engine):
    request = replace(mixed_requests(case)[0], num_generations=4)
    (group,) = engine.generate([request], SAMPLING)
    assert len({tuple(c.token_ids.tolist()) for c in group.completions}) == 4


def test_stop_tokens_are_kept_and_end_the_completion(case, engine):
    stops = tuple(range(4, 14))
    sampling = replace(SAMPLING, stop_token_ids=stops)
    groups = engine.generate(mixed_requests(case), sampling)
    ends = [c for _, c in completions_of(groups)]
    assert all(ends_as_it_says(c, {1, *stops}, SAMPLING.max_completion_length) for c in ends)
    assert {c.finish_reason for c in ends} >= {FinishReason.STOP}


def test_ends_as_it_says_catches_a_dropped_stop_token(case, engine):
    stops = tuple(range(4, 14))
    sampling = replace(SAMPLING, stop_token_ids=stops)
    groups = engine.generate(mixed_requests(case), sampling)
    stopped = [
        c
        for _, c in completions_of(groups)
        if c.finish_reason is FinishReason.STOP and len(c.token_ids) > 1
    ]
    cut = replace(
        stopped[0],
        token_ids=stopped[0].token_ids[:-1],
        rollout_logprobs=stopped[0].rollout_logprobs[:-1],
        trace=None,
    )
    assert not ends_as_it_says(cut, {1, *stops}, SAMPLING.max_completion_length)


def test_a_completion_of_one_token_has_prompt_routes_only(case, engine):
    groups = engine.generate(mixed_requests(case), replace(SAMPLING, max_completion_length=1))
    for request, completion in completions_of(groups):
        assert completion.trace.valid.tolist() == [True] * len(request.prompt_ids) + [False]


def test_a_limit_of_a_request_ends_its_own_completions_alone(case, engine):
    requests = mixed_requests(case)
    limits = [3, None, 1, 5, None, 99]
    limited = [
        replace(request, max_completion_length=limit)
        for request, limit in zip(requests, limits, strict=True)
    ]
    free = engine.generate(requests, SAMPLING)
    for group, request, limit in zip(engine.generate(limited, SAMPLING), free, limits, strict=True):
        check_group(group, engine.description)
        for ours, theirs in zip(group.completions, request.completions, strict=True):
            most = min(limit or 20, 20)
            assert ends_as_it_says(ours, {1}, most)
            if case.exact:
                assert ours.token_ids.tolist() == theirs.token_ids[:most].tolist()
    # The control: without limits some completions are longer.
    assert max(len(c.token_ids) for c in free[0].completions) > 3


def test_only_the_last_row_has_no_route(groups):
    for request, completion in completions_of(groups):
        rows = len(request.prompt_ids) + len(completion.token_ids)
        assert completion.trace.valid.tolist() == [True] * (rows - 1) + [False]


def test_routes_are_those_of_running_the_same_tokens_at_once(case, groups):
    agreement = forced_agreement(case, groups)
    assert agreement == 1.0 if case.exact else agreement > BF16_AGREEMENT


def test_forced_agreement_catches_routes_shifted_by_a_token(case, groups):
    shifted = changed(
        groups,
        trace=lambda c: replace(c.trace, expert_ids=shifted_ids(c.trace)),
    )
    assert forced_agreement(case, shifted) < 0.5


def test_forced_agreement_catches_swapped_layers(case, groups):
    swapped = changed(
        groups,
        trace=lambda c: replace(
            c.trace, expert_ids=np.ascontiguousarray(c.trace.expert_ids[:, ::-1])
        ),
    )
    assert forced_agreement(case, swapped) < 0.5


def test_rollout_logprobs_are_the_models_at_the_sampling_temperature(case, groups):
    gap = forced_logprob_gap(case, groups, SAMPLING.temperature)
    assert gap < (1e-5 if case.exact else 0.15)


def test_rollout_logprobs_ignore_truncation(case, engine):
    sampling = replace(SAMPLING, top_k=5, top_p=0.9)
    groups = engine.generate(mixed_requests(case), sampling)
    assert forced_logprob_gap(case, groups, SAMPLING.temperature) < (1e-5 if case.exact else 0.15)


def test_candidates_are_what_tokens_were_drawn_from(case, engine):
    sampling = replace(SAMPLING, top_k=12, top_p=0.9, min_p=0.05, keeps_candidates=True)
    requests = mixed_requests(case)
    if case.name.startswith("sglang"):
        with pytest.raises(UnsupportedError, match="does not return which ids truncation"):
            engine.generate(requests, sampling)
        return
    groups = engine.generate(requests, sampling)
    check_groups(
        groups,
        requests,
        sampling,
        engine.description,
        vocab_size=case.vocab_size,
        policy_versions=range(1),
    )
    gap, difference, same = truncated_gap(case, groups, sampling)
    if case.exact:
        assert gap < 1e-4
        assert difference < 1e-4
        # A token on the border may fall on either side of it.
        assert same > 0.98
    # The control: other limits give other sets.
    assert truncated_gap(case, groups, replace(sampling, top_k=8))[2] < 0.9
    # The draw is that of the same limits without sets, and only log-probabilities differ.
    plain = engine.generate(requests, replace(sampling, keeps_candidates=False))
    for (_, ours), (_, theirs) in zip(completions_of(groups), completions_of(plain), strict=True):
        assert theirs.candidates is None
        if case.exact:
            assert ours.token_ids.tolist() == theirs.token_ids.tolist()
            mass = np.log(ours.candidates.kept_mass)
            assert np.abs(ours.rollout_logprobs + mass - theirs.rollout_logprobs).max() < 1e-4


def test_forced_logprob_gap_catches_another_temperature(case, groups):
    assert forced_logprob_gap(case, groups, 2.0) > 0.2


def test_temperature_0_takes_the_most_likely_token(case, engine):
    if not case.exact:
        pytest.skip("bfloat16 logits have ties and rounding")
    groups = engine.generate(mixed_requests(case), replace(SAMPLING, temperature=0.0))
    for request, completion in completions_of(groups):
        logits, _ = case.forced(np.concatenate([request.prompt_ids, completion.token_ids]), 0)
        best = logits[len(request.prompt_ids) - 1 : -1].argmax(axis=1)
        assert best.tolist() == completion.token_ids.tolist()


def test_a_request_alone_gives_what_it_gives_in_a_batch(case, engine):
    requests = mixed_requests(case)
    together = engine.generate(requests, SAMPLING)
    alone = [engine.generate([request], SAMPLING)[0] for request in requests]
    shared = 0
    for (request, ours), (_, theirs) in zip(
        completions_of(together), completions_of(alone), strict=True
    ):
        if case.exact:
            assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        same = common_prefix(ours, theirs)
        shared += same
        rows = slice(0, len(request.prompt_ids) + max(same - 1, 0))
        agreement = route_agreement(ours.trace.expert_ids[rows], theirs.trace.expert_ids[rows])
        assert agreement == 1.0 if case.exact else agreement > 0.7
        gap = np.abs(ours.rollout_logprobs[:same] - theirs.rollout_logprobs[:same])
        assert gap.max(initial=0.0) < 1e-5 or not case.exact
    assert shared > 0


def test_same_seed_gives_same_completions_in_a_fresh_engine(case, engine, fresh_engine):
    requests = mixed_requests(case)
    ours = completions_of(engine.generate(requests, SAMPLING))
    theirs = completions_of(fresh_engine.generate(requests, SAMPLING))
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.rollout_logprobs.tolist() == b.rollout_logprobs.tolist()
        assert (a.trace.expert_ids == b.trace.expert_ids).all()


@pytest.mark.parametrize("change", ["seed", "request_id"])
def test_another_seed_or_request_gives_other_completions(case, engine, change):
    requests, sampling = mixed_requests(case), SAMPLING
    ours = completions_of(engine.generate(requests, sampling))
    if change == "seed":
        sampling = replace(sampling, seed=12)
    else:
        requests = [replace(r, request_id=r.request_id + 1000) for r in requests]
    theirs = completions_of(engine.generate(requests, sampling))
    same = [
        a.token_ids.tolist() == b.token_ids.tolist()
        for (_, a), (_, b) in zip(ours, theirs, strict=True)
    ]
    assert sum(same) <= 1


def test_a_push_changes_what_is_sampled_and_by_which_version(case, fresh_engine):
    requests = mixed_requests(case)
    before = completions_of(fresh_engine.generate(requests, SAMPLING))
    fresh_engine.load_weights(case.weights(1), policy_version=1)
    groups = fresh_engine.generate(requests, SAMPLING)
    after = completions_of(groups)
    assert fresh_engine.policy_version == 1
    assert {c.policy_version for _, c in before} == {0}
    assert {c.policy_version for _, c in after} == {1}
    assert {s.policy_version for _, c in after for s in c.trace.origin.spans} == {1}
    assert any(
        a.token_ids.tolist() != b.token_ids.tolist()
        for (_, a), (_, b) in zip(before, after, strict=True)
    )
    agreement = forced_agreement(case, groups, seed=1)
    assert agreement == 1.0 if case.exact else agreement > BF16_AGREEMENT


def test_a_push_gives_what_a_fresh_engine_with_these_weights_gives(case, fresh_engine):
    requests = long_requests(case)
    fresh_engine.generate(requests, SAMPLING)
    fresh_engine.load_weights(case.weights(1), policy_version=1)
    ours = completions_of(fresh_engine.generate(requests, SAMPLING))
    started = case.make_at(1)
    theirs = completions_of(started.generate(requests, SAMPLING))
    started.close()
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.rollout_logprobs.tolist() == b.rollout_logprobs.tolist()
        assert (a.trace.expert_ids == b.trace.expert_ids)[a.trace.valid].all()


def test_pushing_back_and_forth_gives_the_first_policy_again(case, fresh_engine):
    if case.name.endswith("fake"):
        pytest.skip("a fake engine's policy follows from its version")
    requests = mixed_requests(case)
    before = completions_of(fresh_engine.generate(requests, SAMPLING))
    for version, seed in enumerate((1, 0, 1, 0), start=1):
        fresh_engine.load_weights(case.weights(seed), policy_version=version)
    after = completions_of(fresh_engine.generate(requests, SAMPLING))
    for (_, a), (_, b) in zip(before, after, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.rollout_logprobs.tolist() == b.rollout_logprobs.tolist()


def test_cached_and_chunked_prompts_have_the_routes_of_cold_ones(case, engine):
    cold = engine.generate(long_requests(case), SAMPLING)
    cached = engine.generate(long_requests(case), SAMPLING)
    for groups in (cold, cached):
        agreement = forced_agreement(case, groups)
        assert agreement == 1.0 if case.exact else agreement > BF16_AGREEMENT
    if case.exact:
        for (_, a), (_, b) in zip(completions_of(cold), completions_of(cached), strict=True):
            assert (np.sort(a.trace.expert_ids) == np.sort(b.trace.expert_ids)).all()


def test_a_pushed_policy_answers_cached_prompts_by_its_own_routes(case, fresh_engine):
    fresh_engine.generate(long_requests(case), SAMPLING)
    fresh_engine.load_weights(case.weights(1), policy_version=1)
    groups = fresh_engine.generate(long_requests(case), SAMPLING)
    agreement = forced_agreement(case, groups, seed=1)
    assert agreement == 1.0 if case.exact else agreement > BF16_AGREEMENT
    assert forced_agreement(case, groups, seed=0) < 0.7


def test_forced_agreement_catches_a_push_that_did_nothing(case, groups):
    assert forced_agreement(case, groups, seed=1) < 0.7


def test_a_push_with_an_unknown_name_raises(case, fresh_engine):
    weights = [*case.weights(1), ("model.layers.77.mlp.gate.weight", torch.zeros(2, 2))]
    with pytest.raises(EngineError, match=r"model\.layers\.77\.mlp\.gate\.weight"):
        fresh_engine.load_weights(weights, policy_version=1)
    assert fresh_engine.policy_version == 0


def test_a_push_with_a_missing_name_raises(case, fresh_engine):
    name, _ = case.weights(1)[-1]
    with pytest.raises(EngineError, match=name.replace(".", r"\.")):
        fresh_engine.load_weights(case.weights(1)[:-1], policy_version=1)


def test_a_push_of_another_shape_raises(case, fresh_engine):
    *rest, (name, tensor) = case.weights(1)
    with pytest.raises(EngineError, match=name.replace(".", r"\.")):
        fresh_engine.load_weights([*rest, (name, tensor[:-1])], policy_version=1)


def test_a_push_of_an_older_version_raises(case, fresh_engine):
    fresh_engine.load_weights(case.weights(1), policy_version=5)
    with pytest.raises(EngineError, match="policy_version 4 was pushed after 5"):
        fresh_engine.load_weights(case.weights(1), policy_version=4)


def test_a_prompt_without_room_in_the_context_raises(case, engine):
    room = engine.description.max_context_length
    request = replace(mixed_requests(case)[0], prompt_ids=np.full(room - 5, 7, dtype=np.int32))
    with pytest.raises(EngineError, match=f"{room - 5} tokens and max_completion_length 6.*{room}"):
        engine.generate([request], replace(SAMPLING, max_completion_length=6))


def test_an_empty_prompt_raises(case, engine):
    request = replace(mixed_requests(case)[0], prompt_ids=np.zeros(0, dtype=np.int32))
    with pytest.raises(EngineError, match="0 prompt tokens"):
        engine.generate([request], SAMPLING)


def test_a_token_outside_the_vocabulary_raises(case, engine):
    request = replace(
        mixed_requests(case)[0], prompt_ids=np.array([5, case.vocab_size], dtype=np.int32)
    )
    with pytest.raises(EngineError, match="another model"):
        engine.generate([request], SAMPLING)


def test_two_requests_of_one_id_raise(case, engine):
    request = mixed_requests(case)[0]
    with pytest.raises(EngineError, match="each once in a call"):
        engine.generate([request, request], SAMPLING)


def test_a_setting_out_of_range_raises(case, engine):
    with pytest.raises(RecipeError, match=r"top_p is 0\.0"):
        engine.generate(mixed_requests(case), replace(SAMPLING, top_p=0.0))


def test_closing_twice_is_allowed_and_ends_the_work(case, fresh_engine):
    fresh_engine.close()
    fresh_engine.close()
    with pytest.raises(EngineError, match="closed"):
        fresh_engine.generate(mixed_requests(case), SAMPLING)
    with pytest.raises(EngineError, match="closed"):
        fresh_engine.load_weights(case.weights(0), policy_version=1)


def test_check_group_catches_swapped_traces(case, engine):
    request = replace(mixed_requests(case)[0], num_generations=2)
    (group,) = engine.generate([request], SAMPLING)
    first, second = group.completions
    swapped = replace(
        group,
        completions=(replace(first, trace=second.trace), replace(second, trace=first.trace)),
    )
    with pytest.raises(TokenMismatchError):
        check_group(swapped, engine.description)


def test_check_group_catches_a_valid_last_row(case, engine):
    (group,) = changed(
        engine.generate(mixed_requests(case)[:1], SAMPLING),
        trace=lambda c: replace(
            c.trace,
            valid=np.ones_like(c.trace.valid),
            expert_ids=filled_ids(c.trace),
        ),
    )
    with pytest.raises(EngineError, match="shifted by one row"):
        check_group(group, engine.description)
