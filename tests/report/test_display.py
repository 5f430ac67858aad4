"""What the terminal shows, with and without a screen."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from moe_replay.engines.types import RolloutProgress
from moe_replay.grpo.records import EvalRecord, RunSummary, StepRecord
from moe_replay.report.columns import number, percent, tiny
from moe_replay.report.display import ConsoleReporter
from moe_replay.report.run_directory import RunDirectory

SUMMARY = RunSummary(
    sections={"Model": ["tiny, 4 MoE layers", "float32"], "Replay": ["R3 [guard on]"]},
    first_step=1,
    max_steps=12,
)
REPLAYED = {
    "reward": 0.5,
    "rollout_correction/k3_kl": 2.5e-4,
    "rollout_correction/extreme_frac_tau_1.1": 0.003,
    "replay/coverage": 1.0,
    "replay/agreement": 0.97311,
    "completions/mean_length": 37.5,
}


def _console(width: int = 80, *, terminal: bool = False) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        force_terminal=terminal,
        highlight=False,
        legacy_windows=False,
        color_system="standard" if terminal else None,
    )


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _step(step: int, metrics: dict[str, float], seconds: float = 2.0) -> StepRecord:
    return StepRecord(step=step, metrics=metrics, seconds={"rollout": seconds})


def _shown(metrics: dict[str, float], *, width: int = 80) -> list[str]:
    console = _console(width)
    reporter = ConsoleReporter(console)
    reporter.start(SUMMARY)
    reporter.step(_step(1, metrics), [])
    return _text(console).splitlines()


def test_a_log_starts_with_the_summary_as_plain_lines() -> None:
    assert _shown(REPLAYED)[:5] == [
        "Model:",
        "  tiny, 4 MoE layers",
        "  float32",
        "Replay:",
        "  R3 [guard on]",
    ]


def test_a_step_is_one_line_of_aligned_columns() -> None:
    assert _shown(REPLAYED)[5:] == [
        " step   reward    avg10       k3     >1.1 coverage    agree  length  seconds",
        " 1/12   0.5000   0.5000 2.50e-04   0.30 %    100 %  97.31 %   37.50     2.00",
    ]


def test_a_metric_that_is_missing_shows_a_dash() -> None:
    assert _shown({"reward": 0.5})[6].split() == ["1/12", "0.5000", "0.5000", *"-----", "2.00"]


def test_a_wide_line_shows_more_columns() -> None:
    heading, line = _shown(REPLAYED | {"entropy/mean": 1.25, "grad_norm": 0.75}, width=120)[5:]
    assert {"flipped", "entropy", "gradnorm", "loss"} <= set(heading.split())
    assert "1.250" in line
    assert len(line) == len(heading) <= 120


def test_a_log_holds_no_control_codes() -> None:
    console = _console()
    _whole_run(ConsoleReporter(console))
    assert "\x1b" not in _text(console)
    assert "\r" not in _text(console)


def test_a_screen_does_get_control_codes() -> None:
    console = _console(terminal=True)
    _whole_run(ConsoleReporter(console))
    assert "\x1b[" in _text(console)


def test_lines_of_a_log_are_never_wrapped() -> None:
    console = _console(40)
    reporter = ConsoleReporter(console)
    reporter.start(SUMMARY)
    reporter.step(_step(1, REPLAYED), [])
    assert "  97.31 %   37.50     2.00" in _text(console).splitlines()[-1]


def test_column_names_come_back_in_a_long_log() -> None:
    console = _console()
    reporter = ConsoleReporter(console)
    reporter.start(RunSummary(sections={}, first_step=1, max_steps=60))
    for step in range(1, 61):
        reporter.step(_step(step, REPLAYED), [])
    lines = _text(console).splitlines()
    assert [place for place, line in enumerate(lines) if "avg10" in line] == [0, 26, 52]


def test_the_average_covers_the_last_ten_steps() -> None:
    console = _console()
    reporter = ConsoleReporter(console)
    reporter.start(SUMMARY)
    for step in range(1, 13):
        reporter.step(_step(step, {"reward": float(step)}), [])
    # Steps 3 to 12.
    assert _text(console).splitlines()[-1].split()[2] == "7.500"


def _whole_run(reporter: ConsoleReporter) -> None:
    reporter.start(SUMMARY)
    reporter.evaluation(
        EvalRecord(step=0, metrics={"eval/reward": 0.25, "eval/num_items": 64.0}, seconds=1.5), []
    )
    reporter.station(1, "rollout")
    reporter.step(_step(1, REPLAYED | {"live_gap/k3_kl": 2.5e-3}), [])
    reporter.step(_step(2, REPLAYED | {"reward": 0.75}, seconds=4.0), [])
    reporter.evaluation(
        EvalRecord(step=2, metrics={"eval/reward": 0.5, "eval/num_items": 64.0}, seconds=1.5), []
    )
    reporter.finish("trained model in export")


def test_the_end_says_how_the_run_went() -> None:
    console = _console()
    _whole_run(ConsoleReporter(console))
    text = _text(console)
    rows = {line[:23].strip(): line[23:].split() for line in text.splitlines()}
    assert rows["reward"] == ["0.5000", "0.7500", "0.6250", "0.5000", "0.7500"]
    assert "evaluation after step 0: reward 0.2500, num_items 64 (1.5 s)" in text
    assert "held-out reward (64 prompts): 0.2500 after step 0, 0.5000 after step 2" in text
    assert (
        "engine gap (k3) over 1 step that measured both: 2.50e-03 with live routing, "
        "2.50e-04 with replay, 10.0 times less" in text
    )
    assert "seconds a step: 3.00 = rollout 3.00 (100 %)" in text
    assert text.endswith("trained model in export\n")


def test_a_run_without_replay_ends_without_replay_figures() -> None:
    console = _console()
    reporter = ConsoleReporter(console)
    reporter.start(SUMMARY)
    reporter.step(_step(1, {"reward": 0.5, "rollout_correction/k3_kl": 1e-3}), [])
    reporter.finish("done")
    assert "coverage " not in _text(console).split("steps 1 to 1")[1]
    assert "measured both" not in _text(console)


def test_a_resumed_run_summarises_all_its_steps(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.open(recipe_toml="", last_step=0)
    run.write_step(_step(1, {"reward": 0.0}), [])
    run.open(recipe_toml="", last_step=2)
    console = _console()
    reporter = ConsoleReporter(console, run_directory=run)
    reporter.start(RunSummary(sections={}, first_step=3, max_steps=3))
    reporter.step(_step(3, {"reward": 1.0}), [])
    reporter.finish("done")
    text = _text(console)
    assert "at step 3 of 3" in text
    assert "metrics.jsonl has no line for 1 step: 2" in text
    assert "steps 1 to 3" in text
    assert f"run directory: {tmp_path}" in text


def test_d21_a_run_that_is_done_is_not_resumed_past_its_end(tmp_path: Path) -> None:
    said = []
    for first_step in (5, 6):
        console = _console()
        summary = RunSummary(sections={}, first_step=first_step, max_steps=5)
        ConsoleReporter(console).start(summary)
        said.append(_text(console))
    assert "at step 5 of 5" in said[0]
    assert "all 5 steps are already done: there is nothing left to train" in said[1]
    assert "6" not in said[1]


def test_a_screen_shows_station_and_remaining_time_while_it_runs() -> None:
    console = _console(terminal=True)
    now = [100.0]
    reporter = ConsoleReporter(console, clock=lambda: now[0])
    with reporter:
        reporter.start(SUMMARY)
        now[0] = 130.0
        reporter.step(_step(1, REPLAYED), [])
        reporter.station(2, "rollout")
        now[0] = 135.0
        with console.capture() as capture:
            console.print(reporter._progress())
    shown = capture.get()
    # 11 steps of 30 s are left, 5 s of which have passed.
    assert "0:00:35 elapsed, 0:05:25 left" in shown
    assert "rollout 5.0s" in shown


def test_a_log_says_once_a_minute_when_the_run_will_end() -> None:
    console = _console()
    now = [100.0]
    reporter = ConsoleReporter(console, clock=lambda: now[0])
    reporter.start(SUMMARY)
    for step, at in ((1, 130.0), (2, 160.0), (3, 190.0), (4, 220.0), (12, 400.0)):
        now[0] = at
        reporter.step(_step(step, REPLAYED), [])
    said = [line for line in _text(console).splitlines() if "elapsed" in line]
    # Not after 30 s, nor 30 s after the last time, nor after the last step.
    assert said == [
        "step 2/12: 0:01:00 elapsed, about 0:05:00 left",
        "step 4/12: 0:02:00 elapsed, about 0:04:00 left",
    ]


def _rolling(console: Console, progress: RolloutProgress, *, seconds: float) -> ConsoleReporter:
    """Return a reporter whose second rollout has run for some seconds."""
    now = [100.0]
    reporter = ConsoleReporter(console, clock=lambda: now[0])
    reporter.follow(lambda: progress, whose="rank 0 of 8")
    reporter.start(SUMMARY)
    reporter.step(_step(1, REPLAYED | {"completions/mean_length": 1000.0}), [])
    reporter.station(2, "rollout")
    now[0] += seconds
    return reporter


def test_d9_a_log_says_how_far_a_rollout_is() -> None:
    console = _console()
    progress = RolloutProgress(num_finished=2, num_total=8, num_tokens=4000)
    reporter = _rolling(console, progress, seconds=20.0)
    assert reporter._ticker is not None
    reporter.tick()
    assert _text(console).splitlines()[-1] == (
        "rollout of step 2 of rank 0 of 8: 2/8 completions, 4,000 tokens, 200 tokens/s, about 0:00:20 left"
    )
    reporter.station(2, "reward")
    assert reporter._ticker is None
    reporter.tick()
    assert _text(console).count("rollout of step") == 1


def test_d9_a_screen_says_how_far_a_rollout_is() -> None:
    console = _console(terminal=True)
    progress = RolloutProgress(num_finished=2, num_total=8, num_tokens=4000)
    with _rolling(console, progress, seconds=20.0) as reporter, console.capture() as capture:
        assert isinstance(reporter, ConsoleReporter)
        assert reporter._ticker is None
        console.print(reporter._progress())
    assert "2/8 completions, 4,000 tokens, 200 tokens/s, about 0:00:20 left" in capture.get()


def test_d9_an_engine_that_is_silent_costs_no_line() -> None:
    console = _console()
    reporter = _rolling(console, RolloutProgress(), seconds=20.0)
    reporter.tick()
    reporter.close()
    assert "completions" not in _text(console)


def test_d13_what_is_loaded_before_the_start_is_said_at_once() -> None:
    console = _console()
    reporter = ConsoleReporter(console)
    reporter.station(0, "loading the model into the trainer")
    assert _text(console) == "loading the model into the trainer ...\n"
    reporter.start(SUMMARY)
    reporter.station(1, "update")
    assert "update" not in _text(console)


NARROW_HEADINGS = {
    30: ["step", "reward", "agree"],
    40: ["step", "reward", "k3", "agree"],
    48: ["step", "reward", "k3", "agree", "seconds"],
    64: ["step", "reward", "avg10", "k3", "coverage", "agree", "seconds"],
    80: ["step", "reward", "avg10", "k3", ">1.1", "coverage", "agree", "length", "seconds"],
}


@pytest.mark.parametrize("width", NARROW_HEADINGS)
def test_d14_a_narrow_screen_shows_whole_lines_under_their_names(width: int) -> None:
    console = _console(width, terminal=True)
    with ConsoleReporter(console) as reporter:
        reporter.start(SUMMARY)
        with console.capture() as capture:
            reporter.step(_step(1, REPLAYED), [])
    lines = [
        line for line in _plain(capture.get()).splitlines() if "reward" in line or "1/12" in line
    ]
    heading, line = lines
    assert heading.split() == NARROW_HEADINGS[width]
    assert len(heading) == len(line) <= width
    assert "0.5000" in line and "97.31 %" in line


@pytest.mark.parametrize(
    ("width", "columns"), [(40, 2), (48, 3), (56, 3), (80, 5), (140, 5), (30, 1)]
)
def test_d14_the_summary_keeps_the_names_of_its_metrics(width: int, columns: int) -> None:
    console = _console(width, terminal=True)
    with ConsoleReporter(console) as reporter:
        reporter.start(SUMMARY)
        reporter.step(_step(1, REPLAYED | {"live_gap/k3_kl": 2.5e-3}), [])
        with console.capture() as capture:
            reporter.finish("done")
    lines = _plain(capture.get()).splitlines()
    assert all(len(line) <= width for line in lines)
    (row,) = [line for line in lines if line.strip().startswith("tokens off by > 1.1x")]
    assert row.split()[5:] == ["0.30", "%"] * columns
    assert any(line.strip().startswith("completion length") for line in lines)
    assert "…" not in _plain(capture.get())


def _plain(text: str) -> str:
    return Text.from_ansi(text).plain


def test_a_screen_that_changes_its_width_gets_a_new_heading() -> None:
    console = _console(120, terminal=True)
    with ConsoleReporter(console) as reporter:
        reporter.start(SUMMARY)
        with console.capture() as capture:
            reporter.step(_step(1, REPLAYED), [])
            console.width = 40
            reporter.step(_step(2, REPLAYED), [])
    assert sum("reward" in line for line in _plain(capture.get()).splitlines()) == 2


def test_a_failure_gives_the_cursor_back() -> None:
    console = _console(terminal=True)
    with pytest.raises(KeyboardInterrupt), ConsoleReporter(console) as reporter:
        reporter.start(SUMMARY)
        assert "\x1b[?25l" in _text(console)
        raise KeyboardInterrupt
    assert _text(console).rindex("\x1b[?25h") > _text(console).rindex("\x1b[?25l")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.5, "0.5000"),
        (-0.0012, "-0.0012"),
        (1.5, "1.500"),
        (37.5, "37.50"),
        (1e-7, "1.0e-07"),
        (99999.0, "99999.00"),
        (123456.0, "1.2e+05"),
    ],
)
def test_numbers_of_any_size_fit_their_column(value: float, shown: str) -> None:
    assert number(value) == shown
    assert len(shown) <= 8


def test_small_gaps_keep_their_order_of_magnitude() -> None:
    assert [tiny(0.0), tiny(1.234e-5)] == ["0", "1.23e-05"]


def test_nearly_all_is_not_shown_as_all_nor_nearly_none_as_none() -> None:
    shown = [percent(value) for value in (1.0, 0.99999, 0.5, 0.00001, 0.0)]
    assert shown == ["100 %", "99.99 %", "50.00 %", "<0.01 %", "0 %"]
