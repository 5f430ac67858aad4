"""Runs on datasets as they come: folders, chats that begin the answer, cut prompts, gaps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_replay.errors import RecipeError
from moe_replay.grpo.inputs import open_inputs, recipe_dataset_files
from moe_replay.grpo.loop import train
from moe_replay.grpo.start.digest_cache import DigestCache
from moe_replay.grpo.start.identity import differences, run_identity
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.ranks import run_ranks

Recipes = Callable[..., Recipe]

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
KEEPS = """
import json, os
def keeps(completions, prompts, answer):
    with open(os.path.join(os.path.dirname(__file__), "seen.jsonl"), "a") as file:
        file.writelines(json.dumps(seen) + "\\n" for seen in zip(prompts, completions, answer))
    return [float(sum(map(str.isdigit, text))) for text in completions]
"""


def chats(folder: Path) -> Path:
    """Write a folder with two splits, each of chats that begin the answer."""
    for split, count in (("train", 12), ("test", 4)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"a rather long question, number {n}"},
                    {"role": "assistant", "content": "It is"},
                ],
                "truth": {"answer": n},
            }
            for n in range(count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}-00000-of-00001.jsonl").write_text(lines)
    return folder


@pytest.mark.ranks
def test_d20_d4_run_on_a_folder_of_chats_that_begin_the_answer(
    recipe: Recipes, workspace: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(workspace / "model", model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "keeps.py").write_text(KEEPS)
    (tmp_path / "data").mkdir()
    mine = recipe(
        model__path=str(model),
        data__train=str(chats(tmp_path / "data")),
        data__eval=str(tmp_path / "data"),
        data__columns__answer="truth.answer",
        data__truncation="left",
        rewards__0__function=f"{tmp_path}/keeps.py:keeps",
        run__max_steps=1,
    )

    def call() -> list[str]:
        with build_reporter(
            mine, rank=torch.distributed.get_rank(), run_directory=RunDirectory(mine.run.output_dir)
        ) as reporter:
            train(mine, process=ProcessSpec(rank=0, world_size=1), reporter=reporter)
        return []

    run_ranks(call, 1)
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert len(seen) == 2 * 4 + 16
    assert all(prompt.endswith("[assistant]It is") for prompt, _, _ in seen)
    assert all(completion.startswith("It is") for _, completion, _ in seen)
    assert {answer for _, _, answer in seen[:4]} == {0, 1, 2, 3}
    step = json.loads((mine.run.output_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert step["prompts/cut_ratio"] == 1.0
    # What is recorded is what the model wrote, and nothing of the prompt.
    kept = (mine.run.output_dir / "completions.jsonl").read_text()
    assert '"completion": "It is' not in kept


def test_r11_row_without_a_column_that_a_built_in_reward_needs_is_refused(
    recipe: Recipes, tmp_path: Path
) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b"}, {"prompt": "c", "answer": None}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    needy = recipe(data__train=str(path), rewards__0__function="exact_match")
    with pytest.raises(RecipeError, match=r"data\.train: 2 of 3 rows have no answer .*line 2"):
        open_inputs(needy)


def test_r11_row_without_a_column_that_an_own_reward_needs_is_pointed_out(
    recipe: Recipes, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("def own(completions, answer): return [0.0] * len(answer)\n")
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": "1", "other": 1}\n{"prompt": "b"}\n')
    inputs = open_inputs(
        recipe(data__train=str(path), rewards__0__function=f"{tmp_path}/own.py:own")
    )
    inputs.close()
    assert len(inputs.notes) == 1
    assert "1 of 2 rows have no answer" in inputs.notes[0]
    assert inputs.notes[0].endswith("reward own gets None for these")


def test_t24_only_the_files_of_the_split_count(recipe: Recipes, tmp_path: Path) -> None:
    folder = chats(tmp_path)
    mine = recipe(data__train=str(folder), data__eval="reasoning_gym:chain_sum")
    train = folder / "train-00000-of-00001.jsonl"
    assert recipe_dataset_files(mine, "data.train") == (train,)
    assert recipe_dataset_files(mine, "data.eval") == ()
    cache = DigestCache(tmp_path / "digests.json")
    before = run_identity(mine, cache)
    (folder / "README.md").write_text("about the data")
    (folder / "test-00000-of-00001.jsonl").write_text('{"prompt": "other"}')
    assert run_identity(mine, cache) == before
    train.write_text(train.read_text().replace("rather", "very"))
    assert [d.key for d in differences(before, run_identity(mine, cache))] == ["data.train"]


def test_evaluation_on_files_that_are_trained_on_is_pointed_out(
    recipe: Recipes, workspace: Path
) -> None:
    inputs = open_inputs(recipe(data__eval=str(workspace / "train.jsonl")))
    inputs.close()
    assert inputs.notes == (
        "data.eval reads files of data.train: the evaluation will show prompts that were trained on",
    )
