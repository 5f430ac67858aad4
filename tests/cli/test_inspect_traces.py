"""`moe-replay inspect` as a user meets it: tables, JSON, and how it says no."""

import json

import numpy as np
import pytest

from moe_replay.cli.main import main
from moe_replay.routing import (
    Encoding,
    Origin,
    PolicySpan,
    RoutingTrace,
    TraceFile,
    write_trace_file,
)
from moe_replay.testing.synthetic_routes import synthetic_trace

# Layer 3 uses expert 0 in every row; layer 5 uses each of four experts equally; 6 and 7 are never
# used.
IDS = np.array(
    [[[0, 1], [2, 3]], [[0, 4], [4, 5]], [[0, 2], [2, 3]], [[0, 1], [4, 5]], [[9, 9]] * 2]
)


def recorded(name: str = "embedded", num_rows: int = 5) -> RoutingTrace:
    """Return a trace whose last row is not valid, and whose weights changed after two rows."""
    trace = RoutingTrace.record(
        IDS,
        token_ids=np.array([11, 12, 13, 14, 15]),
        valid=np.arange(5) < 4,
        layers=(3, 5),
        num_experts=8,
        origin=Origin(
            engine=name,
            engine_version="1.2",
            spans=(
                PolicySpan(start=0, stop=2, policy_version=6),
                PolicySpan(start=2, stop=5, policy_version=7),
            ),
        ),
    )
    return trace.crop(0, num_rows)


@pytest.fixture
def write(tmp_path):
    def write(traces: dict[str, RoutingTrace], encoding: Encoding = Encoding.COMPACT) -> str:
        write_trace_file(tmp_path / "step.traces", traces.items(), encoding=encoding)
        return str(tmp_path / "step.traces")

    return write


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["inspect", *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_inspect_prints_json(write, capsys):
    path = write({"a": recorded(), "b": recorded(num_rows=2)})
    found = json.loads(shown(capsys, "--json", path))
    assert (found["num_traces"], found["num_rows"], found["num_valid"]) == (2, 7, 6)
    assert found["num_bytes"] == TraceFile(path).num_bytes
    assert found["bytes_per_token"] == found["num_bytes"] / 7
    first, second = found["traces"]
    assert (first["name"], first["layers"], first["topk"], first["num_experts"]) == (
        *("a", [3, 5]),
        *(2, 8),
    )
    assert first["spans"][1] == {"start": 2, "stop": 5, "policy_version": 7}
    assert second["spans"] == [{"start": 0, "stop": 2, "policy_version": 6}]
    assert first["checksum"] == TraceFile(path).place("a").checksum.hex()
    assert first["token_digest"] == f"{int(recorded().token_digest[-1]):016x}"


def test_inspect_counts_the_load_of_valid_rows_only(write, capsys):
    (load,) = json.loads(shown(capsys, "--json", write({"a": recorded()})))["loads"]
    assert load["num_tokens"] == 4
    # Expert 0 of layer 3 is chosen by each token: 4 of 8 slots, where even routing gives it one of
    # 8.
    assert load["by_layer"] == [
        {
            "layer": 3,
            "max_relative_load": 4.0,
            "hottest_experts": [0, 1, 2, 4],
            "unused_experts": [3, 5, 6, 7],
        },
        {
            "layer": 5,
            "max_relative_load": 2.0,
            "hottest_experts": [2, 3, 4, 5],
            "unused_experts": [0, 1, 6, 7],
        },
    ]


def test_inspect_adds_up_the_loads_of_one_model(write, capsys):
    path = write({"a": recorded(), "b": recorded(num_rows=2)})
    (load,) = json.loads(shown(capsys, "--json", path))["loads"]
    assert load["num_tokens"] == 6
    # The first two rows, twice: expert 4 of layer 3 overtakes expert 2.
    assert load["by_layer"][0]["hottest_experts"] == [0, 1, 4, 2]


def test_inspect_keeps_the_loads_of_two_models_apart(write, capsys):
    path = write({"a": recorded(), "b": recorded().select_layers([5])})
    loads = json.loads(shown(capsys, "--json", path))["loads"]
    assert [[layer["layer"] for layer in load["by_layer"]] for load in loads] == [[3, 5], [5]]


def test_inspect_prints_tables(write, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    out = shown(capsys, write({"a": recorded()}, Encoding.RAW))
    assert "1 traces, 5 rows, 4 of them valid" in out
    assert "a 5 4 6 (rows 0:2), 7 (rows 2:5) raw" in out
    assert "recorded by embedded 1.2" in out
    assert "top-2 of 8 experts in layers 3, 5, 4 tokens; load 1 is even, 4.0 is every token" in out
    assert "3 0 (4.00), 1 (2.00), 2 (1.00), 4 (1.00) 4" in out


def test_inspect_shows_names_and_obeys_nothing_in_them(write, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    out = shown(capsys, write({"[red]a[/red]": recorded("\x1b[2Jx")}))
    assert "[red]a[/red] 5 4" in out
    assert r"\x1b[2Jx" in out and "\x1b" not in out


def test_inspect_accepts_a_file_without_traces(write, capsys):
    assert "0 traces, 0 rows" in shown(capsys, write({}))


def test_inspect_accepts_a_trace_without_rows(write, capsys):
    path = write({"a": recorded(num_rows=0)})
    assert "a 0 0 -" in shown(capsys, path)
    assert json.loads(shown(capsys, "--json", path))["traces"][0]["bytes_per_token"] is None


def test_inspect_refuses_a_damaged_file(write, capsys, tmp_path):
    path = write({"a": recorded()})
    stored = bytearray((tmp_path / "step.traces").read_bytes())
    stored[60] ^= 1
    (tmp_path / "step.traces").write_bytes(stored)
    assert main(["inspect", path]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    message = " ".join(captured.err.split())
    assert message.startswith("moe-replay: a trace file cannot be used")
    assert "step.traces, trace 'a': the checksum does not fit" in message


def test_inspect_refuses_what_is_no_trace_file(capsys, tmp_path):
    assert main(["inspect", str(tmp_path / "gone")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_inspect_says_what_a_run_directory_and_a_text_file_are(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    for path, what in (
        (tmp_path, "is a run directory without trace files (*.traces)"),
        (tmp_path / "metrics.jsonl", "is a text file, but trace files are binary"),
    ):
        assert main(["inspect", str(path)]) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert what in message
        assert "`moe-replay rollout` and `moe-replay record` write trace files" in message
        assert "from_text" not in message


def test_d14_inspect_is_readable_from_40_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    tokens = np.array([5, 6, 7, 5])
    write_trace_file(tmp_path / "a.traces", [("0/0", synthetic_trace(tokens, seed=0))])
    assert main(["inspect", str(tmp_path / "a.traces")]) == 0
    shown = capsys.readouterr().out
    assert "0/0     4      3" in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 40
