"""The tokens between two turns: what a chat template puts around an environment's message.

Sampled tokens are never decoded and encoded again. The next prompt is all tokens so far and a
suffix, which the template writes after the assistant's end token in a chat of dummies::

    <user>u<assistant>MARK<eos>  <tool>42<assistant>
                                 ^-- the suffix of the tool message 42

In: a tokenizer. Out: token ids.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from moe_replay.errors import RecipeError
from moe_replay.tasks.chat_messages import excerpt
from moe_replay.tasks.completion_text import exact_text
from moe_replay.tasks.environments.plain_text import PlainText, own_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "a7f3c1"
_OTHER = "b81d04"
_THOUGHT = "c95e2d"


class TurnTemplate:
    """What a tokenizer's chat template writes between the turns of a conversation."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_ids: Collection[int],
        tools: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
    ) -> None:
        """Take the tokens that end a turn, tools that the prompt offers, and template arguments.

        Raises:
            RecipeError: the template cannot go on after a turn, or writes earlier turns otherwise
                once later ones follow.
        """
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._end_texts = [exact_text(tokenizer, [i]) for i in sorted(self._end_ids)]
        self._tools: list[Any] | None = list(tools) or None
        self._arguments = dict(arguments)
        self._own = own_tokens(tokenizer)
        self._of_rows: dict[str, TurnTemplate] = {}
        self._check()

    def of_row(self, arguments: Mapping[str, Any], where: str) -> TurnTemplate:
        """Return that of a row with template arguments of its own, which override the others.

        Raises:
            RecipeError: as for the whole, where they change what the template writes.
        """
        if not arguments:
            return self
        key = json.dumps(arguments, sort_keys=True, default=repr)
        if key not in self._of_rows:
            try:
                self._of_rows[key] = TurnTemplate(
                    self._tokenizer,
                    end_ids=self._end_ids,
                    tools=self._tools or (),
                    arguments={**self._arguments, **arguments},
                )
            except RecipeError as error:
                raise RecipeError(f"{where}, column chat_template_kwargs: {error}") from error
        return self._of_rows[key]

    def notes(self) -> tuple[str, ...]:
        """Return what is worth knowing about earlier turns."""
        return tuple(self._of_openings()) + tuple(self._of_thoughts())

    def _of_openings(self) -> Iterator[str]:
        turn = self._turn(_MARK, [self._dummy])
        before = self._rendered(turn)
        if not self._rendered([*turn, *self._turn(_OTHER, [self._dummy])]).startswith(before):
            opening = before[len(self._rendered(turn, opens_turn=False)) :]
            yield (
                f"the chat template opens a turn with {excerpt(opening)} and writes earlier turns otherwise, and "
                "conversations of [environment] keep it: a server that renders the whole chat anew for each turn shows "
                "the model another text than it was trained after"
            )

    def _of_thoughts(self) -> Iterator[str]:
        thought = f"<think>\n{_THOUGHT}\n</think>\n\n{_MARK}"
        messages = self._turn(_MARK, [self._dummy]) + self._turn(_OTHER, [self._dummy])
        messages[1]["content"] = thought
        if _THOUGHT not in self._rendered(messages):
            yield (
                "the chat template drops the reasoning (<think>) of earlier turns, and conversations of [environment] keep "
                "it: a server that renders the whole chat anew for each turn shows the model less than it was trained after"
            )

    def suffix(
        self, messages: Sequence[Mapping[str, str]], last_id: int
    ) -> Int32[np.ndarray, " suffix"]:
        """Return the tokens that follow a turn which ended with ``last_id``, up to the next turn.

        A turn that did not end with an end token, but at a stop string say, is ended here first.
        What the messages say is plain text: a tool that answers ``<|im_end|>`` ends nothing.

        Raises:
            RecipeError: the template rejects the messages.
        """
        texts = [text for each in messages for text in each.values()]
        plain = PlainText(self._tokenizer, self._own, texts)
        said = [{key: plain.marked(text) for key, text in each.items()} for each in messages]
        text = self._rendered(self._turn(_MARK, said))
        start, end = self._end_of(text, _MARK)
        rest = text[end if last_id in self._end_ids else start :]
        return np.array(plain.ids(rest), dtype=np.int32)

    def _turn(self, mark: str, messages: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
        answer: dict[str, Any] = {"role": "assistant", "content": mark}
        calls = [
            {
                "type": "function",
                # Templates that drop the text of a message with calls still write the arguments.
                "function": {"name": message.get("name", "tool"), "arguments": {mark: mark}},
            }
            for message in messages
            if message["role"] == "tool"
        ]
        if calls:
            answer["tool_calls"] = calls
        first = [{"role": "user", "content": "u"}] if mark == _MARK else []
        return [*first, answer, *map(dict, messages)]

    def _rendered(self, messages: list[dict[str, Any]], *, opens_turn: bool = True) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=self._tools,
                tokenize=False,
                add_generation_prompt=opens_turn,
                **self._arguments,
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = [message["role"] for message in messages]
            raise RecipeError(
                f"[environment]: the tokenizer's chat template rejects a chat with roles {roles}: "
                f"{str(error)[:300]}. Several turns need a template that renders them"
            ) from error
        assert isinstance(text, str)
        return text

    def _end_of(self, text: str, mark: str) -> tuple[int, int]:
        """Return where the end token after the first ``mark`` begins and ends."""
        after = text.find(mark) + len(mark)
        found = [
            (at, at + len(end)) for end in self._end_texts if (at := text.find(end, after)) >= 0
        ]
        if mark not in text or not found:
            raise RecipeError(
                f"[environment]: the chat template renders an assistant's turn as {excerpt(text)}, and none of "
                f"the tokens that end a completion ({', '.join(map(repr, self._end_texts)) or 'none'}) follows it, so "
                "it is unknown where the next message begins: add the token that ends a turn to "
                "rollout.stop_token_ids"
            )
        return min(found)

    def _check(self) -> None:
        message = self._dummy
        before = self._rendered(self._turn(_MARK, [message]))
        after = self._rendered([*self._turn(_MARK, [message]), *self._turn(_OTHER, [message])])
        _, end = self._end_of(before, _MARK)
        # What opens a turn may go once that is over (`notes`): Qwen3 without thinking.
        kept = self._rendered(self._turn(_MARK, [message]), opens_turn=False)
        if not after.startswith(kept):
            before = kept
            at = next(n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
            raise RecipeError(
                "[environment]: the chat template is not prefix-preserving: once a later turn follows, it writes "
                f"{excerpt(after[at : at + 60])} where it wrote {excerpt(before[at : at + 60])} before. What a turn was "
                "sampled after would not be what the chat is: use a template that keeps earlier turns as they "
                "were (put chat_template.jinja into the model directory), or data.chat_template_kwargs that do"
            )
        parts = [self._ids(before[:end]), self._ids(before[end:])]
        if parts[0] + parts[1] != self._ids(before):
            raise RecipeError(
                "[environment]: the tokenizer joins the end of a turn and what follows it "
                f"({excerpt(before[end - 10 : end + 20])}) into one token, so turns cannot be put together: the token "
                "that ends a turn must be a special token"
            )

    @property
    def _dummy(self) -> dict[str, str]:
        if not self._tools:
            return {"role": "user", "content": "t"}
        return {"role": "tool", "content": "t", "name": self._tools[0]["function"]["name"]}

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
