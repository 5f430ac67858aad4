"""Text of an environment as plain tokens, whatever it spells: a tool must not end a turn.

A tokenizer makes one token of the text ``<|im_end|>`` wherever it stands. In the messages of an
environment such texts are marked before the chat template writes them, and are tokenized in pieces
after it::

    messages   rain<|im_end|>          rendered   [tool]rainf0q9z[end]
    marked     rainf0q9z               tokens     [tool] rain  < |im_end|>  [end]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

from moe_replay.tasks.chat_messages import well_formed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def own_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what finds a text that a tokenizer makes one token of, wherever it stands.

    Runs of spaces, and single characters, which some tokenizers add, say nothing but themselves.
    """
    own = [text for text in tokenizer.get_added_vocab() if len(text) > 1 and text.strip()]
    # Longest first, as a tokenizer finds them.
    own.sort(key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in own) or r"(?!)")


class PlainText:
    """The messages of one suffix, marked where they spell a token of the tokenizer's own."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, own: re.Pattern[str], texts: Sequence[str]
    ) -> None:
        """Take `own_tokens`, and all texts that will be marked: no mark stands in any of them."""
        self._tokenizer, self._own = tokenizer, own
        whole = "\n".join(map(well_formed, texts))
        salt = 0
        while (mark := f"f{sha256(f'{salt} {whole}'.encode()).hexdigest()[:10]}q") in whole:
            salt += 1
        self._mark = mark
        self._spelled: list[str] = []

    def marked(self, text: str) -> str:
        """Return a text with marks; halves of surrogate pairs become question marks."""

        def mark(found: re.Match[str]) -> str:
            self._spelled.append(found[0])
            return f"{self._mark}{len(self._spelled) - 1}z"

        return self._own.sub(mark, well_formed(text))

    def ids(self, rendered: str) -> list[int]:
        """Return the tokens of what a template made of marked texts."""
        ids: list[int] = []
        for number, part in enumerate(re.split(f"{self._mark}([0-9]+)z", rendered)):
            if number % 2:
                for piece in self._pieces(self._spelled[int(part)]):
                    ids += self._tokenized(piece)
            elif part:
                ids += self._tokenized(part)
        return ids

    def _pieces(self, text: str) -> Iterator[str]:
        """Yield parts of a text that spell no token of the tokenizer's own."""
        while (found := self._own.search(text)) is not None:
            at = found.start() + 1
            yield text[:at]
            text = text[at:]
        yield text

    def _tokenized(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
