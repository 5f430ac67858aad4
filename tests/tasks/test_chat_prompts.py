"""Chats of a dataset: rendered by the template, and nothing of a row is lost silently."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moe_replay.errors import RecipeError, UnsupportedError
from moe_replay.recipe.sections.run import DataSection
from moe_replay.tasks.datasets.file_prompts import FilePrompts, open_file_prompts
from moe_replay.tasks.encoding import PromptEncoder
from moe_replay.tasks.rewards.builtin import exact_match, format
from moe_replay.testing.tiny_models import character_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOLS = (
    "{% if tools %}{% for t in tools %}<{{ t.function.name }}:{{ t | tojson }}>{% endfor %}{% endif %}"
    "{% if thinking %}(think {{ thinking }}){% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}!{{ call.function.name }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PARTS = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endif %}{% endfor %}"
)
NATIVE_PARTS = PARTS.replace("|", "")
USER = {"role": "user", "content": "U"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}


def opened(folder: Path, rows: list[dict], *, template: str | None = TEMPLATE, **options):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    data = DataSection(train="", **{"max_prompt_length": 400, **options})
    encoder = PromptEncoder(tokenizer=tokenizer, data=data)
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_file_prompts(path, encoder)


def texts(source: FilePrompts) -> list[str]:
    return [prompt.text for prompt in source.at(0, len(source.rows))]


def test_d3_tools_column_is_rendered(tmp_path):
    rows = [{"prompt": "a", "tools": [ADD]}, {"prompt": "b", "tools": None}]
    source = opened(tmp_path, rows, template=TOOLS)
    first, second = texts(source)
    assert first.startswith('<add:{"type": "function"')
    assert first.endswith("[user]a[assistant]")
    assert second == "[user]b[assistant]"
    assert source.at(0, 1)[0].columns["tools"] == [ADD]


def test_d3_tools_given_as_json_text_are_rendered(tmp_path):
    listed = texts(opened(tmp_path, [{"prompt": "a", "tools": [ADD]}], template=TOOLS))
    spelled = [{"prompt": "a", "tools": json.dumps([ADD])}]
    assert texts(opened(tmp_path, spelled, template=TOOLS)) == listed


def test_d3_tools_of_a_table_hold_no_fields_of_other_rows(tmp_path):
    other = {"type": "function", "function": {"name": "sub", "strict": True}}
    table = pyarrow.Table.from_pylist(
        [{"prompt": "a", "tools": [ADD]}, {"prompt": "b", "tools": [other]}]
    )
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TOOLS
    encoder = PromptEncoder(tokenizer=tokenizer, data=DataSection(train=""))
    assert "null" not in "".join(texts(open_file_prompts(tmp_path / "p.parquet", encoder)))


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"tools": [ADD]}, TEMPLATE, "line 1: the row has tools, but .*does not render tools"),
        ({"tools": [ADD]}, None, r"needs a chat template \(the row has tools\)"),
        ({"tools": "add"}, TOOLS, "column tools is the text 'add', which is not JSON"),
        ({"tools": ["add"]}, TOOLS, r"column tools is \['add'\], expected a list of JSON schemas"),
        (
            {"chat_template_kwargs": {"thinkin": 1}},
            TOOLS,
            "sets thinkin,.*nearest: 'thinking'",
        ),
        ({"chat_template_kwargs": {"tokenize": 1}}, TOOLS, "sets tokenize, which only the trainer"),
        ({"chat_template_kwargs": [1]}, TOOLS, "expected an object of template arguments"),
    ],
)
def test_d3_what_the_template_cannot_take_is_refused(tmp_path, row, template, message):
    with pytest.raises(RecipeError, match=message):
        opened(tmp_path, [{"prompt": "a", **row}], template=template)


def test_d3_template_arguments_of_a_row_win_over_those_of_the_recipe(tmp_path):
    rows = [{"prompt": "a", "chat_template_kwargs": {"thinking": "row"}}, {"prompt": "b"}]
    source = opened(tmp_path, rows, template=TOOLS, chat_template_kwargs={"thinking": "recipe"})
    assert texts(source) == ["(think row)[user]a[assistant]", "(think recipe)[user]b[assistant]"]


def test_d3_template_argument_of_the_recipe_that_is_never_read_is_refused(tmp_path):
    with pytest.raises(
        RecipeError, match=r"data\.chat_template_kwargs sets depth, .*it reads think"
    ):
        opened(tmp_path, [{"prompt": "a"}], template=TOOLS, chat_template_kwargs={"depth": 1})


@pytest.mark.parametrize("column", ["images", "image", "videos", "audio"])
def test_d3_media_columns_are_refused_by_name(tmp_path, column):
    rows = [{"prompt": "a", column: None}, {"prompt": "b", column: ["x.png"]}]
    with pytest.raises(UnsupportedError, match=rf"line 2: column {column} .*data.drop_columns"):
        opened(tmp_path, rows)


def test_d3_media_columns_can_be_dropped_and_empty_ones_are_none(tmp_path):
    rows = [{"prompt": "a", "images": ["x.png"], "kept": 1}]
    source = opened(tmp_path, rows, drop_columns=["images"])
    assert source.at(0, 1)[0].columns == {"kept": 1}
    assert opened(tmp_path, [{"prompt": "a", "images": []}]).num_prompts == 1


@pytest.mark.parametrize("kind", ["image", "image_url", "video", "input_audio"])
def test_d3_media_parts_are_refused_by_name(tmp_path, kind):
    content = [{"type": kind, "url": "x"}, {"type": "text", "text": "a"}]
    with pytest.raises(UnsupportedError, match=rf"line 1: message 0 holds a part of type '{kind}'"):
        opened(tmp_path, [{"messages": [{"role": "user", "content": content}]}])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (NATIVE_PARTS, "[user]ab"),  # the template writes parts itself
        (PARTS, "[user]a\nb"),  # it would write them differently from a text
        (TEMPLATE, "[user]a\nb\n[assistant]"),  # it would write their spelling in Python
    ],
)
def test_d4_content_in_parts_is_rendered(tmp_path, template, expected):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rows = [{"messages": [{"role": "user", "content": parts}]}]
    assert texts(opened(tmp_path, rows, template=template)) == [expected]


def test_d4_tool_calls_without_content_and_tool_answers_are_rendered(tmp_path):
    for silent in ({"content": None}, {}, {"content": ""}):
        messages = [
            USER,
            {"role": "assistant", "tool_calls": [CALL], **silent},
            {"role": "tool", "content": "2"},
        ]
        source = opened(tmp_path, [{"messages": messages}], template=TOOLS)
        assert texts(source) == ["[user]U[assistant]!add[tool]2[assistant]"]


def test_d4_tool_calls_that_the_template_does_not_write_are_refused(tmp_path):
    messages = [USER, {"role": "assistant", "content": "x", "tool_calls": [CALL]}, USER]
    with pytest.raises(
        RecipeError, match=r"line 1: a message has tool_calls, but .*does not render"
    ):
        opened(tmp_path, [{"messages": messages}])


def test_d4_last_assistant_message_is_continued(tmp_path):
    rows = [{"messages": [USER, {"role": "assistant", "content": "It is"}]}, {"prompt": "b"}]
    source = opened(tmp_path, rows)
    prompts = source.at(0, 2)
    assert prompts[0].text == "[user]U\n[assistant]It is"
    assert [prompt.prefill for prompt in prompts] == ["It is", ""]
    assert "1 prompts end with an assistant message" in next(source.notes())


def test_d4_last_assistant_message_in_parts_is_continued(tmp_path):
    final = {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}
    for template in (TEMPLATE, NATIVE_PARTS):
        text = texts(opened(tmp_path, [{"messages": [USER, final]}], template=template))[0]
        assert text.endswith("[assistant]It is")


def test_d4_last_assistant_message_is_dropped_or_refused_when_told_so(tmp_path):
    rows = [{"messages": [USER, {"role": "assistant", "content": "4"}]}]
    dropped = opened(tmp_path, rows, final_assistant_message="drop")
    assert texts(dropped) == ["[user]U\n[assistant]"]
    assert list(dropped.notes()) == []
    with pytest.raises(RecipeError, match=r"line 1: the last message is the assistant's, .*drop"):
        opened(tmp_path, rows, final_assistant_message="error")


@pytest.mark.parametrize(
    ("final", "message"),
    [({"content": None, "tool_calls": [CALL]}, "calls tools"), ({"content": " "}, "is empty")],
)
def test_d4_last_assistant_message_without_text_is_refused_with_the_reason(
    tmp_path, final, message
):
    rows = [{"prompt": "a"}, {"messages": [USER, {"role": "assistant", **final}]}]
    with pytest.raises(RecipeError, match=rf"line 2: the last message .* and {message}, so"):
        opened(tmp_path, rows, template=TOOLS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "message 0 is .*only a message with tool_calls may lack content"),
        (3, "message 0 has the content 3, expected a string or a list of parts"),
        (["a"], "message 0 holds the part 'a', expected"),
        ([{"text": "a"}], "message 0 holds the part .*expected"),
    ],
)
def test_d4_a_bad_message_is_named_by_its_line(tmp_path, content, message):
    rows = [{"prompt": "a"}, {"messages": [{"role": "user", "content": content}]}]
    with pytest.raises(RecipeError, match=f"line 2: {message}"):
        opened(tmp_path, rows)


def test_d4_a_template_that_fails_on_a_row_names_it(tmp_path):
    template = "{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}{{ tool_calls }}"
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, USER]
    with pytest.raises(RecipeError, match="line 2: the tokenizer's chat template rejects messages"):
        opened(tmp_path, [{"prompt": "a"}, {"messages": messages}], template=template)


def test_an_empty_prompt_is_refused_under_a_template_too(tmp_path):
    for prompt in ("", "  \n"):
        with pytest.raises(RecipeError, match=r"line 2: the prompt '.*remove or fill the row"):
            opened(tmp_path, [{"prompt": "a"}, {"prompt": prompt}])
    with pytest.raises(RecipeError, match="line 1: the last user message is empty"):
        opened(tmp_path, [{"messages": [{"role": "user", "content": ""}]}])


def test_cut_prompts_are_counted_and_the_cut_chat_is_pointed_out(tmp_path):
    rows = [{"prompt": "short"}, {"prompt": "much too long"}]
    source = opened(tmp_path, rows, truncation="left", max_prompt_length=24)
    assert source.num_cut == 1
    assert [prompt.num_cut for prompt in source.at(0, 2)] == [0, 7]
    note = next(source.notes())
    assert "1 prompts are longer than data.max_prompt_length = 24" in note
    assert "the beginning of the chat" in note


def test_a_template_that_writes_the_date_is_pointed_out(tmp_path):
    template = "{{ date_string or strftime_now('%d %b %Y') }}" + TEMPLATE
    source = opened(tmp_path, [{"prompt": "a"}], template=template)
    assert "data.chat_template_kwargs.date_string" in source.encoder.notes()[0]
    fixed = {"date_string": "1 Jan 2026"}
    source = opened(tmp_path, [{"prompt": "a"}], template=template, chat_template_kwargs=fixed)
    assert source.encoder.notes() == ()
    assert texts(source) == ["1 Jan 2026[user]a\n[assistant]"]


def test_d4_tag_that_the_prompt_opened_is_counted_once():
    prompts = ["[assistant]It is <answer>"] * 2
    # With and without the part of the answer that the prompt began.
    texts = ["It is <answer>4</answer>", "4</answer>"]
    assert exact_match(texts, prompts=prompts, answer=["4", "4"]) == [1.0, 1.0]
    assert format(texts, prompts=prompts, regex="It is <answer>4</answer>") == [1.0, 0.0]
