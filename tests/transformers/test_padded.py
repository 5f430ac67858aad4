"""Traces laid into a padded batch: each sequence runs the experts that it would run alone."""

import numpy as np
import pytest
import torch

from moe_replay.errors import TokenMismatchError, TraceError
from moe_replay.routing import Origin, RoutingTrace
from moe_replay.transformers import place_traces, record_routes, replay_traces

LENGTHS = (4, 7, 1)


def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(1, 60, length) for length in LENGTHS]


def trace_of(tokens: np.ndarray, routes: np.ndarray) -> RoutingTrace:
    valid = np.ones(len(tokens), dtype=bool)
    valid[-1] = False
    return RoutingTrace.record(
        routes,
        token_ids=tokens,
        valid=valid,
        layers=(0, 1),
        num_experts=16,
        origin=Origin.single(
            engine="e", engine_version="1", policy_version=0, num_rows=len(tokens)
        ),
    )


def other_routes(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, 2, 16)).argsort(axis=2)[..., :4]


def batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, tokens in enumerate(sequences()):
        at = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        ids[number, at] = torch.from_numpy(tokens)
        mask[number, at] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_d16_a_padded_batch_runs_the_experts_of_each_trace_and_padding_runs_live(qwen, side):
    traces = [trace_of(t, other_routes(n, len(t))) for n, t in enumerate(sequences())]
    ids, mask = batch(side)
    with torch.no_grad(), record_routes(qwen) as recorder:
        qwen(ids, attention_mask=mask)
        live = recorder.take().numpy().reshape(*ids.shape, 2, 4)
        with replay_traces(qwen, traces, input_ids=ids, attention_mask=mask):
            with record_routes(qwen) as inside:
                logits = qwen(ids, attention_mask=mask).logits
            ran = inside.take().numpy().reshape(*ids.shape, 2, 4)
    held = mask.numpy().astype(bool)
    for number, trace in enumerate(traces):
        assert (ran[number, held[number]][:-1] == trace.expert_ids[:-1]).all()
    assert (ran[~held][:, 0] == live[~held][:, 0]).all()
    assert logits.isfinite().all()


def test_d16_without_a_mask_there_is_no_padding():
    tokens = np.array([3, 4, 5])
    trace = trace_of(tokens, other_routes(0, 3))
    expert_ids, valid = place_traces([trace, trace], np.stack([tokens, tokens]))
    assert valid.tolist() == [True, True, False] * 2
    assert (expert_ids[:3] == trace.expert_ids).all()


def test_d16_control_a_trace_of_other_tokens_names_the_sequence():
    traces = [trace_of(t, other_routes(n, len(t))) for n, t in enumerate(sequences())]
    ids, mask = batch("left")
    with pytest.raises(TokenMismatchError, match="sequence 1 of the batch: the sample"):
        ids[1, -2] += 1
        place_traces(traces, ids, mask)
    with pytest.raises(TraceError, match="2 traces, input_ids"):
        place_traces(traces[:2], ids, mask)
    with pytest.raises(TraceError, match="expected 1 at tokens and 0 at padding"):
        place_traces(traces, ids, mask * 2)


def test_a_padding_free_batch_runs_each_sequence_as_alone(qwen):
    traces = [trace_of(t, other_routes(n, len(t))) for n, t in enumerate(sequences())]
    alone = []
    with torch.no_grad():
        for trace, tokens in zip(traces, sequences(), strict=True):
            ids = torch.from_numpy(tokens)[None]
            with replay_traces(qwen, [trace], input_ids=ids):
                alone.append(qwen(ids).logits[0])
        packed = torch.from_numpy(np.concatenate(sequences()))[None]
        positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
        with replay_traces(qwen, traces, input_ids=packed):
            logits = qwen(packed, position_ids=positions, use_cache=False).logits[0]
    assert torch.allclose(logits, torch.cat(alone), atol=1e-5)


def test_control_a_padding_free_batch_of_other_tokens_is_refused():
    traces = [trace_of(t, other_routes(n, len(t))) for n, t in enumerate(sequences())]
    packed = np.concatenate(sequences())[None]
    with pytest.raises(TraceError, match="3 traces of 12 rows in all for one row of 11"):
        place_traces(traces, packed[:, :-1])
    with pytest.raises(TokenMismatchError, match="sequence 1 of the batch"):
        place_traces(
            traces, np.roll(packed, 1, axis=1) * (np.arange(12) > 3) + packed * (np.arange(12) < 4)
        )
