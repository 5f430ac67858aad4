"""Stop strings for every engine: a completion ends with the token that completes a string.

Tokens are never split. The noise of a token depends on its position and not on what follows, so a
completion that is cut here equals that of an engine which looks for the strings while it samples.

In: completions, strings, a tokenizer. Out: completions that end where a string does.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int32

from moe_replay.engines.types import Completion, FinishReason, RolloutGroup
from moe_replay.tasks.completion_text import exact_text


@dataclass(frozen=True, slots=True, kw_only=True)
class StopStrings:
    """The strings of a recipe, and the tokenizer that finds them."""

    strings: tuple[str, ...]
    """Texts that end a completion; special tokens count as their text."""
    tokenizer: Any
    """A transformers tokenizer."""

    def cut(self, group: RolloutGroup) -> tuple[RolloutGroup, int]:
        """Return the group, its completions cut at their first stop string, and the tokens cut."""
        if not self.strings:
            return group, 0
        prompt_length = len(group.request.prompt_ids)
        kept, num_cut = [], 0
        for completion in group.completions:
            length = self.end(completion.token_ids)
            if length is not None:
                num_cut += len(completion.token_ids) - length
                completion = _ended(completion, prompt_length, length)
            kept.append(completion)
        return replace(group, completions=tuple(kept)), num_cut

    def end(self, token_ids: Int32[np.ndarray, " completion"]) -> int | None:
        """Return how many tokens complete the first stop string; None without one.

        If the texts after 1 to 4 tokens are ``a``, ``a</``, ``a</s>`` and ``a</s>b``, that is 3 for
        ``</s>``.
        """
        if not self._holds(token_ids):
            return None
        # A text that holds a string still holds it when it grows.
        lengths = range(1, len(token_ids) + 1)
        return 1 + bisect_left(lengths, True, key=lambda length: self._holds(token_ids[:length]))

    def _holds(self, token_ids: Int32[np.ndarray, " completion"]) -> bool:
        text = exact_text(self.tokenizer, token_ids.tolist())
        return any(string in text for string in self.strings)


def _ended(completion: Completion, prompt_length: int, length: int) -> Completion:
    trace = completion.trace
    if trace is not None and length < len(completion.token_ids):
        trace = trace.crop(0, prompt_length + length)
        # The last token of a completion counts as never run.
        trace = replace(trace, valid=trace.valid & (np.arange(len(trace)) < len(trace) - 1))
    return replace(
        completion,
        token_ids=completion.token_ids[:length],
        rollout_logprobs=completion.rollout_logprobs[:length],
        candidates=None if completion.candidates is None else completion.candidates.crop(length),
        trace=trace,
        finish_reason=FinishReason.STOP,
    )
