"""Datasets of every form read alike, and errors name file, line and column."""

import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moe_replay.errors import RecipeError
from moe_replay.recipe.sections.run import DataSection
from moe_replay.tasks.datasets.file_prompts import open_file_prompts
from moe_replay.tasks.datasets.files import dataset_files
from moe_replay.tasks.datasets.tables import column_value, open_table
from moe_replay.tasks.encoding import PromptEncoder
from moe_replay.testing.tiny_models import character_tokenizer

ROWS = [{"prompt": f"item {n}", "answer": str(n)} for n in range(5)]


def encoder(**options) -> PromptEncoder:
    data = DataSection(train="", max_prompt_length=200, **options)
    return PromptEncoder(tokenizer=character_tokenizer(), data=data)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(table) -> list[dict]:
    by_number = [dict(table.row(number).columns) for number in range(len(table))]
    assert by_number == [dict(row.columns) for row in table.scan()]
    return by_number


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ".arrow"])
def test_d20_every_kind_of_file_gives_the_same_prompts(tmp_path, suffix):
    path = write_rows(tmp_path / f"p{suffix}", ROWS)
    assert plain(open_table(str(path))) == ROWS
    prompts = open_file_prompts(path, encoder()).at(0, 5)
    assert [prompt.text for prompt in prompts] == [row["prompt"] for row in ROWS]
    assert prompts[3].columns == {"answer": "3"}


def test_d20_json_file_that_holds_lines_is_read_as_lines(tmp_path):
    (tmp_path / "p.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert plain(open_table(str(tmp_path / "p.json"))) == ROWS


def test_d20_fields_of_a_csv_stay_texts(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,answer\na,007\n"b, ""c""\nd",\ne,NA\n')
    assert plain(open_table(str(tmp_path / "p.csv"))) == [
        {"prompt": "a", "answer": "007"},
        {"prompt": 'b, "c"\nd', "answer": None},
        {"prompt": "e", "answer": "NA"},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"prompt,answer\na\n", "Expected 2 columns, got 1"),
        (b"prompt,answer\na,1\n\xff,2\n", "line 3 is not UTF-8"),
        (b"\xffprompt,answer\na,1\n", "first line is not UTF-8"),
        (b"prompt,prompt\na,b\n", "the column prompt more than once"),
    ],
)
def test_d20_damaged_csv_is_refused(tmp_path, text, message):
    (tmp_path / "p.csv").write_bytes(text)
    with pytest.raises(RecipeError, match=message):
        open_table(str(tmp_path / "p.csv"))


def shards(folder: Path, count: int = 3, total: int | None = None) -> Path:
    for number in range(count):
        name = f"train-{number:05}-of-{total or count:05}.parquet"
        write_rows(folder / "data" / name, [{"prompt": f"shard {number}"}])
    return folder


def test_d20_folder_of_shards_is_read_in_their_order(tmp_path):
    write_rows(shards(tmp_path) / "data" / "test-00000-of-00001.parquet", [{"prompt": "held out"}])
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    train = [row["prompt"] for row in plain(open_table(str(tmp_path)))]
    assert train == ["shard 0", "shard 1", "shard 2"]
    assert plain(open_table(str(tmp_path), split="test")) == [{"prompt": "held out"}]
    assert open_table(str(tmp_path)).row(2).where.endswith("train-00002-of-00003.parquet row 0")


def test_d20_folders_as_the_datasets_library_saves_them(tmp_path):
    for split in ("train", "validation"):
        folder = tmp_path / split
        write_rows(folder / "data-00000-of-00001.arrow", [{"prompt": split}])
        write_rows(folder / "cache-0123.arrow", [{"prompt": "intermediate"}])
        (folder / "state.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert plain(open_table(str(tmp_path))) == [{"prompt": "train"}]
    assert plain(open_table(str(tmp_path), split="validation")) == [{"prompt": "validation"}]
    assert plain(open_table(str(tmp_path / "train"))) == [{"prompt": "train"}]


def test_d20_files_of_a_folder_without_splits_are_training_rows(tmp_path):
    write_rows(tmp_path / "b.jsonl", [{"prompt": "b"}])
    write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "answer": 1}])
    assert plain(open_table(str(tmp_path))) == [
        {"prompt": "a", "answer": 1},
        {"prompt": "b", "answer": None},
    ]
    assert [path.name for path in dataset_files(tmp_path)] == ["a.jsonl", "b.jsonl"]


