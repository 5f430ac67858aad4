"""Prompts: the same at every ask, held-out ones never trained on, and every bad dataset named."""

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers.processors import TemplateProcessing

from moe_replay.checkpoint.tokenizer import load_tokenizer
from moe_replay.errors import RecipeError, UnsupportedError
from moe_replay.recipe.sections.run import DataSection
from moe_replay.tasks.datasets.file_prompts import FilePrompts, open_file_prompts
from moe_replay.tasks.encoding import PromptEncoder, PromptInput
from moe_replay.tasks.generated import GeneratedTask
from moe_replay.tasks.prompts import GeneratedPrompts, draw_held_out
from moe_replay.testing.tiny_models import character_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ONE_DIGIT_SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def encoder(**options) -> PromptEncoder:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = options.pop("template", None)
    return PromptEncoder(
        tokenizer=tokenizer, data=DataSection(train="", **{"max_prompt_length": 200, **options})
    )


def write_jsonl(folder: Path, rows: list[dict]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(folder: Path, count: int = 10, **options) -> FilePrompts:
    rows = [{"prompt": f"item {n}", "answer": str(n)} for n in range(count)]
    return open_file_prompts(write_jsonl(folder, rows), encoder(), **options)


def test_plain_prompt_without_template_is_tokenized_as_it_is(tmp_path):
    prompt = numbered(tmp_path).at(3, 1)[0]
    assert prompt.text == "item 3"
    assert prompt.prompt_ids.tolist() == character_tokenizer().encode("item 3")
    assert prompt.index == 3
    assert prompt.columns == {"answer": "3"}


def test_plain_prompt_with_template_is_one_user_message(tmp_path):
    path = write_jsonl(tmp_path, [{"prompt": "2 + 2"}])
    prompt = open_file_prompts(path, encoder(template=TEMPLATE)).at(0, 1)[0]
    assert prompt.text == "[user]2 + 2\n[assistant]"
    assert prompt.prompt_ids.tolist() == character_tokenizer().encode(prompt.text)


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_messages_are_rendered_whichever_column_holds_them(tmp_path, column):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    path = write_jsonl(tmp_path, [{column: messages, "answer": 1}])
    prompt = open_file_prompts(path, encoder(template=TEMPLATE)).at(0, 1)[0]
    assert prompt.text == "[system]S\n[user]U\n[assistant]"
    assert set(prompt.columns) == {"answer"}


def test_messages_column_wins_over_prompt_column(tmp_path):
    row = {"messages": [{"role": "user", "content": "U"}], "prompt": "P"}
    source = open_file_prompts(write_jsonl(tmp_path, [row]), encoder(template=TEMPLATE))
    assert source.at(0, 1)[0].text == "[user]U\n[assistant]"
    assert source.columns == {"prompt"}


def test_system_prompt_is_added_where_there_is_none(tmp_path):
    messages = [{"role": "system", "content": "mine"}, {"role": "user", "content": "U"}]
    path = write_jsonl(tmp_path, [{"prompt": "P"}, {"prompt": messages}])
    source = open_file_prompts(path, encoder(template=TEMPLATE, system_prompt="S"))
    texts = [prompt.text for prompt in source.at(0, 2)]
    assert texts == ["[system]S\n[user]P\n[assistant]", "[system]mine\n[user]U\n[assistant]"]


def test_parquet_and_jsonl_give_the_same_prompts(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"q{n}"}], "answer": n} for n in range(3)]
    jsonl = open_file_prompts(write_jsonl(tmp_path, rows), encoder(template=TEMPLATE))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    parquet = open_file_prompts(tmp_path / "p.parquet", encoder(template=TEMPLATE))
    for one, other in zip(jsonl.at(0, 3), parquet.at(0, 3), strict=True):
        assert one.text == other.text
        assert one.columns == other.columns


def test_line_separator_inside_a_string_does_not_end_the_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert open_file_prompts(path, encoder()).num_prompts == 1


def test_every_epoch_holds_every_prompt_once(tmp_path):
    source = numbered(tmp_path, shuffle_seed=1)
    for epoch in range(3):
        indices = [prompt.index for prompt in source.at(epoch * 10, 10)]
        assert sorted(indices) == list(range(10))


def test_epochs_differ_in_order_only_when_shuffled(tmp_path):
    shuffled = [prompt.index for prompt in numbered(tmp_path, shuffle_seed=1).at(0, 20)]
    assert shuffled[:10] != shuffled[10:]
    assert [prompt.index for prompt in numbered(tmp_path).at(0, 20)] == [*range(10), *range(10)]


def test_position_alone_decides_the_prompt(tmp_path):
    together = [prompt.index for prompt in numbered(tmp_path, shuffle_seed=1).at(0, 25)]
    resumed = [prompt.index for prompt in numbered(tmp_path, shuffle_seed=1).at(7, 18)]
    assert together[7:] == resumed
    assert together != [prompt.index for prompt in numbered(tmp_path, shuffle_seed=2).at(0, 25)]


