"""Turn sampled tokens into the text that reward functions and people see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_replay.engines.types import Completion, FinishReason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def completion_text(
    tokenizer: PreTrainedTokenizerBase, completion: Completion, *, stop: Sequence[str] = ()
) -> str:
    """Return what the model wrote, without padding, begin, end and stop tokens.

    Other special tokens stay: in some tokenizers ``<think>``, ``<answer>`` or ``<tool_call>`` are
    special, and a reward for the format of an answer must see them. A special token that completes
    one of the recipe's ``stop`` strings stays too.
    """
    ids = completion.token_ids.tolist()
    full_text = exact_text(tokenizer, ids) if stop else ""
    if (
        ids
        and not any(string in full_text for string in stop)
        and completion.finish_reason is FinishReason.STOP
        and ids[-1] in tokenizer.all_special_ids
    ):
        ids = ids[:-1]
    frame = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    return exact_text(tokenizer, [i for i in ids if i not in frame])


def exact_text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """Decode token ids exactly, special tokens included.

    Tokenizers with ``clean_up_tokenization_spaces`` would turn ``[1 , 2]`` into ``[1, 2]``.
    """
    text = tokenizer.decode(
        token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text
