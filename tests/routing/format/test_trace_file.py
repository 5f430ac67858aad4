"""Trace files: written at once or not at all, read one trace at a time."""

import os

import numpy as np
import pytest

from moe_replay.errors import CodecError
from moe_replay.routing import Encoding, TraceFile, encode_traces, write_trace_file
from moe_replay.routing.format.trace_file import TraceWriter
from moe_replay.testing.synthetic_routes import synthetic_trace

from .any_trace import facts, sets


@pytest.fixture
def step():
    """Traces of three samples."""
    return {
        f"sample {number}": synthetic_trace(np.arange(number, number + 20), seed=number)
        for number in range(3)
    }


def test_a_file_gives_back_every_trace(tmp_path, step):
    write_trace_file(tmp_path / "step.traces", step.items())
    back = dict(TraceFile(tmp_path / "step.traces").items())
    assert {name: (facts(trace), sets(trace)) for name, trace in back.items()} == {
        name: (facts(trace), sets(trace)) for name, trace in step.items()
    }


def test_a_file_holds_the_bytes_of_the_wire(tmp_path, step):
    size = write_trace_file(tmp_path / "step.traces", step.items())
    assert (tmp_path / "step.traces").read_bytes() == encode_traces(step)
    assert size == TraceFile(tmp_path / "step.traces").num_bytes == len(encode_traces(step))


def test_names_and_headers_are_read_without_the_routes(tmp_path, step):
    path = tmp_path / "step.traces"
    write_trace_file(path, step.items())
    stored = bytearray(path.read_bytes())
    places = [TraceFile(path).place(name) for name in step]
    for place in places:
        stored[place.stop - 40 : place.stop - 16] = bytes(24)  # routes, in front of the checksum
    path.write_bytes(stored)
    file = TraceFile(path)
    header = file.header("sample 1")
    assert (len(file), file.names, header.num_rows, header.num_valid, header.layers) == (
        *(3, tuple(step), 20, 19),
        (0, 1, 2),
    )
    with pytest.raises(CodecError, match=r"step.traces, trace 'sample 1': the checksum"):
        file.read("sample 1")


def test_raw_routes_are_mapped(tmp_path, step):
    path = tmp_path / "step.traces"
    write_trace_file(path, step.items(), encoding=Encoding.RAW)
    routes = TraceFile(path).read("sample 2").expert_ids
    assert not routes.flags.owndata and not routes.flags.writeable
    assert np.array_equal(routes[:-1], step["sample 2"].expert_ids[:-1])


def test_mapped_routes_outlive_a_new_file_in_the_old_ones_place(tmp_path, step):
    path = tmp_path / "step.traces"
    write_trace_file(path, step.items(), encoding=Encoding.RAW)
    routes = TraceFile(path).read("sample 0").expert_ids
    write_trace_file(path, [])
    assert np.array_equal(routes[:-1], step["sample 0"].expert_ids[:-1])


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, step):
    path = tmp_path / "step.traces"
    write_trace_file(path, step.items())
    before = path.read_bytes()

    def interrupted():
        yield from step.items()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_trace_file(path, interrupted())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["step.traces"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CodecError, match=r"cannot write .*no/step"):
        write_trace_file(tmp_path / "no" / "step.traces", [])


@pytest.mark.parametrize("name", ["gone.traces", "."])
def test_what_is_no_file_is_refused(tmp_path, name):
    with pytest.raises(CodecError, match="cannot read"):
        TraceFile(tmp_path / name)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(CodecError, match="empty: 0 bytes"):
        TraceFile(tmp_path / "empty")


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path, step):
    write_trace_file(tmp_path / "step.traces", step.items())
    with pytest.raises(CodecError, match=r"no trace 'sample 9'; it holds 3: \['sample 0'"):
        TraceFile(tmp_path / "step.traces").read("sample 9")


def test_a_repeated_name_is_refused(tmp_path, step):
    pair = ("sample 0", step["sample 0"])
    with pytest.raises(CodecError, match="'sample 0' is taken"):
        write_trace_file(tmp_path / "step.traces", [pair, pair])
    assert os.listdir(tmp_path) == []


def test_e7_a_writer_makes_the_same_file_trace_by_trace(tmp_path, step):
    write_trace_file(tmp_path / "whole.traces", step.items())
    writer = TraceWriter(tmp_path / "step.traces")
    for name, trace in step.items():
        writer.append(name, trace)
    with pytest.raises(CodecError, match="'sample 1' is taken"):
        writer.append("sample 1", step["sample 1"])
    writer.finish()
    assert (tmp_path / "step.traces").read_bytes() == (tmp_path / "whole.traces").read_bytes()


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_e7_another_writer_goes_on_behind_the_traces_that_it_keeps(tmp_path, step, kept):
    path = tmp_path / "step.traces"
    write_trace_file(path, step.items())
    whole = path.read_bytes()
    places = [TraceFile(path).place(name) for name in step][:kept]
    writer = TraceWriter(path, places=places)
    end = places[-1].stop if places else 16
    assert writer.num_cut_bytes == (0 if kept == 3 else len(whole) - end)
    for name in list(step)[kept:]:
        writer.append(name, step[name])
    writer.finish()
    assert path.read_bytes() == whole


def test_e7_a_writer_refuses_to_go_on_behind_other_bytes(tmp_path, step):
    path = tmp_path / "step.traces"
    write_trace_file(path, step.items())
    places = [TraceFile(path).place(name) for name in step]
    stored = bytearray(path.read_bytes())
    stored[places[1].stop - 1] ^= 1
    path.write_bytes(stored)
    with pytest.raises(CodecError, match=r"'sample 1': bytes .* do not end with its checksum"):
        TraceWriter(path, places=places)
    path.write_bytes(stored[: places[2].stop - 1])
    with pytest.raises(CodecError, match="was cut off or replaced"):
        TraceWriter(path, places=places)


def test_e7_several_files_read_as_one(tmp_path, step):
    names = list(step)
    parts = [names[:2], names[2:]]
    paths = [tmp_path / f"{number}.traces" for number in range(2)]
    for path, part in zip(paths, parts, strict=True):
        write_trace_file(path, ((name, step[name]) for name in part))
    file = TraceFile(*paths)
    assert file.names == tuple(names)
    assert facts(file.read("sample 2")) == facts(step["sample 2"])
    assert file.num_bytes == sum(path.stat().st_size for path in paths)
    with pytest.raises(CodecError, match=r"1.traces holds a trace 'sample 2', and so does"):
        TraceFile(*paths, paths[1])
