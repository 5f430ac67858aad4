"""Runs on several datasets and by a curriculum: resumed exactly, changed on purpose, told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_replay.errors import CheckpointError
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.mixture import CurriculumSection

from .smallest_recipe import problems_of
from .smallest_recipe import recipe as smallest
from .test_documented import undocumented
from .test_loop import run

A = {"name": "a", "dataset": "/a.jsonl"}
B = {"name": "b", "dataset": "reasoning_gym:chain_sum", "weight": 3}
NOTHING: dict[str, Any] = {"train": None}


@pytest.mark.parametrize(
    ("sections", "path", "reason"),
    [
        ({"data": NOTHING}, "data.train", "there is no [[mixture]] table"),
        ({"mixture": [A]}, "data.train", "beside [[mixture]]"),
        ({"data": NOTHING, "mixture": [A, A]}, "mixture.1.name", "is taken"),
        ({"data": NOTHING, "mixture": [A | {"weight": 0}]}, "mixture.0.weight", "greater than 0"),
        (
            {"data": NOTHING, "mixture": [A | {"seed": 3}]},
            "mixture.0.seed",
            "its dataset is a file",
        ),
        ({"data": NOTHING | {"train_seed": 3}, "mixture": [A, B]}, "data.train_seed", "its own"),
        ({"rewards": [{"function": "exact_match", "datasets": "c"}]}, "rewards.0.datasets", "'c'"),
        (
            {
                "data": NOTHING,
                "mixture": [A, B],
                "rewards": [{"function": "exact_match", "datasets": "a"}],
            },
            "rewards",
            "no reward function scores the completions of 'b'",
        ),
        (
            {"data": {"train": B["dataset"]}, "curriculum": {"column": "x"}},
            "curriculum",
            "no column",
        ),
        (
            {"curriculum": {"column": "x", "bands": [[2, 1]]}},
            "curriculum.bands.0",
            "smaller number",
        ),
        (
            {"curriculum": {"column": "x", "bands": [[1, 2]], "band_steps": 3}},
            "curriculum.band_steps",
            "one fewer",
        ),
        (
            {"curriculum": {"column": "x", "bands": [[1, 2]], "order": "ascending"}},
            "curriculum.order",
            "has no effect",
        ),
    ],
)
def test_what_cannot_be_mixed_or_ordered_is_refused(
    sections: dict[str, Any], path: str, reason: str
) -> None:
    found = problems_of(**sections)
    assert path in found and reason in found, found


def test_a_mixture_is_as_many_datasets_and_its_recipe_loads_again() -> None:
    loaded = smallest(data=NOTHING, mixture=[A, B], rewards=[{"function": "soft_overlong"}])
    assert [(each.key, each.name, each.weight) for each in loaded.training_sets] == [
        ("mixture.0.dataset", "a", 1.0),
        ("mixture.1.dataset", "b", 3.0),
    ]
    assert "seed" not in loaded.resolved_table()["mixture"][0]
    # A step of 32 samples has 4 prompts.
    assert [loaded.step_of(position) for position in (0, 3, 4, 11)] == [1, 1, 2, 3]


def test_steps_choose_their_band() -> None:
    section = CurriculumSection(column="x", bands=[(0, 1), (1, 2), (2, 3)], band_steps=[2, 3])
    assert [section.band_of(step) for step in range(1, 8)] == [0, 0, 1, 1, 1, 2, 2]


REWARDS = """
def digits(completions, dataset, level):
    assert all(name == "short" and value in (1, 2, 3) for name, value in zip(dataset, level))
    return [float(sum(c.isdigit() for c in text)) for text in completions]

def letters(completions, dataset, **columns):
    assert set(dataset) <= {"short", "long"}
    return [float(sum(c.isalpha() for c in text)) for text in completions]
