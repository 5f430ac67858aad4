"""The defect of sending the rows of a prompt again and again."""

import numpy as np

from moe_replay.routing import (
    EngineCall,
    Origin,
    RoutedModel,
    RoutingTrace,
    stitch_turns,
    trace_from_payload,
)

MODEL = RoutedModel(moe_layers=(0, 1), num_decoder_layers=2, num_experts=64, topk=4)


def trace_of(tokens, num_prompt_tokens: int, *, start: int = 0) -> RoutingTrace:
    """Return what an engine gives for ``tokens``: equal routes for equal prompts alone."""
    tokens = np.asarray(tokens)
    order = np.stack(
        [np.random.default_rng(int(t)).random((2, 64)).argsort(axis=1)[:, :4] for t in tokens]
    )
    return trace_from_payload(
        order[start:-1],
        token_ids=tokens,
        num_prompt_tokens=num_prompt_tokens,
        model=MODEL,
        origin=Origin.single(
            engine="vllm", engine_version="1", policy_version=0, num_rows=len(tokens)
        ),
        where="request 0",
        start=start,
    )


def test_f2_turns_that_send_only_their_new_rows_give_the_whole_trace():
    """Turn 2 starts at the token that turn 1 sampled last, which nobody has fed before."""
    first, second = [1, 2, 3, 10, 11], [1, 2, 3, 10, 11, 20, 21, 12, 13]
    made, whole = (
        stitch_turns(
            [
                EngineCall(
                    fed_ids=np.array(tokens[:fed]),
                    sampled_ids=np.array(tokens[fed:]),
                    trace=trace_of(tokens, fed, start=start),
                )
                for tokens, fed, start in ((first, 3, 0), (second, 7, start))
            ],
            where="sample 0",
        )
        for start in (4, 0)
    )
    assert made.trace.valid.tolist() == [True] * 8 + [False]
    assert made.trace.expert_ids.tolist() == whole.trace.expert_ids.tolist()
    assert (made.num_superseded, whole.num_superseded) == (0, 4)
