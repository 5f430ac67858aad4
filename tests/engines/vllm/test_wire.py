from __future__ import annotations

import base64
import io
import itertools

import numpy as np
import pytest

from moe_replay.engines.vllm.wire import (
    RoutePayload,
    check_version,
    payload_of_json,
    trace_from_vllm,
)
from moe_replay.errors import CodecError, EngineError, TraceError, UnsupportedError
from moe_replay.routing import Origin, RoutedModel, RoutingTrace

MODEL = RoutedModel(moe_layers=(1, 3), num_decoder_layers=4, num_experts=64, topk=2)
TOKENS = np.array([7, 3, 9, 5, 4, 8], dtype=np.int32)
NUM_PROMPT = 4
FED = len(TOKENS) - 1
# What each release sends for these tokens: all decoder layers or MoE layers only, in one array or
# two, of this type.
FORMS = [
    ("0.14.1", "joined", "int32"),
    ("0.20.2", "joined", "int32"),
    ("0.21.0", "split", "int16"),
    ("0.22.0", "joined", "uint8"),
    ("0.30.0+cpu", "joined", "uint8"),
    ("0.32.0", "joined", "uint8"),
]


def routes(num_experts: int = 64) -> np.ndarray:
    """Return routes of the fed tokens in which every (row, layer) has ids of its own."""
    first = (np.arange(FED)[:, None] * 7 + np.arange(2)[None, :] * 3) % (num_experts - 1)
    return np.stack([first, first + 1], axis=-1)


def all_layers(rows: np.ndarray) -> np.ndarray:
    """Return the rows with the dense layers 0 and 2 as zeros."""
    whole = np.zeros((len(rows), 4, 2), dtype=rows.dtype)
    whole[:, [1, 3]] = rows
    return whole


def payload(form: str, dtype: str, rows: np.ndarray | None = None) -> RoutePayload:
    rows = (routes() if rows is None else rows).astype(dtype)
    if form == "split":
        return RoutePayload(completion_rows=rows[NUM_PROMPT:], prompt_rows=rows[:NUM_PROMPT])
    return RoutePayload(completion_rows=all_layers(rows))


def read(payload: RoutePayload, version: str, **changes: object) -> RoutingTrace:
    fields = {
        "token_ids": TOKENS,
        "num_prompt_tokens": NUM_PROMPT,
        "model": MODEL,
        "was_cut": False,
        "where": "request 5",
        **changes,
    }
    origin = Origin.single(
        engine="vllm", engine_version=version, policy_version=0, num_rows=len(fields["token_ids"])
    )
    return trace_from_vllm(payload, version=version, origin=origin, **fields)


