"""A curriculum by a column: which prompts a step draws from, in which order."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_replay.errors import RecipeError
from moe_replay.recipe.sections.mixture import CurriculumSection
from moe_replay.recipe.sections.run import DataSection
from moe_replay.tasks.datasets import file_prompts
from moe_replay.tasks.datasets.cache import DatasetCache
from moe_replay.tasks.datasets.curriculum import Curriculum
from moe_replay.tasks.datasets.file_prompts import FilePrompts, open_file_prompts
from moe_replay.tasks.encoding import PromptEncoder
from moe_replay.testing.tiny_models import character_tokenizer

HARD = [3, 1, 2, 1, 5, 2]


def opened(
    folder: Path, levels: list[Any] = HARD, *, seed: int | None = None, **keys: Any
) -> FilePrompts:
    path = folder / "prompts.jsonl"
    rows = [
        {"prompt": f"{n}", "extra": {"level": level}, "other": -n} for n, level in enumerate(levels)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = PromptEncoder(
        tokenizer=character_tokenizer(),
        data=DataSection(columns={"level": "extra.level"}, max_prompt_length=20),
    )
    cache = keys.pop("cache", None)
    section = CurriculumSection(**{"column": "level"} | keys)
    return open_file_prompts(path, encoder, shuffle_seed=seed, curriculum=section, cache=cache)


def items(prompts: FilePrompts, position: int, count: int, step: int = 1) -> list[int]:
    return [prompt.index for prompt in prompts.at(position, count, step=step)]


def test_prompts_come_by_their_number_in_every_epoch(tmp_path: Path) -> None:
    # Levels of rows 0 to 5: 3 1 2 1 5 2.
    assert items(opened(tmp_path), 0, 8) == [1, 3, 2, 5, 0, 4, 1, 3]
    falling = opened(tmp_path, order="descending")
    assert items(falling, 0, 6) == [4, 0, 2, 5, 1, 3]
    assert items(opened(tmp_path, column="other"), 0, 3) == [5, 4, 3]


def test_a_prompt_carries_the_number_that_chose_it(tmp_path: Path) -> None:
    numbers = [prompt.difficulty for prompt in opened(tmp_path).at(0, 6)]
    assert numbers == [1, 1, 2, 2, 3, 5]
    banded = opened(tmp_path, bands=[[0, 1], [3, 9]], band_steps=[1])
    assert [prompt.difficulty for prompt in banded.at(0, 2, step=2)] == [3, 5]


def test_equal_numbers_are_shuffled_anew_each_epoch(tmp_path: Path) -> None:
    # By hand the sets of each level; the order within one is the shuffle's.
    levels = [n % 2 for n in range(40)]
    prompts = opened(tmp_path, levels, seed=3)
    first, second = items(prompts, 0, 40), items(prompts, 40, 40)
    for epoch in (first, second):
        assert sorted(epoch[:20]) == list(range(0, 40, 2))
        assert sorted(epoch[20:]) == list(range(1, 40, 2))
    assert first != second and first[:20] != sorted(first[:20])
    assert items(opened(tmp_path, levels, seed=3), 7, 5) == first[7:12]


def test_an_order_is_made_once_while_several_datasets_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int]] = []
    shuffled, ordered = file_prompts._shuffled, Curriculum.ordered

    def counted(num_rows: int, seed: int, epoch: int) -> Any:
        made.append(("shuffled", epoch))
        return shuffled(num_rows, seed, epoch)

    def counted_too(self: Curriculum, prompts: Any) -> Any:
        made.append(("sorted", len(prompts)))
        return ordered(self, prompts)

    monkeypatch.setattr(file_prompts, "_shuffled", counted)
    monkeypatch.setattr(Curriculum, "ordered", counted_too)
    several = []
    for n in range(4):
        (tmp_path / str(n)).mkdir()
        several.append(opened(tmp_path / str(n), seed=n))
    for position in range(6):
        for prompts in several:
            items(prompts, position, 1)
    assert made == 4 * [("shuffled", 0), ("sorted", 6)]
    # A step at the end of an epoch, which several ask for: the orders of both are kept.
    del made[:]
    for _ in range(3):
        items(several[0], 5, 3)
    assert made == [("shuffled", 1), ("sorted", 6)]
    # The control: what is not among the last ones is made again, and nothing else is kept.
    for epoch in (2, 3, 0):
        items(several[0], 6 * epoch, 1)
    assert [epoch for what, epoch in made if what == "shuffled"] == [1, 2, 3, 0]
    assert len(several[0]._orders) == 3
    # A band that has begun is another order of the same epoch.
    banded = opened(tmp_path, seed=1, bands=[[1, 1], [1, 2]], band_steps=[2])
    del made[:]
    for step in (1, 2, 3, 4):
        items(banded, 0, 1, step)
    assert made == [("shuffled", 0), ("sorted", 2), ("shuffled", 0), ("sorted", 4)]


def test_a_step_draws_from_its_band_alone(tmp_path: Path) -> None:
    keys = {"bands": [[1, 1], [1, 2], [2, 9]], "band_steps": [2, 3]}
    prompts = opened(tmp_path, **keys)
    # Rows of level 1: 1, 3. Of 1 to 2: 1, 2, 3, 5. Of 2 and more: 0, 2, 4, 5.
    for step in (1, 2):
        assert items(prompts, 0, 5, step) == [1, 3, 1, 3, 1]
    for step in (3, 4, 5):
        assert items(prompts, 4, 4, step) == [1, 2, 3, 5]
        # Positions count all prompts of the run, so a band may begin in the middle of an epoch.
        assert items(prompts, 6, 4, step) == [3, 5, 1, 2]
    for step in (6, 600):
        assert items(prompts, 0, 4, step) == [0, 2, 4, 5]
    shuffled = opened(tmp_path, seed=1, **keys)
    for epoch in range(3):
        assert sorted(items(shuffled, 4 * epoch, 4, 3)) == [1, 2, 3, 5]


@pytest.mark.parametrize(
    ("levels", "keys", "message"),
    [
        ([1, None], {}, r"prompts.jsonl.*line 2.*column extra.level holds None, expected a finite"),
        ([1, "hard"], {}, "holds 'hard'"),
        ([1, True], {}, "holds True"),
        ([1, 2], {"column": "nowhere"}, "curriculum.column names 'nowhere'"),
        (
            [1, 2],
            {"bands": [[3, 4]]},
            r"bands.0: .* no prompt whose level is from 3 to 4; .* 1 to 2",
        ),
    ],
)
def test_what_cannot_be_ordered_is_refused(
    tmp_path: Path, levels: list[Any], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        opened(tmp_path, levels, **keys)
    # The control: texts that are numbers, as in CSV files.
    assert items(opened(tmp_path, ["2", "1.5"]), 0, 2) == [1, 0]


def test_numbers_of_another_column_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    levels = [n % 7 for n in range(2100)]
    cache = DatasetCache(tmp_path / "cache")
    by_level = opened(tmp_path, levels, cache=cache)
    path = by_level.files[0]
    encoder = by_level.encoder
    again = [
        open_file_prompts(path, encoder, cache=DatasetCache(tmp_path / "cache"), curriculum=section)
        for section in (CurriculumSection(column="level"), CurriculumSection(column="other"))
    ]
    assert any((tmp_path / "cache").rglob("values.npy"))
    assert items(again[0], 0, 3) == items(by_level, 0, 3) == [0, 7, 14]
    assert items(again[1], 0, 3) == [2099, 2098, 2097]
