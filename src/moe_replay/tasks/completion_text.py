"""Sampled tokens as the text that reward functions and people see.

In: a tokenizer, a completion. Out: its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_replay.engines.types import Completion, FinishReason


def completion_text(tokenizer: Any, completion: Completion, *, stop: Sequence[str] = ()) -> str:
    """Return what the model wrote, without the tokens that only frame it: padding, begin, end, and the stop token.

    Other special tokens stay, for some tokenizers have their ``<think>``, ``<answer>`` or ``<tool_call>`` among them, and a
    reward for the form of an answer has to see these. So does a special token that completes one of the recipe's ``stop``
    strings.
    """
    ids = completion.token_ids.tolist()
    whole = exact_text(tokenizer, ids) if stop else ""
    if (
        ids
        and not any(string in whole for string in stop)
        and completion.finish_reason is FinishReason.STOP
        and ids[-1] in tokenizer.all_special_ids
    ):
        ids = ids[:-1]
    frame = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    return exact_text(tokenizer, [i for i in ids if i not in frame])


def exact_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Return what token ids say, special tokens included and unaltered.

    Tokenizers whose config has ``clean_up_tokenization_spaces`` would write ``[1, 2]`` for ``[1 , 2]``, which nobody wrote.
    """
    return tokenizer.decode(
        token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
