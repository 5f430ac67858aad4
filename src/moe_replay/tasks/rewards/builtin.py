"""Built-in reward functions.

Their signature is that of user functions: completions first, other inputs by name, one number a
completion returned.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_replay.tasks.generated import GeneratedTask

_TIMEOUT_S = 5
# Whitespace after it belongs to the template, as in "<think>\n".
_OPENED_TAG = re.compile(r"<([A-Za-z][\w-]*)>\s*\Z")


def reasoning_gym(
    completions: Sequence[str],
    *,
    prompts: Sequence[str],
    task: Sequence[GeneratedTask],
    question: Sequence[str],
    answer: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    answer_tag: str = "answer",
) -> list[float]:
    """Score the `final_answer` with the family's own scorer, 0 to 1."""
    items = (
        {"question": q, "answer": a, "metadata": m}
        for q, a, m in zip(question, answer, metadata, strict=True)
    )
    texts = _with_opened_tags(prompts, completions, only=answer_tag)
    return [
        owner.score(final_answer(text, answer_tag), item)
        for text, owner, item in zip(texts, task, items, strict=True)
    ]


def exact_match(
    completions: Sequence[str],
    *,
    prompts: Sequence[str],
    answer: Sequence[object],
    answer_tag: str = "answer",
) -> list[float]:
    """Score 1 if the `final_answer` equals the column ``answer``, else 0."""
    for index, expected in enumerate(answer):
        if expected is None:
            raise ValueError(f"column answer is empty for sample {index}")
    texts = _with_opened_tags(prompts, completions, only=answer_tag)
    return [
        float(final_answer(text, answer_tag) == str(expected).strip())
        for text, expected in zip(texts, answer, strict=True)
    ]


def math_verify(completions: Sequence[str], *, answer: Sequence[object]) -> list[float]:
    r"""Score 1 if the completion's mathematical answer equals the column ``answer``, else 0.

    ``1/2``, ``0.5`` and ``$\frac{1}{2}$`` are equal. An answer that takes longer than 5 seconds to
    parse or compare scores 0; the limit uses a signal, so it works only on the main thread.
    """
    if not completions:
        return []
    from math_verify import parse, verify

    timeout = _TIMEOUT_S if threading.current_thread() is threading.main_thread() else 0
    # Without a timeout it warns on every call.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    scores: list[float] = []
    for index, (completion, expected) in enumerate(zip(completions, answer, strict=True)):
        gold = parse(str(expected), parsing_timeout=timeout) or parse(
            f"${expected}$", parsing_timeout=timeout
        )
        if not gold:
            raise ValueError(
                f"cannot parse the answer of sample {index} as a math expression: {expected!r}"
            )
        got = parse(completion, parsing_timeout=timeout)
        scores.append(float(verify(gold, got, timeout_seconds=timeout)))
    return scores


def format(completions: Sequence[str], *, prompts: Sequence[str], regex: str) -> list[float]:
    """Score 1 if the full completion matches ``regex`` (a dot matches newlines too), else 0.

    If a chat template ends the prompt with an opened tag, such as ``<think>``, the completion with
    that tag in front may match instead: the model could not write the tag itself.
    """
    pattern = re.compile(regex, flags=re.DOTALL)
    return [
        float(any(pattern.fullmatch(text) for text in texts))
        for texts in zip(completions, _with_opened_tags(prompts, completions), strict=True)
    ]


def soft_overlong(
    completions: Sequence[str],
    *,
    completion_ids: Sequence[Sequence[int]],
    soft_max_length: int,
    soft_cache_length: int,
) -> list[float]:
    """Punish sampled tokens beyond ``soft_max_length - soft_cache_length``, down to -1.

    0 up to there, then falling in a line to -1 at ``soft_max_length``, and never lower. With 20 and
    4: 16 tokens score 0, 18 score -0.5, 20 and 25 score -1.

    Source: DAPO, arXiv 2503.14476, equation 13; names of ms-swift, which has no floor.
    """
    if not 0 < soft_cache_length <= soft_max_length:
        raise ValueError(
            f"soft_cache_length = {soft_cache_length} with soft_max_length = {soft_max_length}, "
            "expected 0 < soft_cache_length <= soft_max_length"
        )
    free = soft_max_length - soft_cache_length
    return [
        -min(1.0, max(0, len(token_ids) - free) / soft_cache_length) for token_ids in completion_ids
    ]


def _with_opened_tags(
    prompts: Sequence[str], completions: Sequence[str], *, only: str | None = None
) -> list[str]:
    """Prepend the tag that ends a prompt to its completion; with ``only``, just that tag.

    A completion that begins with the prefill of its prompt already has the tag.
    """
    texts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        opened = _OPENED_TAG.search(prompt)
        takes = opened is not None and only in (None, opened[1])
        if opened is not None:
            before, tag, _ = completion.partition(opened[0])
            takes = takes and not (tag and prompt.endswith(before + tag))
        texts.append(opened[0] + completion if opened is not None and takes else completion)
    return texts


def final_answer(completion: str, answer_tag: str) -> str:
    """Return the content of the last ``<answer_tag>...</answer_tag>``, or else the completion.

    Examples:
        >>> final_answer("2 + 2 is <answer>4</answer>", "answer")
        '4'
        >>> final_answer(" 4 ", "answer")
        '4'
    """
    tag = re.escape(answer_tag)
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", completion, flags=re.DOTALL)
    return (found[-1] if found else completion).strip()


BUILTIN_REWARDS: Mapping[str, Callable[..., list[float]]] = {
    "reasoning_gym": reasoning_gym,
    "exact_match": exact_match,
    "math_verify": math_verify,
    "format": format,
    "soft_overlong": soft_overlong,
}
"""Name in a recipe -> function."""