def lonely_shard(folder: Path) -> None:
    shards(folder, 2, total=3)


def two_configurations(folder: Path) -> None:
    for name in ("main", "socratic"):
        write_rows(folder / name / "train-00000-of-00001.parquet", ROWS)


def two_kinds(folder: Path) -> None:
    write_rows(folder / "a.jsonl", ROWS)
    write_rows(folder / "b.csv", ROWS)


def stray_file(folder: Path) -> None:
    write_rows(shards(folder) / "extra.parquet", ROWS)


def only_test(folder: Path) -> None:
    write_rows(folder / "test.jsonl", ROWS)


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lonely_shard, r"expected 3 shards, found .*missing are 2"),
        (two_configurations, r"several folders, main, socratic, .*name one of them"),
        (two_kinds, r"mixes kinds of files: a\.jsonl, b\.csv"),
        (stray_file, r"has the splits train, but extra\.parquet belong to no split"),
        (only_test, r"has no split 'train'; it has test: set data\.train_split"),
        (lambda folder: None, r"holds no file \.jsonl"),
    ],
)
def test_d20_folder_that_is_ambiguous_or_incomplete_is_refused(tmp_path, fill, message):
    fill(tmp_path)
    with pytest.raises(RecipeError, match=message):
        open_table(str(tmp_path))


def test_d20_dataset_of_the_hub_without_the_package_names_two_ways(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"pip install datasets\. Or .*hf download org/name"):
        open_table("hf:org/name")


