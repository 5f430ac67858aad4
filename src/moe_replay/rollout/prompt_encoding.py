"""Prompts as token ids: the tokenizer of a checkpoint, its chat template, and what happens to prompts too long.

In: a checkpoint directory, strings or chat messages. Out: `load_tokenizer`, `PromptEncoder`. Called by: rollout.prompts,
grpo.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from moe_replay.errors import RecipeError
from moe_replay.rollout.checkpoint_config import reason

Truncation = Literal["error", "delete", "left"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(model_dir: Path) -> Any:
    """Load the tokenizer of a checkpoint directory, without any network.

    Raises:
        RecipeError: when the directory or its tokenizer is missing or unreadable.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise RecipeError(
            f"model.path {model_dir} is not a directory: expected a local Hugging Face checkpoint with config.json, "
            "safetensors and tokenizer (models are not downloaded)"
        )
    if not any((model_dir / name).is_file() for name in _TOKENIZER_FILES):
        found = ", ".join(sorted(file.name for file in model_dir.iterdir())) or "nothing"
        raise RecipeError(
            f"no tokenizer in {model_dir}: expected tokenizer.json (with tokenizer_config.json), found {found}. Copy "
            "the tokenizer files of the original checkpoint into it"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    # The tokenizers library raises bare Exception on a damaged file.
    except Exception as error:
        raise RecipeError(
            f"the tokenizer in {model_dir} cannot be loaded: {reason(error)}. Copy the tokenizer files of the original "
            "checkpoint again"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEncoder:
    """Turns a prompt into token ids.

    One rule: chat messages are rendered by the tokenizer's chat template, opened for the assistant's turn; a plain
    string is one user message if the tokenizer has a chat template, and is tokenized as it is if it has none.
    """

    tokenizer: Any
    """A transformers tokenizer."""
    max_prompt_length: int
    """Most tokens of a prompt."""
    truncation: Truncation = "error"
    """What is done with a longer one: ``error``, ``delete`` (the source leaves it out) or ``left``."""
    system_prompt: str | None = None
    """System message put before every chat that has none."""

    def encode(
        self, prompt: object, *, where: str
    ) -> tuple[Int32[np.ndarray, " prompt"], str] | None:
        """Return ids and text, or None for a prompt that is to be deleted.

        Raises:
            RecipeError: when the prompt has another type, cannot be rendered, is empty or is too long.
        """
        text, ids = self._tokenize(prompt, where)
        if not ids:
            raise RecipeError(
                f"{where}: the prompt {prompt!r} has no tokens: remove or fill the row"
            )
        if len(ids) > self.max_prompt_length:
            if self.truncation == "delete":
                return None
            if self.truncation == "error":
                raise RecipeError(
                    f"{where}: the prompt has {len(ids)} tokens, data.max_prompt_length is "
                    f"{self.max_prompt_length}. It starts {_excerpt(text)}. Raise the limit, or set data.truncation "
                    "to 'delete' (leave such prompts out) or 'left' (drop tokens at their start)"
                )
            ids = ids[-self.max_prompt_length :]
            text = self.tokenizer.decode(ids)
        return np.array(ids, dtype=np.int32), text

    def _tokenize(self, prompt: object, where: str) -> tuple[str, list[int]]:
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if isinstance(prompt, str):
            if not has_template and self.system_prompt is None:
                return prompt, self.tokenizer(prompt).input_ids
            messages: list[Any] = [{"role": "user", "content": prompt}]
        else:
            messages = _check_messages(prompt, where)
        if not has_template:
            reason = "data.system_prompt is set" if isinstance(prompt, str) else "it is a chat"
            raise RecipeError(
                f"{where}: the prompt needs a chat template ({reason}), but the tokenizer of "
                f"{self.tokenizer.name_or_path} has none: add chat_template.jinja (or chat_template in "
                "tokenizer_config.json) to the model directory, or give plain string prompts"
            )
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        text = self._render(messages, where)
        return text, self.tokenizer(text, add_special_tokens=False).input_ids

    def _render(self, messages: list[Any], where: str) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise RecipeError(
                f"{where}: the tokenizer's chat template refuses messages with roles {roles}: {error}"
            ) from error


def _check_messages(prompt: object, where: str) -> list[Any]:
    if not isinstance(prompt, list) or not prompt:
        raise RecipeError(
            f"{where}: the prompt is {_excerpt(prompt)} ({type(prompt).__name__}), expected a string or a non-empty list of "
            '{"role": ..., "content": ...} messages'
        )
    for number, message in enumerate(prompt):
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise RecipeError(
                f"{where}: message {number} is {_excerpt(message)}, expected an object with the texts role and content"
            )
    if prompt[-1]["role"] == "assistant":
        raise RecipeError(
            f"{where}: the last message is the assistant's, but the model is to write that one: remove it"
        )
    return prompt


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
