"""Every metric of a run stands in the table of metrics, and docs/metrics.md is that table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from moe_replay.recipe.recipe import Recipe
from moe_replay.report.metric_table import metric_groups, metric_of, page

from .test_loop import run

ROOT = Path(__file__).parents[2]


def undocumented(metrics: Iterable[str]) -> set[str]:
    """Return the metrics that the table lacks."""
    return {name for name in metrics if metric_of(name) is None}


def unwritten(names: Iterable[str], sources: str) -> set[str]:
    """Return the names of the table whose last part is in no source file."""
    parts = {name: re.split("<|_<", name.rpartition("/")[2])[0] for name in names}
    return {name for name, part in parts.items() if part and part not in sources}


@pytest.mark.ranks
def test_d21_every_metric_of_a_run_is_documented(
    recipe: Callable[..., Recipe], workspace: Path
) -> None:
    loaded = recipe(
        run__max_steps=1,
        grpo__beta=0.1,
        replay__live_gap_every=1,
        megatron__moe_aux_loss_coeff=0.01,
        data__eval=workspace / "train.jsonl",
        data__eval_size=2,
    )
    run(loaded)
    metrics: set[str] = set()
    for name in ("metrics", "eval"):
        for line in (loaded.run.output_dir / f"{name}.jsonl").read_text().splitlines():
            metrics |= json.loads(line).keys()
    assert len(metrics) > 50
    assert undocumented(metrics) == set()


def test_control_a_metric_without_a_row_is_found() -> None:
    given = {"reward", "rewards/mine/std", "live_gap/k3_kl", "replay/rows_live_padding"}
    wrong = {
        "reward_stdd",
        "rewards/mine/median",
        "live_gap/k4",
        "replay/rows",
        "grad_norm/update_",
    }
    assert undocumented(given | wrong) == wrong


def test_no_row_is_about_a_metric_that_nothing_writes() -> None:
    sources = "".join(p.read_text() for p in (ROOT / "src").rglob("*.py"))
    names = [row.name for group in metric_groups() for row in group.rows]
    assert len(names) == len(set(names))
    assert unwritten(names, sources) == set()
    assert unwritten(["replay/flip_frac", "replay/flop_frac_<n>"], sources) == {
        "replay/flop_frac_<n>"
    }


def test_the_page_of_metrics_is_current() -> None:
    written = (ROOT / "docs" / "metrics.md").read_text()
    assert written == page(), "run scripts/metrics, which writes the page again"


def test_every_row_has_a_unit_and_a_definition() -> None:
    rows = [row for group in metric_groups() for row in group.rows]
    assert [row.name for row in rows if not row.text or "|" in "".join(row)] == []
    assert [row.name for row in rows if not row.unit] == ["details"]