def test_d20_dataset_of_the_hub_is_loaded_by_the_package(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_rows(tmp_path / "org" / "name" / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    table = open_table("hf:org/name")
    assert plain(table) == ROWS
    assert table.files
    with pytest.raises(RecipeError, match=r"hf:org/name, split nothing, cannot be loaded"):
        open_table("hf:org/name", split="nothing")


NESTED = {
    "data_source": "gsm8k",
    "prompt": [{"role": "user", "content": "2 + 2"}],
    "reward_model": {"ground_truth": "4", "style": "rule"},
    "extra_info": {"question": "two and two", "turns": ["a", "b"]},
}


def test_d20_nested_columns_are_named_by_dots(tmp_path):
    source = open_file_prompts(
        write_rows(tmp_path / "p.parquet", [NESTED]),
        encoder(
            prompt_column="extra_info.question",
            columns={"answer": "reward_model.ground_truth", "last": "extra_info.turns.-1"},
        ),
    )
    prompt = source.at(0, 1)[0]
    assert prompt.text == "two and two"
    assert (prompt.columns["answer"], prompt.columns["last"]) == ("4", "b")
    assert prompt.columns["reward_model"] == NESTED["reward_model"]


def test_d20_column_whose_name_has_a_dot_is_itself():
    assert column_value({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert column_value({"a": {"b": 2}}, "a.c") is None
    assert column_value({"a": [1]}, "a.1") is None


def test_d20_column_that_is_not_there_is_refused_by_its_key(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", ROWS)
    with pytest.raises(RecipeError, match=r"data\.columns\.x names 'rewards\.y', but .*'rewards'"):
        open_file_prompts(path, encoder(columns={"x": "rewards.y"}))
    with pytest.raises(RecipeError, match=r"data\.drop_columns names 'z', but .*prompt, answer"):
        open_file_prompts(path, encoder(drop_columns=["z"]))


@pytest.mark.parametrize("name", ["completions", "prompts", "completion_ids"])
def test_r13_column_that_would_hide_what_rewards_get_is_refused(tmp_path, name):
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "a", name: "mine"}])
    with pytest.raises(RecipeError, match=rf"the column {name}, but .*data\.drop_columns"):
        open_file_prompts(path, encoder())
    kept = open_file_prompts(path, encoder(drop_columns=[name], columns={"reference": name}))
    assert kept.at(0, 1)[0].columns == {"reference": "mine"}


def test_r13_prompt_column_may_have_any_name(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", [{"prompts": "a"}])
    assert open_file_prompts(path, encoder(prompt_column="prompts")).at(0, 1)[0].text == "a"


def test_r13_rows_are_given_as_copies(tmp_path):
    for suffix in (".jsonl", ".json", ".parquet"):
        path = write_rows(tmp_path / f"p{suffix}", [{"prompt": "a", "meta": {"seen": 0}}])
        source = open_file_prompts(path, encoder())
        source.at(0, 1)[0].columns["meta"]["seen"] = 1
        assert source.at(0, 1)[0].columns["meta"] == {"seen": 0}


GOOD = b'{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\\ud800"}', r"the lone surrogate \\ud800, half of a character"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' occurs twice in one object"),
        (b'{"prompt": "a", "m": {"k": 1, "k": 2}}', "the key 'k' occurs twice"),
        (b'{"prompt": "\xff"}', "is not UTF-8: byte 0xff at byte 13 of the line"),
        (b'{"prompt": "a", "answer": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "a", "answer": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"prompt": "a", "answer": 1e400}', "the number 1e400 is too large"),
        (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}", "a number that cannot be read"),
        (b'{"prompt": "a"', "is not valid JSON: .*at column"),
    ],
)
def test_r11_bad_json_is_refused_by_line_and_in_few_words(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(RecipeError, match=f"line 3.* ?{message}") as caught:
        open_table(str(tmp_path / "p.jsonl"))
    assert len(str(caught.value)) < 600


def test_r11_surrogates_that_make_a_character_are_text(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "\\ud83d\\ude00"}\n')
    assert plain(open_table(str(tmp_path / "p.jsonl"))) == [{"prompt": "\U0001f600"}]


def test_r11_utf16_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(GOOD.decode().encode("utf-16"))
    with pytest.raises(RecipeError, match=r"line 1 is not UTF-8.*looks like UTF-16"):
        open_table(str(tmp_path / "p.jsonl"))


def test_r11_array_of_other_things_is_refused_by_item(tmp_path):
    (tmp_path / "p.json").write_text('[{"prompt": "a"}, 3]')
    with pytest.raises(RecipeError, match=r"p\.json item 1 is a int, expected an object"):
        open_table(str(tmp_path / "p.json"))


def test_r11_rows_with_messages_and_rows_with_prompts_are_each_read(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    chats = PromptEncoder(tokenizer=tokenizer, data=encoder().data)
    rows = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]}]
    source = open_file_prompts(write_rows(tmp_path / "p.jsonl", rows), chats)
    assert [prompt.text for prompt in source.at(0, 2)] == ["[user]a", "[user]b"]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"answer": 1}, "'messages' and 'prompt'"),
        ({"messages": None, "prompt": None}, "'messages'"),
    ],
)
def test_r11_row_without_a_prompt_names_line_and_columns(tmp_path, row, columns):
    rows = [{"prompt": "a", "messages": None}, row]
    with pytest.raises(RecipeError, match=f"line 2: the prompt is None: column {columns}"):
        open_file_prompts(write_rows(tmp_path / "p.jsonl", rows), encoder())


def test_r11_rows_that_lack_a_column_are_counted_and_the_first_is_named(tmp_path):
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b"}, {"prompt": "c", "answer": None}]
    source = open_file_prompts(write_rows(tmp_path / "p.jsonl", rows), encoder())
    assert source.gap("answer") == (
        f"2 of 3 rows have no answer (the first is {tmp_path / 'p.jsonl'} line 2)"
    )
    assert source.gap("prompt") is None


def test_r12_file_that_changes_under_a_run_is_an_error(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", ROWS)
    source = open_file_prompts(path, encoder())
    with path.open("r+b") as file:
        file.truncate(40)
    with pytest.raises(RecipeError, match=r"line 4 has changed since the dataset was opened"):
        source.at(3, 1)
