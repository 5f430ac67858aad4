"""Turn prompts into token ids: tokenizer, chat template, and the rule for long prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from moe_replay.errors import RecipeError, nearest_of, shortened
from moe_replay.recipe.sections.run import DataSection
from moe_replay.tasks.chat_messages import (
    checked_messages,
    ends_every_text,
    excerpt,
    message_text,
    renders_parts,
    template_variables,
    writes_the_date,
)
from moe_replay.tasks.completion_text import exact_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptInput:
    """One item of a dataset, and what it passes to the chat template."""

    where: str
    """File and line, for messages."""
    index: int
    """As `Prompt.index`."""
    prompt: object
    """A string, or a list of chat messages."""
    columns: Mapping[str, Any]
    """As `Prompt.columns`."""
    tools: list[Any] | None = None
    """JSON schemas of the tools that the prompt offers."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Template arguments of this row; they override those of the recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt as the engine sees it, with its dataset columns."""

    index: int
    """Index of the dataset item, from 0; the same in every epoch."""
    prompt_ids: Int32[np.ndarray, " prompt"]
    """``[prompt]`` token ids, chat template included."""
    text: str
    """What ``prompt_ids`` encode."""
    columns: Mapping[str, Any]
    """The other columns of the item, passed to reward functions by name."""
    prefill: str = ""
    """Start of the assistant's answer that ends the prompt and is continued by the model; mostly
    empty."""
    num_cut: int = 0
    """Tokens removed from the start of the prompt."""
    given: PromptInput | None = None
    """What it was made of, where an environment may add to it."""
    dataset: str = ""
    """Name of its dataset in ``[[mixture]]`` or ``[[held_out]]``; empty for one of ``[data]``."""
    difficulty: float | None = None
    """Its number in ``curriculum.column``; None without a curriculum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rendered:
    where: str
    text: str
    has_special_tokens: bool
    """Whether the chat template added them."""
    prefill: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEncoder:
    """Turns a prompt into token ids.

    One rule: chat messages are rendered by the tokenizer's chat template, up to the assistant's
    turn. With a chat template a plain string is one user message; without one it is tokenized as it
    is.
    """

    tokenizer: PreTrainedTokenizerBase
    """A transformers tokenizer."""
    data: DataSection
    """Limit and rule for long prompts, system prompt, template arguments, chats that the assistant
    ends."""
    tools: Sequence[Mapping[str, Any]] = ()
    """JSON schemas of an environment's tools, which every prompt offers."""
    keeps_given: bool = False
    """Whether prompts keep what they were made of."""
    dataset: str = ""
    """`Prompt.dataset` of the prompts that it makes."""

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def check(self) -> None:
        """Raise `RecipeError` unless the chat template reads every argument of the recipe."""
        if self.data.chat_template_kwargs:
            self._check_arguments(
                self.data.chat_template_kwargs, self._template(None), "data.chat_template_kwargs"
            )

    def digest(self) -> str | None:
        """Return a digest of everything that decides the length of prompts, if known."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        settings = {
            "template": self.tokenizer.chat_template,
            "special": self.tokenizer.special_tokens_map,
            "limits": [self.data.max_prompt_length, self.data.truncation],
            "system": self.data.system_prompt,
            "arguments": dict(self.data.chat_template_kwargs),
            "final": self.data.final_assistant_message,
            "tools": list(self.tools),
            "versions": [metadata.version("transformers"), metadata.version("tokenizers")],
        }
        text = json.dumps(settings, sort_keys=True, default=str) + backend.to_str()
        return hashlib.sha256(text.encode()).hexdigest()

    def notes(self) -> tuple[str, ...]:
        """Return notes about the tokenization of prompts."""
        if self.has_template and writes_the_date(
            self._template(None), self.data.chat_template_kwargs
        ):
            return (
                "the chat template writes today's date into prompts, so a run that continues tomorrow sees other "
                "prompts: set data.chat_template_kwargs.date_string, or the argument that the template uses",
            )
        return () if self.has_template else ends_every_text(self.tokenizer)

    def encode(self, given: PromptInput) -> Prompt | None:
        """Return the prompt, or None for one to delete.

        Raises:
            RecipeError: the prompt has another type, cannot be rendered, is empty or is too long.
        """
        rendered = self._render(given)
        (ids,) = self._ids([rendered.text], has_special_tokens=rendered.has_special_tokens)
        num_cut = max(0, len(ids) - self.data.max_prompt_length)
        self._check_length(rendered, len(ids))
        if num_cut and self.data.truncation == "delete":
            return None
        ids = ids[num_cut:]
        return Prompt(
            index=given.index,
            prompt_ids=np.array(ids, dtype=np.int32),
            text=exact_text(self.tokenizer, ids) if num_cut else rendered.text,
            columns=given.columns,
            prefill=rendered.prefill,
            num_cut=num_cut,
            given=given if self.keeps_given else None,
            dataset=self.dataset,
        )

    def measure(self, given: Sequence[PromptInput]) -> tuple[list[int], int]:
        """Return each prompt's length in tokens, before any is cut, and how many have a prefill.

        Raises:
            RecipeError: as `encode`, for the first unusable prompt.
        """
        rendered = [self._render(prompt) for prompt in given]
        lengths = [0] * len(rendered)
        for special in (True, False):
            chosen = [n for n, one in enumerate(rendered) if one.has_special_tokens is special]
            texts = [rendered[n].text for n in chosen]
            ids = self._ids(texts, has_special_tokens=special) if texts else []
            for n, each in zip(chosen, ids, strict=True):
                lengths[n] = len(each)
        for one, length in zip(rendered, lengths, strict=True):
            self._check_length(one, length)
        return lengths, sum(bool(one.prefill) for one in rendered)

    def _ids(self, texts: list[str], *, has_special_tokens: bool) -> list[list[int]]:
        """Tokenize texts in one call, which is faster than one by one."""
        return self.tokenizer(
            texts,
            add_special_tokens=not has_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        ).input_ids

    def _check_length(self, rendered: _Rendered, length: int) -> None:
        if length == 0:
            raise RecipeError(
                f"{rendered.where}: the prompt {excerpt(rendered.text)} has no tokens: remove or fill the row"
            )
        if length > self.data.max_prompt_length and self.data.truncation == "error":
            raise RecipeError(
                f"{rendered.where}: the prompt has {length} tokens, data.max_prompt_length is "
                f"{self.data.max_prompt_length}. It starts {excerpt(rendered.text)}. Raise the limit, or set data.truncation "
                "to 'delete' (omit such prompts) or 'left' (drop tokens at their start)"
            )

    def _render(self, given: PromptInput) -> _Rendered:
        prompt, where = given.prompt, given.where
        if self.tools:
            if given.tools:
                raise RecipeError(
                    f"{where}: the row has tools, and so has [environment]: drop the column in "
                    "data.drop_columns, or remove the section"
                )
            given = replace(given, tools=[dict(tool) for tool in self.tools])
        if isinstance(prompt, str):
            if not prompt.strip():
                problem = "is only whitespace" if prompt else "has no tokens"
                raise RecipeError(
                    f"{where}: the prompt {excerpt(prompt)} {problem}: remove or fill the row"
                )
            messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        else:
            messages = checked_messages(prompt, where)
        if not self.has_template:
            reason = next(self._reasons_for_a_template(given), None)
            if reason is None:
                return _Rendered(
                    where=where, text=str(prompt), has_special_tokens=False, prefill=""
                )
            raise RecipeError(
                f"{where}: the prompt needs a chat template ({reason}), but the tokenizer of "
                f"{self.tokenizer.name_or_path} has none: add chat_template.jinja (or chat_template in "
                "tokenizer_config.json) to the model directory, or use plain string prompts"
            )
        if self.data.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.data.system_prompt}, *messages]
        return self._render_chat(messages, given)

    def _reasons_for_a_template(self, given: PromptInput) -> Iterator[str]:
        if not isinstance(given.prompt, str):
            yield "it is a chat"
        if self.data.system_prompt is not None:
            yield "data.system_prompt is set"
        if given.tools:
            yield self._who_has_tools
        if given.arguments or self.data.chat_template_kwargs:
            yield "template arguments are set"

    @property
    def _who_has_tools(self) -> str:
        return "[environment] has tools" if self.tools else "the row has tools"

    def _render_chat(self, messages: list[dict[str, Any]], given: PromptInput) -> _Rendered:
        from jinja2 import TemplateError

        template = self._template(given.tools)
        self._check_template_renders_all(messages, given, template)
        messages, prefill = self._open_end(messages, given.where)
        if not renders_parts(self.tokenizer, template):
            messages = [
                {**message, "content": message_text(message)}
                if isinstance(message.get("content"), list)
                else message
                for message in messages
            ]
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=given.tools,
                tokenize=False,
                add_generation_prompt=not prefill,
                continue_final_message=bool(prefill),
                **{**self.data.chat_template_kwargs, **given.arguments},
            )
        # Templates concatenate missing values (TypeError), and transformers raises ValueError.
        except (TemplateError, TypeError, ValueError) as error:
            roles = [message["role"] for message in messages]
            raise RecipeError(
                f"{given.where}: the tokenizer's chat template rejects messages with roles {excerpt(roles)}: "
                f"{str(error)[:300]}"
            ) from error
        assert isinstance(text, str)
        return _Rendered(where=given.where, text=text, has_special_tokens=True, prefill=prefill)

    def _open_end(
        self, messages: list[dict[str, Any]], where: str
    ) -> tuple[list[dict[str, Any]], str]:
        """Return the messages before the model's turn, and the text that it continues."""
        last = messages[-1]
        if last["role"] != "assistant":
            return messages, ""
        if self.data.final_assistant_message == "error":
            raise RecipeError(
                f"{where}: the last message is the assistant's, but the model should write that one: remove it, or set "
                "data.final_assistant_message to 'continue' (the model continues it) or 'drop' (it is a reference "
                "answer)"
            )
        if self.data.final_assistant_message == "drop":
            if len(messages) == 1:
                raise RecipeError(f"{where}: the only message is the assistant's: nothing remains")
            return messages[:-1], ""
        text = message_text(last)
        if last.get("tool_calls") or not text.strip():
            problem = "calls tools" if last.get("tool_calls") else "is empty"
            raise RecipeError(
                f"{where}: the last message is the assistant's and {problem}, so the model has no text to "
                "continue: add the tools' answers, or remove it (data.final_assistant_message = 'drop')"
            )
        # From here on the parts of the message, if any, are one text.
        return [*messages[:-1], {**last, "content": text}], text

    def _template(self, tools: list[Any] | None) -> str:
        if not self.has_template:
            raise RecipeError(
                f"data.chat_template_kwargs is set, but the tokenizer of {self.tokenizer.name_or_path} has no chat "
                "template: remove it, or add chat_template.jinja to the model directory"
            )
        return self.tokenizer.get_chat_template(tools=tools)

    def _check_template_renders_all(
        self, messages: Sequence[Mapping[str, Any]], given: PromptInput, template: str
    ) -> None:
        if given.tools and "tools" not in template_variables(template):
            raise RecipeError(
                f"{given.where}: {self._who_has_tools}, but the tokenizer's chat template does not render "
                "tools: choose a model whose template does, or drop the column in data.drop_columns"
            )
        if "tool_calls" not in template and any(m.get("tool_calls") for m in messages):
            raise RecipeError(
                f"{given.where}: a message has tool_calls, but the tokenizer's chat template does not render "
                "them: choose a model whose template does, or remove such rows"
            )
        if given.arguments:
            self._check_arguments(
                given.arguments, template, f"{given.where}: column chat_template_kwargs"
            )

    def _check_arguments(self, arguments: Mapping[str, Any], template: str, where: str) -> None:
        known = template_variables(template) - set(self.tokenizer.special_tokens_map) - {"tools"}
        unknown = sorted(set(arguments) - known)
        if unknown:
            nearest = nearest_of(unknown[0], known)
            raise RecipeError(
                f"{where} sets {shortened(unknown)}, which the tokenizer's chat template never reads; it reads "
                f"{shortened(sorted(known)) or 'no argument'}{nearest}: rename or remove it"
            )