def npy(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(("version", "form", "dtype"), FORMS)
def test_every_form_gives_the_routes_of_its_tokens(version, form, dtype):
    trace = read(payload(form, dtype), version)
    assert trace.layers == (1, 3)
    assert trace.expert_ids[:-1].tolist() == routes().tolist()
    assert trace.valid.tolist() == [True] * FED + [False]


@pytest.mark.parametrize(("version", "form", "dtype"), FORMS)
def test_every_form_is_refused_with_a_row_too_few(version, form, dtype):
    whole = payload(form, dtype)
    short = RoutePayload(completion_rows=whole.completion_rows[:-1], prompt_rows=whole.prompt_rows)
    with pytest.raises(TraceError, match="request 5"):
        read(short, version)


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint8", "uint16"])
def test_every_width_gives_the_same_trace(dtype):
    assert read(payload("joined", dtype), "0.30.0").expert_ids.dtype == np.uint8


def test_ids_that_their_type_cannot_hold_are_refused():
    model = RoutedModel(moe_layers=(1, 3), num_decoder_layers=4, num_experts=512, topk=2)
    wrapped = payload("joined", "uint8", routes(512) % 256)
    with pytest.raises(TraceError, match=r"uint8, which ends at 255.*512 experts"):
        read(wrapped, "0.30.0", model=model)
    assert read(payload("joined", "uint16", routes(512)), "0.30.0", model=model).num_valid == FED


@pytest.mark.parametrize(
    ("version", "form"), [("0.21.0", "joined"), ("0.30.0", "split"), ("0.20.0", "split")]
)
def test_a_form_of_another_release_is_refused(version, form):
    with pytest.raises(TraceError, match="runs another one than it says"):
        read(payload(form, "int16"), version)


def test_prompt_rows_that_0_21_served_from_its_cache_are_invalid():
    rows = routes()
    rows[:2] = 0
    trace = read(payload("split", "int16", rows), "0.21.0")
    assert trace.valid.tolist() == [False, False, True, True, True, False]


def test_unwritten_rows_of_other_releases_are_refused():
    rows = routes()
    rows[:2] = 0
    with pytest.raises(TraceError, match="unwritten"):
        read(payload("joined", "uint8", rows), "0.30.0")


def test_an_aborted_completion_of_0_20_has_no_routes():
    trace = read(RoutePayload(completion_rows=None), "0.20.0", was_cut=True)
    assert trace.num_valid == 0
    trace.check_tokens(TOKENS, where="here")


@pytest.mark.parametrize(("version", "was_cut"), [("0.20.0", False), ("0.30.0", True)])
def test_missing_routes_name_the_flag(version, was_cut):
    with pytest.raises(EngineError, match="--enable-return-routed-experts"):
        read(RoutePayload(completion_rows=None), version, was_cut=was_cut)


@pytest.mark.parametrize("version", ["0.13.0", "0.9.2"])
def test_a_release_without_routes_is_refused(version):
    with pytest.raises(UnsupportedError, match=r"first release that does is 0\.14"):
        check_version(version)


def test_a_version_that_is_none_is_refused():
    with pytest.raises(UnsupportedError, match="not a version of vLLM"):
        check_version("nightly")


def test_development_versions_count_as_their_release():
    assert check_version("0.21.0rc1.dev5+g0123abc") < check_version("0.22.0")


@pytest.mark.parametrize("encode", [npy, np.ndarray.tolist], ids=["base64", "lists"])
def test_payload_of_json_gives_the_arrays(encode):
    rows = all_layers(routes()).astype(np.uint16)
    read_back = payload_of_json({}, {"routed_experts": encode(rows)}, max_bytes=10_000)
    assert read_back.completion_rows.tolist() == rows.tolist()
    assert read_back.prompt_rows is None


@pytest.mark.parametrize("place", ["choice", "response"])
def test_payload_of_json_finds_the_prompt_in_choice_and_response(place):
    prompt = {"prompt_routed_experts": npy(routes()[:4])}
    choice = {"routed_experts": npy(routes()[4:]), **(prompt if place == "choice" else {})}
    response = prompt if place == "response" else {}
    assert payload_of_json(response, choice, max_bytes=10_000).prompt_rows.shape == (4, 2, 2)


def header(**changes: object) -> bytes:
    """Return a .npy file of 40 zero bytes whose header claims ``changes``."""
    file = io.BytesIO()
    claims = {"descr": "|u1", "fortran_order": False, "shape": (5, 4, 2), **changes}
    np.lib.format.write_array_header_1_0(file, claims)
    return file.getvalue() + bytes(40)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a .npy file"),
        (b"\x80\x04\x95pickle", "expected a .npy file"),
        (header()[:20], "with a sound header"),
        (header()[:-1], "39 bytes after the header, expected 40"),
        (header() + b"\0", "41 bytes after the header"),
        (header(shape=(1 << 40, 4, 2)), "the response was cut"),
        (header(shape=(-5, -4, 2)), "the response was cut"),
        (header(descr="|O"), "expected integers"),
        (header(descr="<f8"), "expected integers"),
        (header(fortran_order=True), "Fortran"),
        (header(shape=(40,)), "expected integers of"),
    ],
)
def test_hostile_npy_files_are_refused(content, message):
    field = base64.b64encode(content).decode()
    with pytest.raises(CodecError, match=message):
        payload_of_json({}, {"routed_experts": field}, max_bytes=10_000)


def test_every_cut_of_a_npy_file_is_refused():
    content = header()
    for end in range(len(content)):
        with pytest.raises(CodecError):
            field = base64.b64encode(content[:end]).decode()
            payload_of_json({}, {"routed_experts": field}, max_bytes=10_000)


@pytest.mark.parametrize(
    "field",
    [7, {"a": 1}, "not base64!", [[[1, 2]], [[1]]], [[[1.5, 2.0]]], [1, 2], [[["a", "b"]]]],
)
def test_fields_that_are_no_array_are_refused(field):
    with pytest.raises(CodecError):
        payload_of_json({}, {"routed_experts": field}, max_bytes=10_000)


def test_a_field_above_the_limit_is_refused_before_it_is_decoded():
    field = npy(all_layers(routes()))
    assert payload_of_json({}, {"routed_experts": field}, max_bytes=len(field)) is not None
    with pytest.raises(CodecError, match="more than the limit of 100 bytes"):
        payload_of_json({}, {"routed_experts": field}, max_bytes=100)


def test_traces_of_all_forms_are_equal():
    traces = [read(payload(form, dtype), version) for version, form, dtype in FORMS]
    for ours, theirs in itertools.pairwise(traces):
        assert (ours.expert_ids == theirs.expert_ids).all() and (ours.valid == theirs.valid).all()


def test_e16_a_request_aborted_before_its_first_token_may_come_without_routes():
    options = {"token_ids": TOKENS[:NUM_PROMPT], "was_cut": True}
    trace = read(RoutePayload(completion_rows=None), "0.30.0", **options)
    assert len(trace) == NUM_PROMPT
    assert not trace.valid.any()
    with pytest.raises(EngineError, match="returned no routes"):
        read(RoutePayload(completion_rows=None), "0.30.0", **{**options, "was_cut": False})
