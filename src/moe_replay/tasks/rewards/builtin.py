"""The reward functions that a recipe can name without writing any.

Each has the signature of a user's own: completions first, then what it needs by name, one number per completion back.

In: completions and dataset columns. Out: scores.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_TIMEOUT_S = 5
# White space behind it belongs to the template, as in "<think>\n".
_OPENED_TAG = re.compile(r"<([A-Za-z][\w-]*)>\s*\Z")


def reasoning_gym(
    completions: Sequence[str],
    *,
    prompts: Sequence[str],
    task: Sequence[Any],
    question: Sequence[str],
    answer: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    answer_tag: str = "answer",
) -> list[float]:
    """Score with the family's own scorer, 0 to 1, on the answer that `final_answer` finds."""
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
    """Score 1 where the answer that `final_answer` finds equals the column ``answer``, else 0."""
    for number, expected in enumerate(answer):
        if expected is None:
            raise ValueError(f"column answer is empty for sample {number}")
    texts = _with_opened_tags(prompts, completions, only=answer_tag)
    return [
        float(final_answer(text, answer_tag) == str(expected).strip())
        for text, expected in zip(texts, answer, strict=True)
    ]


def math_verify(completions: Sequence[str], *, answer: Sequence[object]) -> list[float]:
    r"""Score 1 where the completion's mathematical answer equals the column ``answer``, else 0.

    ``1/2``, ``0.5`` and ``$\frac{1}{2}$`` are equal. An answer that takes longer than 5 seconds to parse or compare
    scores 0; that limit is a signal, so it holds on the main thread only.
    """
    if not completions:
        return []
    from math_verify import parse, verify

    timeout = _TIMEOUT_S if threading.current_thread() is threading.main_thread() else 0
    # It warns on every call that a missing timeout is missing.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    scores: list[float] = []
    for number, (completion, expected) in enumerate(zip(completions, answer, strict=True)):
        gold = parse(str(expected), parsing_timeout=timeout) or parse(
            f"${expected}$", parsing_timeout=timeout
        )
        if not gold:
            raise ValueError(f"column answer of sample {number} is no mathematics: {expected!r}")
        got = parse(completion, parsing_timeout=timeout)
        scores.append(float(verify(gold, got, timeout_seconds=timeout)))
    return scores


def format(completions: Sequence[str], *, prompts: Sequence[str], regex: str) -> list[float]:
    """Score 1 where the whole completion matches ``regex`` (a dot matches newlines too), else 0.

    Where a chat template ends the prompt with an opened tag, such as ``<think>``, the completion together with that tag may
    match as well: the model could not write it.
    """
    pattern = re.compile(regex, flags=re.DOTALL)
    return [
        float(any(pattern.fullmatch(text) for text in texts))
        for texts in zip(completions, _with_opened_tags(prompts, completions), strict=True)
    ]


def _with_opened_tags(
    prompts: Sequence[str], completions: Sequence[str], *, only: str | None = None
) -> list[str]:
    """Put the tag that a prompt ends with before its completion; with ``only``, no other tag than that.

    A completion that begins with the part of the answer that its prompt gave has the tag already.
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
    """Return what the last ``<answer_tag>...</answer_tag>`` holds, or the whole completion where there is none.

    Example:
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
}
"""Name in a recipe -> function."""
