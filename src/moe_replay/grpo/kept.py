"""The completions whose texts a run keeps: the first of each step and evaluation."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float64

from moe_replay.engines.types import RolloutGroup
from moe_replay.grpo.records import CompletionRecord
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import Conversation
from moe_replay.tasks.encoding import Prompt

_RECORD_BYTES = 1024  # of a record beside its texts and columns, generously


def kept_completions(
    run: Run,
    prompts: Sequence[Prompt] | Mapping[int, Prompt],
    own: Sequence[int],
    groups: Sequence[RolloutGroup],
    *,
    texts: Sequence[str],
    rewards: Mapping[str, Float64[np.ndarray, " completions"]],
    totals: Float64[np.ndarray, " completions"],
    advantages: Float64[np.ndarray, "prompts generations"] | None = None,
    dropped: Mapping[int, str] | None = None,
    conversations: Sequence[Conversation] = (),
    held_out: str = "",
    also: Collection[int] = (),
) -> list[CompletionRecord]:
    """Return the first ``logging.completions`` of all ranks in prompt order, on rank 0; collective.

    ``groups[i]`` answers ``prompts[own[i]]``; ``texts``, ``rewards`` and ``totals`` follow their
    completions. ``dropped`` (index of the completion in the step -> why) are those that the guard
    kept out of training. ``held_out`` names the set of an evaluation. Completions in ``also``
    (indices in the step) are kept wherever they stand.
    """
    dropped = {} if dropped is None else dropped
    records: list[tuple[int, CompletionRecord]] = []
    row = 0
    for prompt_index, group in zip(own, groups, strict=True):
        prompt = prompts[prompt_index]
        for number, completion in enumerate(group.completions):
            index = prompt_index * len(group.completions) + number
            if index < run.recipe.logging.completions or index in also:
                advantage = None if advantages is None else float(advantages[prompt_index, number])
                record = CompletionRecord(
                    step=run.step,
                    item=prompt.index,
                    prompt=prompt.text,
                    columns=_columns_read(run, prompt),
                    completion=texts[row],
                    rewards={name: _score(scores[row]) for name, scores in rewards.items()},
                    reward=_score(totals[row]),
                    advantage=advantage,
                    num_tokens=len(completion.sampled_ids),
                    finish_reason=str(completion.finish_reason),
                    policy_version=completion.policy_version,
                    server=completion.server,
                    held_out=held_out,
                    dataset="" if held_out else prompt.dataset,
                    dropped=dropped.get(index),
                    sample=index,
                    turns=[asdict(part) for part in conversations[row].parts]
                    if conversations
                    else None,
                )
                records.append((index, record))
            row += 1
    gathered = run.ranks.gather_items_to_first(records, _num_bytes)
    everyone = sorted((entry for part in gathered for entry in part), key=lambda entry: entry[0])
    return [record for _, record in everyone]


def _num_bytes(entry: tuple[int, CompletionRecord]) -> int:
    """Return about how long a message with a record is; columns count as long as their text."""
    record = entry[1]
    texts = (record.prompt, record.completion, str(record.columns), str(record.turns or ""))
    return sum(4 * len(text) for text in texts) + _RECORD_BYTES


def _columns_read(run: Run, prompt: Prompt) -> dict[str, Any]:
    """Return the columns that some reward function takes, without those that JSON cannot hold."""
    takes = run.inputs.rewards.takes
    return {name: v for name, v in prompt.columns.items() if takes(name) and _is_plain(v)}


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)


def _score(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
