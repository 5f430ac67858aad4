"""The sweep runs what its page says, and the page holds what the results give."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import many_runs
import many_runs_tables as tables


def line(mode: str, seed: int, k3: float, **values: object) -> dict[str, object]:
    """Return a line of two updates and six steps."""
    return {
        "group": "sweep",
        "name": "demo",
        "updates": 2,
        "mode": mode,
        "seed": seed,
        "k3": [k3] * 6,
        "f_1.1": [0.04] * 6,
        "clipped": [0.01, 0.03, None, 0.01, 0.03, 0.02],
        "reward": [0.1, 0.3, 0.4, 0.4, 0.5, 0.7],
        "held_out": {"0": 0.9, "4": 0.5, "8": 0.4},
        "by_update": {"flip_frac": [0.0, 0.02 + seed / 100]},
    } | values


def test_the_sweep_has_every_mode_update_and_seed_but_what_r2_repeats():
    settings = list(many_runs.sweep(many_runs.SEEDS))
    assert len(settings) == len({setting.key for setting in settings}) == 4 * 3 * 5 - 4
    assert [s.seed for s in settings] == sorted(s.seed for s in settings)
    eight = next(s for s in settings if (s.updates, s.mode, s.seed) == (8, "R3", 3))
    assert "--batch.global_batch_size 16 --batch.steps_per_generation 8 " in eight.command
    assert eight.command.endswith("--replay.router_replay_mode R3 --run.seed 3")


def test_an_interval_is_that_of_student():
    # 1 to 5: a standard deviation of sqrt(2.5), and 2.776 for four degrees of freedom.
    middle, wide = tables.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (middle, wide) == (3.0, pytest.approx(2.776 * math.sqrt(2.5 / 5)))
    assert tables.interval([2.0]) == (2.0, None)


def test_a_row_reads_its_runs():
    lines = [line("R3", seed, 1e-3 * (1 + seed)) for seed in (0, 1)]
    lines.append(line("R3", 2, 1.0, stopped="DivergedError: step 4"))
    cells = tables.row(lines, 2, "R3")
    assert cells[:3] == ["2", "R3", "2, 1 stopped"]
    # Mean 1.5 and a standard deviation of 0.707; 12.706 for one degree of freedom.
    assert cells[3] == "1.50 ± 6.35"
    assert cells[4:8] == ["4.00 ± 0.00", "2.00 ± 0.00", "0.200 ± 0.000", "0.600 ± 0.000"]
    # The untrained model's 90 % is not the best of a trained one.
    assert cells[8:] == ["40.0 ± 0.0", "50.0 ± 0.0"]


def test_differences_are_those_of_the_same_seed():
    lines = [line("disabled", seed, 4e-3 * (1 + seed)) for seed in (0, 1, 2)]
    lines += [line("R3", seed, 1e-3 * (1 + seed), held_out={"8": 0.45}) for seed in (0, 1)]
    (cells,) = tables.paired_rows(lines)
    assert cells[:4] == ["2", "R3", "2", "0.25 (0.25 to 0.25)"]
    assert cells[6:] == ["+5.0 ± 0.0", "-5.0 ± 0.0"]


def test_flips_are_those_before_each_update():
    shown = tables.flips_table([line("R2", seed, 1e-3) for seed in (0, 1)])
    assert shown.splitlines()[0] == "| N | mode | 0 before | 1 before |"
    assert shown.splitlines()[2] == "| 2 | R2 | 0.00 ± 0.00 | 2.50 ± 6.35 |"


def test_a_digest_sees_every_bit_and_no_replay():
    steps = [{"reward": 0.5, "loss": 0.1}]
    assert many_runs.digest(steps) == many_runs.digest([steps[0] | {"replay/coverage": 1.0}])
    assert many_runs.digest(steps) != many_runs.digest([{"reward": 0.5, "loss": 0.1 + 2e-17}])
    assert many_runs.digest(steps) != many_runs.digest(steps * 2)


def test_a_table_goes_between_its_markers_alone():
    text = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n"
    assert tables.put(text, "x", "new") == "a\n<!-- x: begin -->\n\nnew\n\n<!-- x: end -->\nb\n"
    with pytest.raises(AssertionError, match="no section y"):
        tables.put(text, "y", "new")


def test_the_page_is_what_the_results_give():
    page = many_runs.PAGE.read_text()
    for name, table in tables.sections(list(many_runs.read_results().values())).items():
        assert tables.put(page, name, table) == page, (
            f"{name}: run python experiments/many_runs.py --table"
        )
