"""Check the chat messages of a dataset, and find what a tokenizer's chat template would drop."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from moe_replay.errors import RecipeError, UnsupportedError, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEDIA_COLUMNS = frozenset({"image", "images", "video", "videos", "audio", "audios", "pixel_values"})
"""Columns in which datasets hold media other than text."""

# Arguments of the rendering that only we set.
_OURS = frozenset(
    {
        *("conversation", "messages", "tools", "tokenize", "add_generation_prompt"),
        *("continue_final_message", "chat_template", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        "sanitize_control_tokens",
    }
)
_GIVEN_ANYWAY = frozenset({"raise_exception", "strftime_now", "messages", "add_generation_prompt"})
_TEXTS = frozenset({"text", "input_text", "output_text"})
_MARK = "a7f3c1"


def checked_messages(prompt: object, where: str) -> list[dict[str, Any]]:
    """Return the messages of a chat, after checking that each has a role and content.

    Raises:
        RecipeError: they are anything else.
        UnsupportedError: a message holds an image, a sound or a video.
    """
    if not isinstance(prompt, list) or not prompt:
        raise RecipeError(
            f"{where}: the prompt is {excerpt(prompt)} ({type(prompt).__name__}), expected a string or a non-empty list of "
            '{"role": ..., "content": ...} messages'
        )
    for index, message in enumerate(prompt):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise RecipeError(
                f"{where}: message {index} is {excerpt(message)}, expected an object with a role, which is a string"
            )
        _check_content(message, f"{where}: message {index}")
    last = prompt[-1]
    if last["role"] == "user" and not message_text(last).strip():
        raise RecipeError(f"{where}: the last user message is empty: remove or fill the row")
    return prompt


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message; parts are joined by newlines, as in vLLM."""
    content = message.get("content")
    if content is None:
        return ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def checked_tools(tools: object, where: str) -> list[dict[str, Any]] | None:
    """Return the tools of a row, given as a list of JSON schemas or its JSON text, if any.

    Raises:
        RecipeError: they are anything else.
    """
    tools = _from_text(tools, f"{where}: column tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecipeError(
            f"{where}: column tools is {excerpt(tools)}, expected a list of JSON schemas, such as "
            '[{"type": "function", "function": {"name": ..., "parameters": ...}}]; drop the column in '
            "data.drop_columns if it is something else"
        )
    return tools


def check_arguments(arguments: object, where: str) -> Mapping[str, Any]:
    """Return arguments of the chat template, given as an object or its JSON text.

    Raises:
        RecipeError: they are anything else, or set an argument that only the trainer sets.
    """
    arguments = _from_text(arguments, where)
    if not arguments:
        return {}
    if not isinstance(arguments, Mapping):
        raise RecipeError(
            f"{where} is {excerpt(arguments)}, expected an object of template arguments"
        )
    ours = sorted(_OURS & set(arguments))
    if ours:
        raise RecipeError(
            f"{where} sets {shortened(ours)}, which only the trainer sets: remove it (put tools into a "
            "column named tools, and a chat template into the model directory)"
        )
    return arguments


def _from_text(value: object, where: str) -> object:
    if not isinstance(value, str) or not value:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"{where} is the text {excerpt(value)}, which is not JSON: {error}"
        ) from None


def without_nulls(value: Any) -> Any:
    """Drop nested fields that are None: in a table every row has the fields of all rows."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


@lru_cache(maxsize=8)
def template_variables(template: str) -> frozenset[str]:
    """Return the names that a chat template reads, except those that every template gets."""
    import jinja2.meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # An extension by transformers that only marks a block.
    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateError as error:
        raise RecipeError(
            f"the tokenizer's chat template cannot be parsed: {error}: copy chat_template.jinja of the original "
            "checkpoint again"
        ) from error
    return frozenset(names) - _GIVEN_ANYWAY


def writes_the_date(template: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether a template puts today's date into prompts, like that of Llama 3."""
    return "strftime_now" in template and not {"date_string", "date"} & set(arguments)


@lru_cache(maxsize=8)
def renders_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Return whether a template renders content in parts just like the same text.

    Many templates of text models render nothing for parts, or their Python repr.
    """
    from jinja2 import TemplateError

    texts = []
    for content in (_MARK, [{"type": "text", "text": _MARK}]):
        try:
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            texts.append(
                tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
            )
        except (TemplateError, TypeError, ValueError):
            return False
    return texts[0] == texts[1] and _MARK in texts[0]


def well_formed(text: str) -> str:
    """Return a text with ``?`` for halves of surrogate pairs, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def excerpt(value: object) -> str:
    """Return the repr of a value, cut to a length that fits into a message."""
    # A value may be megabytes, so only its start is formatted where possible.
    text = repr(value[:121] if isinstance(value, str | list | bytes) else value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _check_content(message: dict[str, Any], where: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        return
    if content is None:
        if not any(message.get(key) for key in ("tool_calls", "reasoning_content", "thinking")):
            raise RecipeError(
                f"{where} is {excerpt(message)}, expected an object with the strings role and content; only a message with "
                "tool_calls may lack content"
            )
        return
    if not isinstance(content, list):
        raise RecipeError(
            f"{where} has the content {excerpt(content)}, expected a string or a list of parts such as "
            '{"type": "text", "text": ...}'
        )
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXTS and isinstance(part.get("text"), str):
            continue
        if isinstance(kind, str) and kind not in _TEXTS:
            raise UnsupportedError(
                f"{where} holds a part of type {excerpt(kind)}: the trainer reads only text; remove such rows"
            )
        raise RecipeError(
            f'{where} holds the part {excerpt(part)}, expected {{"type": "text", "text": ...}}'
        )


def ends_every_text(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return a note for a tokenizer that appends its end token to plain text; otherwise nothing."""
    ids = tokenizer("a").input_ids
    if not ids or ids[-1] != tokenizer.eos_token_id:
        return ()
    return (
        f"the tokenizer appends {tokenizer.eos_token} to every prompt, so the model continues a finished text: set "
        "add_eos_token to false in tokenizer_config.json, or remove the token from post_processor in tokenizer.json",
    )