"""


def draws(folder: Path, step: int) -> dict[str, int]:
    """Return how often a run has drawn from each dataset, as its checkpoint says."""
    path = folder / "checkpoints" / f"step-{step:06d}" / "position.json"
    return json.loads(path.read_text())["draws"]


def drawn_in(records: list[dict[str, Any]]) -> dict[str, int]:
    """Return how often steps drew from each dataset, as their metrics say."""
    names = ("short", "long")
    return {n: sum(each.get(f"datasets/{n}/num_prompts", 0) for each in records) for n in names}


def write_datasets(folder: Path) -> None:
    """Write nine short and seven long prompts of the levels 1 to 3."""
    for name, count in (("short", 9), ("long", 7)):
        rows = [{"prompt": f"{name} {n}:", "level": 1 + n % 3} for n in range(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)


@pytest.mark.ranks
def test_a_run_on_a_mixture_by_bands_resumes_exactly_and_changes_datasets_on_purpose(
    workspace: Path, tmp_path: Path
) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    text = (workspace / "recipe.toml").read_text()
    (tmp_path / "recipe.toml").write_text(text.replace('train = "train.jsonl"\n', ""))
    write_datasets(tmp_path)
    sets = [f'{{name = "{n}", dataset = "{tmp_path / n}.jsonl"}}' for n in ("short", "long")]
    keys = {
        "model.path": str(workspace / "model"),
        "mixture": f"[{', '.join(sets)}]",
        "curriculum": '{column = "level", bands = [[1, 1], [2, 3]], band_steps = 1}',
        "rewards": f'[{{function = "{tmp_path}/rewards.py:digits", datasets = "short"}}, '
        f'{{function = "{tmp_path}/rewards.py:letters", num_workers = 2}}]',
        "grpo.dynamic_sample": "true",
        "grpo.max_resample_times": 1,
        "checkpoint.export": "false",
        "batch.global_batch_size": 32,
    }

    def asked(steps: int, folder: str) -> Recipe:
        own = {"run.max_steps": steps, "run.output_dir": tmp_path / folder}
        pairs = [(key, str(value)) for key, value in (keys | own).items()]
        return load_recipe(tmp_path / "recipe.toml", pairs)

    whole = run(asked(3, "whole"))
    run(asked(1, "parts"))
    assert run(asked(3, "parts")) == whole
    folder = tmp_path / "whole" / "completions.jsonl"
    kept = [json.loads(line) for line in folder.read_text().splitlines()]
    for line in kept:
        level = 1 + line["item"] % 3
        assert line["prompt"].startswith(line["dataset"])
        assert (level == 1) == (line["step"] == 1)
        assert (line["rewards"]["digits"] is None) == (line["dataset"] == "long")
    assert [record["curriculum/band"] for record in whole] == [0, 1, 1]
    assert whole[0]["curriculum/mean"] == 1
    assert all(2 < record["curriculum/mean"] < 3 for record in whole[1:])
    for record in whole:
        drawn = {name: record[f"datasets/{name}/num_prompts"] for name in ("short", "long")}
        assert sum(drawn.values()) == record["dynamic_sampling/sampled_groups"]
        assert undocumented(record) == set()
    assert {line["dataset"] for line in kept} == {"short", "long"}
    reached = draws(tmp_path / "parts", 3)
    assert reached == drawn_in(whole)
    # Another dataset is another run, unless that is on purpose.
    (tmp_path / "short.jsonl").write_text(
        "".join(f'{{"prompt": "short 5:", "level": {level}}}\n' for level in (1, 2))
    )
    with pytest.raises(CheckpointError, match=r"--allow-changed mixture\.0\.dataset"):
        run(asked(4, "parts"))
    # Each dataset goes on where it was, with other weights too.
    keys["mixture"] = keys["mixture"].replace("}", ", weight = 9}", 1)
    *_, last = run(asked(4, "parts"), allow_changed=["mixture"])
    assert last["step"] == 4 and last["datasets/short/num_prompts"] > 0
    assert draws(tmp_path / "parts", 4) == drawn_in([*whole, last]) != reached
