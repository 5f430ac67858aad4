"""The completions that a page shows: of telling steps, within a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_replay.grpo.records import CompletionRecord
from moe_replay.report.page.runs import RunView
from moe_replay.report.page.verdict import dropped_samples

MAX_STEPS = 12
"""Steps of a run whose completions are shown."""
MAX_SAMPLES = 12
"""Completions of each of them."""
MAX_CHARACTERS = 4000
"""Of a prompt or a completion; the rest is cut off, and the page says so."""
MAX_TOKENS = 1500
"""Tokens of a completion that are shown one by one."""
_LOWEST = "replay/agreement_min_sample"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSamples:
    """What a page shows of a run's completions."""

    samples: Sequence[dict[str, Any]]
    """Plain values, in the order of steps and samples."""
    note: str
    """Which they are."""


def shown_samples(run: RunView) -> ShownSamples:
    """Return the completions of a run that its page shows."""
    steps = _telling_steps(run)
    by_step: dict[int, list[CompletionRecord]] = {step: [] for step in steps}
    for record in run.directory.read_completions(steps):
        by_step[record.step].append(record)
    # The guard drops samples that come late in a step, too: they must not be cut off.
    samples = [_plain(record) for step in steps for record in _telling(by_step[step])]
    if not samples:
        return ShownSamples(
            samples=(), note="It kept no completions (logging.completions), or none is finished."
        )
    recorded = len(run.steps)
    of_steps = f"{len(steps)} of {recorded} steps" if recorded > len(steps) else "all steps"
    return ShownSamples(
        samples=samples,
        note=f"{len(samples)} completions of {of_steps}, at most {MAX_SAMPLES} of each: first and last "
        "steps, those with dropped samples or the lowest agreement, and some between. Of each step: "
        "dropped ones, those with tokens, then the first. All of them are in completions.jsonl.",
    )


def _telling_steps(run: RunView) -> list[int]:
    """Return the steps whose completions are shown, at most `MAX_STEPS`."""
    every = [record.step for record in run.steps]
    if len(every) <= MAX_STEPS:
        return every
    ranked = sorted(run.steps, key=lambda record: record.metrics.get(_LOWEST, 1.0))
    dropped = [step for step, _ in dropped_samples(run)]
    lowest = [record.step for record in ranked if _LOWEST in record.metrics][:3]
    spread = [every[round(at * (len(every) - 1) / (MAX_STEPS - 1))] for at in range(MAX_STEPS)]
    # What tells most comes first; the bound cuts the steps between off.
    wanted = dict.fromkeys([*dropped[:4], every[0], every[-1], *lowest, *spread])
    return sorted(list(wanted)[:MAX_STEPS])


def _telling(records: Sequence[CompletionRecord]) -> list[CompletionRecord]:
    """Return the completions of a step that are shown, in the order of the step."""
    places = sorted(
        range(len(records)),
        key=lambda at: (records[at].dropped is None, records[at].tokens is None, at),
    )
    return [records[at] for at in sorted(places[:MAX_SAMPLES])]


def _plain(record: CompletionRecord) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "step": record.step,
        "sample": record.sample,
        "item": record.item,
        "prompt": _cut(record.prompt),
        "completion": _cut(record.completion),
        "reward": record.reward,
        "rewards": dict(record.rewards),
        "advantage": record.advantage,
        "numTokens": record.num_tokens,
        "finish": record.finish_reason,
        "version": record.policy_version,
        "server": record.server,
        "dropped": record.dropped,
        "agreement": record.agreement,
    }
    tokens = record.tokens
    if tokens is not None:
        kept = slice(0, MAX_TOKENS)
        plain["tokens"] = {
            "texts": list(tokens.texts[kept]),
            "rollout": list(tokens.rollout_logprobs[kept]),
            "old": list(tokens.old_logprobs[kept]),
            "flips": None if tokens.flips is None else list(tokens.flips[kept]),
            "omitted": max(0, len(tokens.texts) - MAX_TOKENS),
        }
    return plain


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} [… {len(text) - MAX_CHARACTERS:,} more characters]"
