"""What the parsers of tool calls read, by hand."""

import pytest

from moe_replay.tasks.environments.tool_calls import ToolCall, hermes


def test_calls_are_read_in_order_from_among_other_text():
    text = (
        'first <tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "x"}}\n</tool_call> then '
        '<tool_call>{"name": "stop"}</tool_call>.'
    )
    assert hermes(text) == [
        ToolCall(name="add", arguments={"a": 1, "b": "x"}),
        ToolCall(name="stop"),
    ]


def test_arguments_may_be_json_in_a_text():
    (call,) = hermes('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>')
    assert call == ToolCall(name="add", arguments={"a": 1})


def test_text_without_a_call_has_none():
    assert hermes('{"name": "add", "arguments": {}} </tool_call>') == []


@pytest.mark.parametrize(
    ("block", "name", "error"),
    [
        ('{"name": "add", "arguments": {"a": }}', "", "not valid JSON"),
        ("add(1, 2)", "", "not valid JSON"),
        ('["add"]', "", 'expected {"name"'),
        ('{"arguments": {}}', "", 'expected {"name"'),
        ('{"name": "add", "arguments": [1]}', "add", "must be a JSON object"),
        ('{"name": "add", "arguments": "1 and 2"}', "add", "must be a JSON object"),
    ],
)
@pytest.mark.parametrize("close", ["</tool_call>", ""])
def test_a_call_that_cannot_be_read_is_a_call_with_an_error(block, name, error, close):
    (call,) = hermes(f"<tool_call>{block}{close}")
    assert call.name == name and call.error is not None and error in call.error
