"""The page as a file: it loads nothing, escapes everything, and has a bounded size."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import datetime

import pytest

from moe_replay.cli.main import main
from moe_replay.grpo.records import CompletionRecord, StepRecord
from moe_replay.report.page import open_runs, page_of
from moe_replay.report.page.samples import MAX_CHARACTERS, shown_samples
from moe_replay.report.page.write import differing_keys, embedded, visible

from .conftest import HOSTILE

NOON = datetime(2026, 12, 1, 12)


def markup_of(page: str) -> str:
    """Return the page without its scripts, which are megabytes."""
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def facts_of(page: str):
    (found,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', page)
    return json.loads(found)


def test_no_text_of_a_run_leaves_its_place(tmp_path, make_run):
    hostile = tmp_path / "<script>alert(1)"
    page = page_of(open_runs([make_run(hostile, dropped_step=2)]), written_at=NOON)
    markup = markup_of(page)
    assert "&lt;script&gt;alert(1)" in markup
    assert [text for text in ("<script>alert", "<img", "\u202e") if text in page] == []
    assert facts_of(page)["samples"][0][0]["completion"] == HOSTILE


def test_embedded_json_holds_no_character_that_html_reads():
    text = embedded({"text": HOSTILE + "<!--"})
    assert not set(text) & set("<>&")
    assert json.loads(text) == {"text": HOSTILE + "<!--"}
    assert visible("a\u202eb\u0000") == "a⟨U+202E⟩b⟨U+0000⟩"


def test_the_page_names_no_address_that_a_browser_would_load(tmp_path, make_run):
    page = page_of(open_runs([make_run(tmp_path / "a")]), written_at=NOON)
    markup = markup_of(page)
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|url\(|@import|https?://', markup) == []
    assert "default-src &#39;none&#39;; script-src &#39;sha256-" in markup


def test_a_run_killed_before_its_first_step_has_a_page_that_says_so(tmp_path, make_run):
    page = page_of(open_runs([make_run(tmp_path / "a", steps=0)]), written_at=NOON)
    assert "No step has finished" in markup_of(page)
    assert facts_of(page)["figures"] == {}


def test_differing_keys_are_listed_and_equal_ones_are_not(tmp_path, make_run):
    runs = open_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", mode="disabled")])
    assert differing_keys(runs).rows == [["replay.router_replay_mode", '"R3"', '"disabled"']]
    assert differing_keys(runs[:1]) is None


def test_the_samples_of_a_long_run_are_bounded_and_hold_the_dropped_one(tmp_path, make_run):
    (run,) = open_runs([make_run(tmp_path / "a", steps=40, dropped_step=23)])
    shown = shown_samples(run)
    steps = {sample["step"] for sample in shown.samples}
    assert len(steps) == 12
    assert {1, 23, 40} <= steps
    assert [s["sample"] for s in shown.samples if s["dropped"]] == [1]
    assert "12 of 40 steps" in shown.note


def test_a_late_dropped_sample_of_a_step_is_shown_and_long_texts_are_cut(tmp_path, make_run):
    (run,) = open_runs([make_run(tmp_path / "a", steps=0)])
    step = StepRecord(step=1, metrics={}, seconds={})
    samples = [
        CompletionRecord(
            step=1,
            item=0,
            prompt="",
            columns={},
            completion="x" * 5000,
            rewards={},
            reward=None,
            advantage=0.0,
            num_tokens=1,
            finish_reason="stop",
            policy_version=0,
            sample=number,
            dropped="misaligned" if number == 30 else None,
        )
        for number in range(32)
    ]
    run.directory.write_step(step, samples)
    shown = shown_samples(replace(run, steps=(step,))).samples
    assert [sample["sample"] for sample in shown] == [*range(11), 30]
    assert shown[0]["completion"] == "x" * MAX_CHARACTERS + " [… 1,000 more characters]"


def test_a_page_of_ten_thousand_steps_and_128_layers_is_bounded(tmp_path, make_run):
    (run,) = open_runs([make_run(tmp_path / "a", steps=1)])
    small = len(page_of([run], written_at=NOON))
    held = {"layers": list(range(128)), "flip_frac": [1 / 3] * 128}
    steps = tuple(
        replace(
            run.steps[0],
            step=number,
            details={**run.steps[0].details, "replay/flip_frac": held},
        )
        for number in range(1, 10_001)
    )
    page = page_of([replace(run, steps=steps)], written_at=NOON)
    # 14 metrics of 500 points and 128 x 239 cells, none of which takes more than 12 characters.
    assert len(page) - small < 1_500_000
    assert "each point is the mean of up to 20 neighbouring steps" in markup_of(page)


def test_the_command_writes_the_page_and_says_where(tmp_path, make_run, capsys):
    folder = make_run(tmp_path / "a", steps=1)
    assert main(["report", str(folder)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    assert main(["report", str(folder), "--out", str(tmp_path / "new" / "page.html")]) == 0
    page = (tmp_path / "new" / "page.html").read_text()
    assert "<title>a · moe-replay report" in markup_of(page)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "a run directory cannot be read\n.*nowhere does not exist"),
        (["a", "--out", "a"], "cannot write a: Is a directory"),
    ],
)
def test_the_command_refuses_with_a_message(
    arguments, said, tmp_path, make_run, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", steps=1)
    assert main(["report", *arguments]) == 2
    assert re.search(said, capsys.readouterr().err)
