"""Every form in which engines send routes gives the same trace; whatever fits no form raises."""

import numpy as np
import pytest
import torch

from moe_replay.errors import TraceError
from moe_replay.routing import (
    Origin,
    RoutedModel,
    RoutingTrace,
    trace_from_payload,
    trace_from_split_payload,
)

# Layers 0 and 3 are dense: a first-k-dense start and a gap, as a `moe_layer_freq` list makes them.
MODEL = RoutedModel(moe_layers=(1, 2, 4), num_decoder_layers=5, num_experts=16, topk=3)
TOKENS = np.array([7, 8, 9, 3, 4, 5])
PROMPT = 4


def routes(rows: int = 5, *, seed: int = 0, model: RoutedModel = MODEL) -> np.ndarray:
    shape = (rows, len(model.moe_layers), model.num_experts)
    return np.random.default_rng(seed).random(shape).argsort(axis=2)[..., : model.topk]


def all_layers(moe: np.ndarray, filler: int = 0, model: RoutedModel = MODEL) -> np.ndarray:
    every = np.full((len(moe), model.num_decoder_layers, model.topk), filler, dtype=moe.dtype)
    every[:, list(model.moe_layers)] = moe
    return every


def origin(rows: int = len(TOKENS)) -> Origin:
    return Origin.single(engine="vllm", engine_version="1", policy_version=3, num_rows=rows)


def joined(rows, *, tokens=TOKENS, prompt=PROMPT, model=MODEL, **options) -> RoutingTrace:
    return trace_from_payload(
        rows,
        token_ids=tokens,
        num_prompt_tokens=prompt,
        model=model,
        origin=options.pop("origin", origin(len(tokens))),
        where="request 5",
        **options,
    )


def split(prompt_rows, completion_rows, **options) -> RoutingTrace:
    return trace_from_split_payload(
        prompt_rows,
        completion_rows,
        token_ids=TOKENS,
        num_prompt_tokens=PROMPT,
        model=MODEL,
        origin=origin(),
        where="request 5",
        **options,
    )


def as_lists(trace: RoutingTrace) -> tuple:
    return (
        trace.expert_ids[trace.valid].tolist(),
        trace.valid.tolist(),
        trace.layers,
        trace.token_digest.tolist(),
        trace.origin,
    )


EXPECTED = (
    routes().tolist(),
    [True] * 5 + [False],
    (1, 2, 4),
    joined(routes()).token_digest.tolist(),
    origin(),
)


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint8", "uint16"])
@pytest.mark.parametrize("filler", [None, 0, 15, 99])
def test_payload_of_either_layer_form_and_any_width_gives_the_same_trace(filler, dtype):
    moe = routes().astype(dtype)
    trace = joined(moe if filler is None else all_layers(moe, filler))
    assert as_lists(trace) == EXPECTED
    assert trace.expert_ids.dtype == np.uint8
    trace.check_tokens(TOKENS, where="here")


def test_payload_with_minus_one_in_dense_layers_gives_the_same_trace():
    assert as_lists(joined(all_layers(routes(), -1))) == EXPECTED


@pytest.mark.parametrize("filler", [None, 0])
def test_payload_in_two_parts_gives_the_same_trace(filler):
    rows = routes() if filler is None else all_layers(routes(), filler)
    assert as_lists(split(rows[:4], rows[4:])) == EXPECTED


def test_parts_may_differ_in_their_layer_form():
    assert as_lists(split(all_layers(routes())[:4], routes()[4:])) == EXPECTED


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_payload_from_a_later_start_is_the_tail_of_the_whole(start):
    whole, tail = joined(routes()), joined(routes()[start:], start=start)
    assert as_lists(tail) == as_lists(whole.crop(start, 6))
    tail.check_tokens(TOKENS[start:], where="here")


def test_parts_from_a_later_start_are_the_tail_of_the_whole():
    tail = split(routes()[2:4], routes()[4:], start=2)
    assert as_lists(tail) == as_lists(joined(routes()).crop(2, 6))


def test_one_sampled_token_has_no_row_of_its_own():
    trace = joined(routes(4), tokens=TOKENS[:5])
    assert trace.valid.tolist() == [True] * 4 + [False]


def test_dense_layers_cannot_be_taken_for_others_when_every_layer_routes():
    model = RoutedModel(moe_layers=(0, 1, 2), num_decoder_layers=3, num_experts=16, topk=3)
    assert joined(routes(), model=model).layers == (0, 1, 2)