def test_held_out_file_ends_with_its_last_prompt(tmp_path):
    source = numbered(tmp_path, held_out=True, max_prompts=4)
    assert source.num_prompts == 4
    assert [prompt.index for prompt in source.at(0, 4)] == [0, 1, 2, 3]
    with pytest.raises(AssertionError):
        source.at(0, 5)


def too_long(folder: Path) -> Path:
    return write_jsonl(folder, [{"prompt": "short"}, {"prompt": "much too long"}, {"prompt": "ok"}])


def test_long_prompt_stops_by_default(tmp_path):
    with pytest.raises(
        RecipeError, match=r"line 2: the prompt has 13 tokens.*max_prompt_length is 8"
    ):
        open_file_prompts(too_long(tmp_path), encoder(max_prompt_length=8))


def test_long_prompt_is_deleted_and_counted(tmp_path):
    source = open_file_prompts(
        too_long(tmp_path), encoder(max_prompt_length=8, truncation="delete")
    )
    assert source.num_deleted == 1
    assert [(prompt.index, prompt.text) for prompt in source.at(0, 2)] == [(0, "short"), (2, "ok")]


def test_long_prompt_loses_its_start_on_the_left(tmp_path):
    source = open_file_prompts(too_long(tmp_path), encoder(max_prompt_length=8, truncation="left"))
    assert source.at(1, 1)[0].text == "too long"
    assert source.num_deleted == 0


def test_dataset_whose_prompts_are_all_deleted_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"all 3 prompts are longer"):
        open_file_prompts(too_long(tmp_path), encoder(max_prompt_length=1, truncation="delete"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: expected at least one row"),
        ("\n\n", "is empty"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2 is not valid JSON"),
        ('{"prompt": "a"}\n["b"]\n', "line 2 holds a list, expected an object"),
        ('{"question": "a", "answer": 1}\n', "its columns are question, answer"),
        ('{"prompt": "a"}\n{"answer": 1}\n', "line 2: the prompt is None"),
        ('{"prompt": 3}\n', r"line 1: the prompt is 3 \(int\), expected a string"),
        ('{"prompt": ""}\n', "line 1: the prompt '' has no tokens"),
        ('{"prompt": []}\n', "line 1: the prompt is .*expected a string or a non-empty list"),
        ('{"prompt": [{"role": "user"}]}\n', "line 1: message 0 is .*expected an object"),
        ('{"prompt": [{"role": "user", "content": "a"}]}\n', "needs a chat template .it is a chat"),
    ],
)
def test_bad_jsonl_is_refused(tmp_path, text, message):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        open_file_prompts(path, encoder())


def test_missing_dataset_lists_its_neighbours(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(RecipeError, match=r"trian\.jsonl does not exist; .* holds train\.jsonl"):
        open_file_prompts(tmp_path / "trian.jsonl", encoder())


def test_other_suffix_is_refused(tmp_path):
    (tmp_path / "p.xlsx").write_bytes(b"rows")
    with pytest.raises(RecipeError, match=r"got the suffix '\.xlsx', expected a file \.jsonl"):
        open_file_prompts(tmp_path / "p.xlsx", encoder())


def test_damaged_parquet_is_refused(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"not parquet")
    with pytest.raises(RecipeError, match=r"not a readable Parquet file"):
        open_file_prompts(tmp_path / "p.parquet", encoder())


def test_template_that_refuses_a_role_names_the_row(tmp_path):
    template = "{{ raise_exception('no tools here') }}"
    path = write_jsonl(tmp_path, [{"prompt": "a"}])
    with pytest.raises(
        RecipeError, match=r"line 1: the tokenizer's chat template rejects .*no tools"
    ):
        open_file_prompts(path, encoder(template=template))


def sums(**config) -> GeneratedTask:
    return GeneratedTask("chain_sum", {**ONE_DIGIT_SUMS, **config})


def test_generated_item_depends_on_seed_and_number_only():
    one = GeneratedPrompts(task=sums(), seed=1, encoder=encoder())
    other = GeneratedPrompts(task=sums(), seed=1, encoder=encoder())
    texts = [prompt.text for prompt in one.at(250, 20)]
    assert texts == [other.at(n, 1)[0].text for n in range(250, 270)]
    third = GeneratedPrompts(task=sums(), seed=2, encoder=encoder())
    assert texts != [prompt.text for prompt in third.at(250, 20)]


def test_neighbouring_seeds_do_not_share_shifted_items():
    task = GeneratedTask("chain_sum", {"min_digits": 8, "max_digits": 8})
    one = {task.item(1, n)["question"] for n in range(300)}
    other = {task.item(2, n)["question"] for n in range(300)}
    assert len(one) == 300
    assert not one & other


def test_held_out_questions_are_distinct_and_never_trained_on():
    # 200 distinct sums: without the exclusion, training would soon meet most of the 100 held-out
    # ones.
    held_out = draw_held_out(sums(), encoder(), seed=2, num_prompts=100)
    free = GeneratedPrompts(task=sums(), seed=1, encoder=encoder())
    train = GeneratedPrompts(
        task=sums(), seed=1, encoder=encoder(), excluded_questions=held_out.questions
    )
    assert len(held_out.questions) == 100
    assert {p.columns["question"] for p in free.at(0, 300)} & held_out.questions
    assert not {p.columns["question"] for p in train.at(0, 300)} & held_out.questions


def test_replaced_items_do_not_depend_on_where_reading_starts():
    held_out = draw_held_out(sums(), encoder(), seed=2, num_prompts=100)
    texts = [
        [
            prompt.text
            for prompt in GeneratedPrompts(
                task=sums(), seed=1, encoder=encoder(), excluded_questions=held_out.questions
            ).at(start, 40 - start)
        ]
        for start in (0, 17)
    ]
    assert texts[0][17:] == texts[1]


def test_family_with_too_few_items_is_refused_for_evaluation():
    with pytest.raises(
        RecipeError, match=r"distinct prompts found.*the held-out set asks for 500.*data\.eval_size"
    ):
        draw_held_out(sums(), encoder(), seed=2, num_prompts=500)


def test_family_that_evaluation_uses_up_is_refused_for_training():
    everything = frozenset(
        f"State the final answer to the following arithmetic problem: {a} {sign} {b} ="
        for a in range(10)
        for b in range(10)
        for sign in "+-"
    )
    train = GeneratedPrompts(task=sums(), seed=1, encoder=encoder(), excluded_questions=everything)
    with pytest.raises(RecipeError, match=r"too few distinct items"):
        train.at(0, 1)


def test_generated_long_prompt_is_replaced_and_counted_once():
    task = GeneratedTask("chain_sum", {"min_terms": 2, "max_terms": 6})
    lengths = Counter(len(task.item(1, n)["question"]) for n in range(20))
    limit = sorted(lengths.elements())[10]
    source = GeneratedPrompts(
        task=task, seed=1, encoder=encoder(max_prompt_length=limit, truncation="delete")
    )
    first = [prompt.text for prompt in source.at(0, 20)]
    deleted = source.num_deleted
    assert deleted > 0
    assert max(map(len, first)) <= limit
    assert [prompt.text for prompt in source.at(0, 20)] == first
    assert source.num_deleted == deleted


def test_task_scores_by_the_family():
    item = sums().item(1, 0)
    assert sums().score(item["answer"], item) == 1.0
    assert sums().score("no number", item) < 1.0


def test_composite_task_draws_from_its_parts():
    parts = [{"name": "chain_sum"}, {"name": "leg_counting", "weight": 2}]
    task = GeneratedTask("composite", {"datasets": parts})
    names = {task.item(1, n)["metadata"]["source_dataset"] for n in range(20)}
    assert names == {"chain_sum", "leg_counting"}


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("chain_summ", {}, "no family 'chain_summ'; did you mean chain_sum"),
        ("chain_sum", {"max_term": 3}, "data.task sets max_term, but .* knows allow_negation"),
        ("chain_sum", {"seed": 3}, "sets seed, .*data.train_seed"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "rejected by reasoning_gym:chain_sum"),
        ("composite", {}, "rejected by reasoning_gym:composite"),
        ("composite", {"datasets": [{"weight": 1}]}, "expected a table with name"),
        ("composite", {"datasets": [{"name": "chain_sum", "config": {"seed": 1}}]}, "sets seed"),
    ],
)
def test_bad_task_is_refused(family, config, message):
    with pytest.raises(RecipeError, match=message):
        GeneratedTask(family, config)


