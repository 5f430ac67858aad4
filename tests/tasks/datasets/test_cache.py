"""Facts about a large dataset are computed once, shared, and never used for another file."""

import json
import os
import threading
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moe_replay.errors import RecipeError
from moe_replay.recipe.sections.run import DataSection
from moe_replay.tasks.datasets.cache import DatasetCache, entry_key
from moe_replay.tasks.datasets.file_prompts import FilePrompts, open_file_prompts
from moe_replay.tasks.datasets.tables import open_table
from moe_replay.tasks.encoding import PromptEncoder
from moe_replay.testing.tiny_models import character_tokenizer


def write_rows(path: Path, count: int = 40, words: int = 1) -> Path:
    rows = [{"prompt": f"item {n} " + "word " * words, "answer": str(n)} for n in range(count)]
    rows[3]["answer"] = None
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [f"{row['prompt']},{row['answer'] or ''}" for row in rows]
        path.write_text("\n".join(["prompt,answer", *lines]) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(path: Path, cache: DatasetCache | None = None, **options) -> FilePrompts:
    data = DataSection(train="", **{"max_prompt_length": 200, **options})
    encoder = PromptEncoder(tokenizer=character_tokenizer(), data=data)
    return open_file_prompts(path, encoder, shuffle_seed=1, cache=cache)


def cache_of(folder: Path, reports: list | None = None) -> DatasetCache:
    def report(*report: object) -> None:
        assert reports is not None
        reports.append(report)

    return DatasetCache(folder / "cache", progress=None if reports is None else report, min_bytes=0)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_d6_a_dataset_is_surveyed_once_and_reads_the_same_from_the_cache(tmp_path, suffix):
    path = write_rows(tmp_path / f"p{suffix}")
    expected = opened(path)
    first: list[tuple[str, int, int]] = []
    again: list[tuple[str, int, int]] = []
    made = opened(path, cache_of(tmp_path, first))
    kept = opened(path, cache_of(tmp_path, again))
    assert first[-1] == (f"measuring the prompts of {path}", 40, 40)
    assert again == []
    for source in (made, kept):
        assert source.gap("answer") == expected.gap("answer") is not None
        for one, other in zip(source.at(0, 80), expected.at(0, 80), strict=True):
            assert (one.index, one.text, one.columns) == (other.index, other.text, other.columns)


def test_d6_prompts_are_deleted_alike_with_and_without_the_cache(tmp_path):
    path = write_rows(tmp_path / "p.jsonl")
    options = {"truncation": "delete", "max_prompt_length": 12}
    expected = opened(path, **options)
    for _ in range(2):
        source = opened(path, cache_of(tmp_path), **options)
        assert source.num_deleted == expected.num_deleted == 30
        assert source.rows.tolist() == expected.rows.tolist()


def test_d6_a_file_written_again_with_equal_size_and_time_is_surveyed_again(tmp_path):
    path = write_rows(tmp_path / "p.jsonl")
    opened(path, cache_of(tmp_path))
    before = path.stat()
    moved = (
        path.read_text().replace("item 0 word", "item 0").replace("item 1 word", "item 1 word word")
    )
    path.write_text(moved)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    texts = {prompt.text for prompt in opened(path, cache_of(tmp_path)).at(0, 40)}
    assert {"item 0 ", "item 1 word word "} <= texts


def test_d6_the_key_of_an_entry_changes_with_the_content(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("aaaa")
    os.utime(path, ns=(0, 0))
    key = entry_key([path], "lines")
    assert entry_key([path], "lines") == key
    assert entry_key([path], "survey") != key
    path.write_text("bbbb")
    os.utime(path, ns=(0, 0))
    assert entry_key([path], "lines") != key


def test_d6_settings_that_change_lengths_have_a_survey_of_their_own(tmp_path):
    path = write_rows(tmp_path / "p.jsonl")
    opened(path, cache_of(tmp_path), max_prompt_length=200)
    with pytest.raises(RecipeError, match="max_prompt_length is 5"):
        opened(path, cache_of(tmp_path), max_prompt_length=5)


def test_d6_who_waits_for_another_process_sees_its_progress_and_does_no_work(tmp_path):
    heard = threading.Event()
    reports, made = [], []

    def make(folder: Path) -> None:
        made.append(folder)
        worker.report("reading", 1, 2)
        waiter.start()
        assert heard.wait(timeout=300)
        (folder / "rows").write_text("done")

    def hear(*report: object) -> None:
        reports.append(report)
        heard.set()

    worker = DatasetCache(tmp_path / "cache")
    waiting = DatasetCache(tmp_path / "cache", progress=hear)
    found = []
    waiter = threading.Thread(target=lambda: found.append(waiting.entry("key", make)))
    entry = worker.entry("key", make)
    waiter.join(timeout=300)
    assert found == [entry]
    assert len(made) == 1
    assert reports[0] == ("reading", 1, 2)
    assert entry is not None and (entry / "rows").read_text() == "done"


def test_d6_what_a_killed_process_left_is_made_again(tmp_path):
    unfinished = tmp_path / "cache" / "key.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "half").write_text("half")
    entry = cache_of(tmp_path).entry("key", lambda folder: (folder / "rows").touch())
    assert entry is not None
    assert [file.name for file in entry.iterdir()] == ["rows"]
    assert not unfinished.exists()


def test_d6_a_bad_dataset_leaves_nothing_and_can_be_corrected(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    for _ in range(2):
        with pytest.raises(RecipeError, match="line 2 is not valid JSON"):
            opened(path, cache_of(tmp_path))
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]
    path.write_text('{"prompt": "a"}\n')
    assert opened(path, cache_of(tmp_path)).num_prompts == 1


def test_d6_a_folder_that_cannot_be_written_is_said_and_done_without(tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    cache = cache_of(tmp_path)
    assert opened(write_rows(tmp_path / "p.jsonl"), cache).num_prompts == 40
    assert "set another folder in data.cache_dir" in cache.notes[0]


def test_d6_entries_that_nobody_used_for_a_month_are_removed(tmp_path):
    cache = cache_of(tmp_path)
    old = cache.entry("old", lambda folder: None)
    used = cache.entry("used", lambda folder: None)
    assert old is not None and used is not None
    os.utime(old, (0, 0))
    cache.entry("new", lambda folder: None)
    assert not old.exists()
    assert used.exists()


def test_r12_an_opened_file_of_lines_does_not_hold_its_rows(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", count=2000, words=200)
    open_table(str(path), cache=cache_of(tmp_path))
    tracemalloc.start()
    try:
        table = open_table(str(path), cache=cache_of(tmp_path))
        assert table.row(1999).columns["answer"] == "1999"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 20


def test_r12_a_parquet_file_is_mapped_and_not_loaded(tmp_path):
    path = write_rows(tmp_path / "p.parquet", count=2000, words=100)
    open_table(str(path), cache=cache_of(tmp_path))
    before = pyarrow.total_allocated_bytes()
    table = open_table(str(path), cache=cache_of(tmp_path))
    assert table.row(1999).columns["answer"] == "1999"
    assert pyarrow.total_allocated_bytes() - before < 100_000