def test_left_out_prompt_rows_are_invalid():
    trace = split(None, routes()[4:])
    assert trace.valid.tolist() == [False] * 4 + [True, False]
    assert trace.expert_ids[4].tolist() == routes()[4].tolist()


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        (6, "a row for the last sampled token"),
        (4, "the rows of the prompt alone"),
        (1, "the rows of the completion alone"),
        (3, "dropped by preemption"),
        (0, "dropped by preemption"),
    ],
)
def test_payload_with_another_row_count_raises_and_says_what_it_looks_like(rows, cause):
    with pytest.raises(
        TraceError, match=f"request 5: the payload has {rows} rows, expected 5.*{cause}"
    ):
        joined(routes(rows))


def test_payload_of_an_engine_that_ignored_the_start_raises():
    with pytest.raises(TraceError, match=r"5 rows, expected 3.*ignored the start of 2"):
        joined(routes(), start=2)


@pytest.mark.parametrize(("prompt", "completion"), [(5, 1), (4, 2), (3, 1), (4, 0), (5, 0)])
def test_parts_with_another_row_count_raise(prompt, completion):
    with pytest.raises(
        TraceError, match=f"{prompt} prompt and {completion} completion rows, expected 4"
    ):
        split(routes(prompt), routes(completion))


@pytest.mark.parametrize("layers", [1, 2, 4, 6])
def test_payload_with_a_layer_count_of_neither_form_raises_with_both(layers):
    rows = np.repeat(routes()[:, :1], layers, axis=1)
    with pytest.raises(TraceError, match=rf"has {layers} layers, expected 5 \(all.*or 3 \(MoE"):
        joined(rows)


def test_payload_with_another_topk_raises():
    with pytest.raises(TraceError, match="names 2 experts per token and layer, the model uses 3"):
        joined(routes()[..., :2])


@pytest.mark.parametrize("rows", [routes().astype(np.float32), routes()[0]])
def test_payload_that_is_no_integer_array_of_three_dims_raises(rows):
    with pytest.raises(TraceError, match=r"expected integers of \[rows, layers, topk\]"):
        joined(rows)


def test_payload_with_an_id_outside_the_model_raises():
    rows = routes()
    rows[2, 1, 0] = 16
    with pytest.raises(TraceError, match="request 5: expert id 16 in row 2"):
        joined(rows)


@pytest.mark.parametrize("place", range(3))
def test_payload_that_names_an_expert_twice_in_one_layer_raises(place):
    rows = routes()
    rows[2, place] = 6
    layer = MODEL.moe_layers[place]
    with pytest.raises(TraceError, match=rf"request 5: row 2, layer {layer}: .* name one twice"):
        joined(rows, unwritten="invalid")


@pytest.mark.parametrize("filler", [0, -1, 255])
def test_unwritten_rows_raise_unless_they_are_allowed(filler):
    rows = routes()
    rows[1:3] = filler
    with pytest.raises(TraceError, match="2 of 5 rows are unwritten, the first is that of token 1"):
        joined(rows)
    trace = joined(rows, unwritten="invalid")
    assert trace.valid.tolist() == [True, False, False, True, True, False]
    assert trace.expert_ids[[0, 3, 4]].tolist() == routes()[[0, 3, 4]].tolist()


def test_unwritten_rows_cannot_be_told_apart_with_one_expert_per_token():
    model = RoutedModel(moe_layers=(0,), num_decoder_layers=1, num_experts=4, topk=1)
    with pytest.raises(TraceError, match="an unwritten row looks like a route to expert 0"):
        joined(routes(model=model), model=model, unwritten="invalid")


def test_e12_one_expert_per_token_cannot_be_refused_by_zeros_unless_the_engine_is_trusted():
    model = RoutedModel(moe_layers=(0, 1), num_decoder_layers=2, num_experts=4, topk=1)
    rows = 1 + routes(model=model) % 3
    # The control: a row that names another expert in one layer was written.
    rows[2, 0] = 0
    assert joined(rows, model=model).valid.tolist() == [True] * 5 + [False]
    rows[2] = 0
    with pytest.raises(
        TraceError, match=r"1 of 5 rows name expert 0 in all 2 layers, the first .* token 2"
    ):
        joined(rows, model=model)
    assert joined(rows, model=model, unwritten="trust").expert_ids[2].tolist() == [[0], [0]]


def test_e12_nothing_is_trusted_where_unwritten_rows_can_be_seen():
    with pytest.raises(TraceError, match="for models with one expert per token"):
        joined(routes(), unwritten="trust")