def test_family_that_differs_between_processes_is_refused():
    with pytest.raises(UnsupportedError, match=r"order of a Python set.*PYTHONHASHSEED=0"):
        GeneratedTask("ransom_note", {})


def test_tokenizer_is_loaded_from_a_checkpoint(tmp_path):
    character_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("a b")) == "a b"


def test_missing_model_directory_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"is not a directory"):
        load_tokenizer(tmp_path / "none")


def test_d20_hub_name_as_model_is_answered_with_its_download(tmp_path):
    line = r"hf download Qwen/Qwen3-30B-A3B --local-dir Qwen3-30B-A3B"
    with pytest.raises(RecipeError, match=line):
        load_tokenizer(tmp_path / "Qwen" / "Qwen3-30B-A3B")


def test_missing_tokenizer_names_the_file_and_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"no tokenizer in .*tokenizer\.json.*found config\.json"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer_is_refused(tmp_path):
    character_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(RecipeError, match=r"cannot be loaded"):
        load_tokenizer(tmp_path)


def test_e19_a_tokenizer_that_ends_every_prompt_is_pointed_out():
    ending = encoder()
    assert ending.notes() == ()
    ending.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    given = PromptInput(where="row 1", index=0, prompt="a", columns={})
    assert ending.encode(given).prompt_ids[-1] == 1
    assert "appends <eos> to every prompt" in ending.notes()[0]
    # A chat template writes the special tokens itself.
    ending.tokenizer.chat_template = TEMPLATE
    assert ending.notes() == ()
