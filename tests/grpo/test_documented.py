"""Every metric of a run stands in the documentation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_replay.recipe.recipe import Recipe

from .test_loop import run

PAGE = Path(__file__).parents[2] / "docs" / "how-it-works.md"
# Names on the page that stand for the rest of a name, after the group that the row begins with.
GROUPS = re.compile(r"`([a-z_]+/)")


def documented(page: str) -> set[str]:
    """Return the metrics that the tables of a page name, ``<...>`` as they stand there."""
    names: set[str] = set()
    for line in page.splitlines():
        if not line.startswith("| `"):
            continue
        found = re.findall(r"`([^`]+)`", line)
        group = found[0].rpartition("/")[0]
        names.update(found)
        # `a/b_1`, `_2` and `a/b`, `c` share what comes before.
        names.update(f"{group}/{name}" for name in found)
        stem = found[0].rpartition("_")[0]
        names.update(f"{stem}{name}" for name in found if name.startswith("_"))
        names.update(f"{group}/{name[4:]}" for name in found if name.startswith(".../"))
    return names


def undocumented(metrics: set[str], page: str) -> set[str]:
    """Return the metrics that no row of a page names."""
    names = documented(page) | set(re.findall(r"`(eval/[^`]+)`", page))
    patterns = [re.escape(name).replace("<function>", "[^/]+") for name in names]
    patterns = [re.sub(r"<[a-z]+>", "[a-z_0-9]+", name) for name in patterns]
    known = re.compile("|".join(f"(?:{name})" for name in patterns))
    same = {name.replace("live_gap/", "rollout_correction/") for name in metrics}
    return {name for name in same if not known.fullmatch(name)}


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
    assert undocumented(metrics, PAGE.read_text()) == set()


def test_undocumented_finds_one():
    page = "| `a/b`, `c`, `_d` | text |\n| `a/x_1`, `_2` | |\n| `r/<function>/m`, `.../s` | |\n"
    given = {"a/b", "a/c", "a/x_2", "r/mine/m", "r/<function>/s"}
    assert undocumented({*given, "a/missing"}, page) == {"a/missing"}
