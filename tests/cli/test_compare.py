"""`moe-replay compare` as a user meets it: tables, JSON, and how it says no."""

import json
from dataclasses import replace

import numpy as np
import pytest

from moe_replay.cli.main import main
from moe_replay.routing import RoutingTrace, write_trace_file
from moe_replay.testing.synthetic_routes import synthetic_trace

TOKENS = {"a": np.array([5, 6, 7, 5]), "b": np.array([8, 9])}


def recorded(*, flips: bool = False, num_layers: int = 3) -> dict[str, RoutingTrace]:
    """Return two traces; with ``flips`` an expert of row 1 of trace a differs in layers 1, 2."""
    traces = {
        name: synthetic_trace(tokens, seed=number, num_layers=num_layers)
        for number, (name, tokens) in enumerate(TOKENS.items())
    }
    if flips:
        ids = traces["a"].expert_ids.copy()
        for layer in (1, 2):
            unused = set(range(16)) - set(ids[1, layer].tolist())
            ids[1, layer, 0] = min(unused)
        traces["a"] = replace(traces["a"], expert_ids=ids)
    return traces


@pytest.fixture
def write(tmp_path):
    def write(name: str, traces: dict[str, RoutingTrace]) -> str:
        write_trace_file(tmp_path / name, traces.items())
        return str(tmp_path / name)

    return write


def refusal(capsys: pytest.CaptureFixture[str], *paths: str) -> str:
    assert main(["compare", *paths]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_compare_prints_json(write, capsys):
    assert (
        main(["compare", "--json", write("a", recorded()), write("b", recorded(flips=True))]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    # Three rows of a and one of b were fed; one of the four flips in two of three layers.
    assert (found["num_tokens"], found["num_skipped"], found["layers"]) == (4, 2, [0, 1, 2])
    assert found["flip_frac"] == pytest.approx(2 / 12)
    assert found["flip_frac_by_layer"] == pytest.approx([0, 0.25, 0.25])
    assert found["flip_frac_by_sequence"] == pytest.approx({"a": 2 / 9, "b": 0})
    assert found["flip_frac_by_position"] == pytest.approx([0, 2 / 3, 0, None], nan_ok=True)
    assert found["token_ids"] == [5, 6, 7, 8]
    assert found["flip_frac_by_token_id"] == pytest.approx([0, 2 / 3, 0, 0])
    assert found["num_tokens_by_flips"] == [3, 0, 1, 0]
    assert found["slot_overlap"] == pytest.approx(1 - 2 / 48)


def test_compare_prints_a_table(write, capsys):
    assert main(["compare", write("a", recorded()), write("b", recorded(flips=True))]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 tokens of 2 sequences in 3 layers; 2 rows are missing in one of them" in shown
    assert "flips, of (token, layer) pairs 16.67 %" in shown
    assert "tokens with a flip in some layer 25.00 %" in shown
    assert "sequence a 22.22 %" in shown
    assert "token id 6 66.67 % 1" in shown


def test_control_a_file_beside_itself_has_no_flip(write, capsys):
    path = write("a", recorded())
    assert main(["compare", path, path]) == 0
    assert "flips, of (token, layer) pairs 0.00 %" in " ".join(capsys.readouterr().out.split())


def test_compare_refuses_traces_of_other_tokens(write, capsys):
    other = {**recorded(), "b": synthetic_trace(np.array([8, 4]), seed=1)}
    message = refusal(capsys, write("a", recorded()), write("b", other))
    assert message.startswith("moe-replay: routes belong to other tokens trace 'b' of ")
    assert "bound to different tokens from row 1 of 2 on" in message


def test_compare_refuses_traces_of_another_model(write, capsys):
    message = refusal(capsys, write("a", recorded()), write("b", recorded(num_layers=4)))
    assert message.startswith("moe-replay: routes are invalid trace 'a' of ")
    assert "recordings of one model compare" in message


def test_compare_refuses_files_of_other_samples(write, capsys):
    other = {"a": recorded()["a"], "c": recorded()["b"]}
    message = refusal(capsys, write("a", recorded()), write("b", other))
    assert "only in the first: ['b'], only in the second: ['c']" in message


def test_compare_refuses_a_file_that_is_no_trace_file(write, capsys, tmp_path):
    (tmp_path / "b").write_text("not traces")
    message = refusal(capsys, write("a", recorded()), str(tmp_path / "b"))
    assert message.startswith("moe-replay: a trace file cannot be used")


def test_compare_refuses_a_file_that_does_not_exist(write, capsys, tmp_path):
    message = refusal(capsys, write("a", recorded()), str(tmp_path / "gone"))
    assert "cannot read" in message
    assert "gone" in message


def test_compare_takes_no_recipe_keys(write, capsys):
    path = write("a", recorded())
    with pytest.raises(SystemExit) as stopped:
        main(["compare", path, path, "--replay.min_coverage", "1"])
    assert stopped.value.code == 2
    assert "only train, rollout, record and doctor take recipe keys" in capsys.readouterr().err


def test_d17_other_tokens_point_to_the_command_that_records_given_ones(write, capsys):
    theirs = recorded()
    theirs["a"] = synthetic_trace(np.array([5, 6, 9, 5]), seed=0, num_layers=3)
    message = refusal(capsys, write("a", recorded()), write("b", theirs))
    assert "bound to different tokens from row 2 of 4 on" in message
    assert "use `moe-replay record RECIPE --from ROLLOUT --output FOLDER`" in message


def test_d17_a_folder_stands_for_the_traces_in_it(write, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(f"{name}/routes.traces", recorded())
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "flips, of (token, layer) pairs 0.00 %" in " ".join(capsys.readouterr().out.split())
    write("b/more.traces", recorded())
    assert "holds 2 trace files; name one of them: more.traces, routes.traces" in refusal(
        capsys, str(tmp_path / "a"), str(tmp_path / "b")
    )
