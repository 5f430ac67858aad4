"""A few rounds of the fuzzer in every test run, and proof that it sees a defect."""

import pytest

from moe_replay.errors import CodecError

from ..support.payload_mutations import frames, payload_of, with_fitting_checksums
from . import fuzz_codec

SEED = 5


def test_fuzzing_finds_nothing():
    outcomes = fuzz_codec.fuzz(2000, SEED)
    assert outcomes["damaged, refused"] == 1000
    assert outcomes["hostile, refused"] > 500
    assert outcomes["hostile, decoded"] > 50


def test_fuzzing_sees_a_damaged_payload_that_is_decoded():
    payload = fuzz_codec.intact_payloads(SEED)[1]
    with pytest.raises(AssertionError, match="although its checksums do not fit"):
        fuzz_codec.outcome_of(payload, must_raise=True)


def test_fuzzing_sees_another_exception(monkeypatch):
    def crash(payload):
        raise IndexError("planted")

    monkeypatch.setattr(fuzz_codec, "decode_traces", crash)
    with pytest.raises(IndexError, match="planted"):
        fuzz_codec.fuzz(1, SEED)


def test_intact_payloads_decode():
    for payload in fuzz_codec.intact_payloads(SEED):
        assert fuzz_codec.outcome_of(payload, must_raise=False) == "decoded"


def test_rebuilt_payloads_are_the_intact_ones():
    for payload in fuzz_codec.intact_payloads(SEED):
        assert payload_of(frames(payload)) == payload == with_fitting_checksums(payload)


def test_a_refused_payload_counts_as_refused():
    assert fuzz_codec.outcome_of(b"", must_raise=True) == "refused"
    with pytest.raises(CodecError):
        fuzz_codec.decode_traces(b"")
