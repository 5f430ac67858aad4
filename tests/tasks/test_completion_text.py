"""Reward functions see what the model wrote: tags stay, the tokens that frame a completion go."""

import numpy as np
import pytest

from moe_replay.engines.types import Completion, FinishReason
from moe_replay.tasks.completion_text import completion_text
from moe_replay.testing.tiny_models import character_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """Return a tokenizer whose tags are special tokens, as those of some checkpoints are."""
    made = character_tokenizer()
    made.add_special_tokens({"extra_special_tokens": ["<think>", "</think>", "<|turn|>"]})
    return made


def text_of(tokenizer, text: str, reason: FinishReason, **options) -> str:
    ids = np.array(tokenizer.encode(text), dtype=np.int32)
    completion = Completion(
        token_ids=ids,
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        trace=None,
        finish_reason=reason,
        policy_version=0,
    )
    return completion_text(tokenizer, completion, **options)


@pytest.mark.parametrize(
    ("written", "reason", "seen"),
    [
        ("<think>a</think>b<eos>", FinishReason.STOP, "<think>a</think>b"),
        ("<think>a</think>", FinishReason.LENGTH, "<think>a</think>"),
        ("a<|turn|>b<|turn|>", FinishReason.STOP, "a<|turn|>b"),
        ("a<|turn|>", FinishReason.LENGTH, "a<|turn|>"),
        ("<bos>a<pad>b", FinishReason.LENGTH, "ab"),
        ("ab", FinishReason.STOP, "ab"),
        ("", FinishReason.ABORTED, ""),
    ],
)
def test_d5_special_tokens_that_are_tags_stay(tokenizer, written, reason, seen):
    assert text_of(tokenizer, written, reason) == seen


@pytest.mark.parametrize(
    ("written", "seen"),
    [("a</think>", "a</think>"), ("a<|turn|>", "a"), ("a</think><eos>", "a</think>")],
)
def test_e19_a_special_token_that_completes_a_stop_string_stays(tokenizer, written, seen):
    assert text_of(tokenizer, written, FinishReason.STOP, stop=("</think>",)) == seen


def test_d5_tags_are_special_tokens_here(tokenizer):
    ids = tokenizer.encode("<think>a")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"


def test_d5_spaces_that_the_model_wrote_stay():
    made = character_tokenizer()
    made.clean_up_tokenization_spaces = True
    written = "I do n't , [1 , 2] ?"
    # The control: what the tokenizer's own setting makes of it.
    assert made.decode(made.encode(written)) == "I don't, [1, 2]?"
    assert text_of(made, written, FinishReason.LENGTH) == written
    assert text_of(made, written, FinishReason.STOP, stop=(" ?",)) == written
