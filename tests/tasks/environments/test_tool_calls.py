"""What the parsers of tool calls read, by hand."""

import json

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


@pytest.mark.parametrize("in_text", [False, True])
def test_arguments_that_are_too_deep_are_an_error_for_the_model(in_text):
    def called(levels):
        arguments = '{"a": ' + "[" * levels + "]" * levels + "}"
        given = json.dumps(arguments) if in_text else arguments
        (call,) = hermes(f'<tool_call>{{"name": "add", "arguments": {given}}}</tool_call>')
        return call

    assert called(63).error is None and called(63).arguments["a"]
    for levels in (64, 700, 100_000):
        call = called(levels)
        assert call.error is not None and call.arguments == {}