def test_parts_of_different_types_raise():
    with pytest.raises(TraceError, match="prompt rows are int64 and completion rows int32"):
        split(routes()[:4], routes()[4:].astype(np.int32))


@pytest.mark.parametrize(("prompt", "start"), [(0, 0), (7, 0)])
def test_a_prompt_longer_than_the_tokens_or_empty_raises(prompt, start):
    with pytest.raises(TraceError, match=f"{prompt} prompt tokens of 6"):
        joined(routes(), prompt=prompt, start=start)


@pytest.mark.parametrize("start", [-1, 5])
def test_a_start_outside_the_prompt_raises(start):
    with pytest.raises(TraceError, match=f"rows start at token {start}, expected 0 to 4"):
        joined(routes(), start=start)


@pytest.mark.parametrize("rows", [5, 7])
def test_an_origin_that_covers_other_rows_raises(rows):
    with pytest.raises(TraceError, match=f"cover {rows} rows, expected 6"):
        joined(routes(), origin=origin(rows))


@pytest.mark.parametrize("layers", [(), (2, 1), (1, 1), (-1, 2), (1, 5)])
def test_a_model_whose_layers_are_no_increasing_indices_raises(layers):
    with pytest.raises(TraceError, match="expected increasing indices"):
        RoutedModel(moe_layers=layers, num_decoder_layers=5, num_experts=16, topk=3)


WIDE = RoutedModel(moe_layers=(0, 1), num_decoder_layers=2, num_experts=512, topk=3)


def wrapped(dtype) -> np.ndarray:
    """Return wrapped ids above the type's range that name no expert twice: a wrong route."""
    ids = np.arange(5 * 2 * 3).reshape(5, 2, 3) + 300
    return ids.astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_e20_a_payload_type_that_cannot_hold_the_ids_is_refused_whatever_is_in_it(dtype):
    with pytest.raises(TraceError, match=f"request 5: routes came as {dtype}, which ends at"):
        joined(wrapped(dtype), model=WIDE)
    with pytest.raises(TraceError, match=f"came as {dtype}, which ends at"):
        RoutingTrace.record(
            wrapped(dtype),
            token_ids=TOKENS[:5],
            valid=np.ones(5, dtype=bool),
            layers=(0, 1),
            num_experts=512,
            origin=origin(5),
        )


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int64"])
def test_e20_control_a_type_that_holds_them_is_accepted(dtype):
    ids = wrapped(dtype)
    assert joined(ids, model=WIDE).expert_ids[:5].tolist() == ids.tolist()


def test_d16_a_missing_payload_names_the_flag():
    for call in (lambda: joined(None), lambda: split(routes()[:4], None)):
        with pytest.raises(TraceError, match=r"request 5: the payload is None.*--enable-return-"):
            call()


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint8"])
def test_d16_tensors_of_torch_are_routes_and_tokens(dtype):
    tokens = torch.from_numpy(TOKENS)
    rows = torch.from_numpy(routes().astype(dtype))
    assert as_lists(joined(rows, tokens=tokens)) == EXPECTED
    assert as_lists(split(rows[:4], rows[4:])) == EXPECTED
    made = RoutingTrace.record(
        rows,
        token_ids=tokens[:5],
        valid=torch.ones(5, dtype=torch.bool),
        layers=(1, 2, 4),
        num_experts=16,
        origin=origin(5),
    )
    made.check_tokens(tokens[:5], where="here")
    assert made.expert_ids.tolist() == routes().tolist()


@pytest.mark.parametrize("num_rows", [0, 2, 5, 6])
def test_e16_a_call_that_sampled_nothing_keeps_the_rows_it_fed(num_rows):
    """The last row is the next call's, as always; six rows mean that the whole prompt was fed."""
    rows = routes(6)[:num_rows]
    trace = joined(rows, prompt=6)
    kept = min(num_rows, 5)
    assert trace.valid.tolist() == [True] * kept + [False] * (6 - kept)
    assert trace.expert_ids[:kept].tolist() == rows[:kept].tolist()
    trace.check_tokens(TOKENS, where="here")
    parts = trace_from_split_payload(
        rows,
        routes(0),
        token_ids=TOKENS,
        num_prompt_tokens=6,
        model=MODEL,
        origin=origin(),
        where="request 5",
    )
    assert as_lists(parts) == as_lists(trace)


def test_e16_control_a_call_that_sampled_nothing_has_no_more_rows_than_its_prompt():
    with pytest.raises(TraceError, match="7 rows, expected at most 6: nothing was sampled"):
        joined(routes(7), prompt=6)
