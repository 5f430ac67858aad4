"""vLLM beside itself: routes that are cached, chunked, decoded or of several turns, and cold ones.

Every comparison is of the same tokens, by two engines or two calls of one. Writes a line a
comparison to experiments/results/engine_routes.jsonl, and its table into docs/reproduction.md.

    python experiments/engine_routes.py           # after precision.py
    python experiments/engine_routes.py --table   # the table alone
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from commits import commit
from precision import DTYPES, MAX_COMPLETION, k3_sum, rollout_folder
from reproduction_results import fill_page, flips_of, keep_row, read_rows, rounded, table
from trained_models import FOLDER

from moe_replay.engines.files.format import RolloutFile
from moe_replay.engines.recording import GivenTokens, given_tokens, record_given
from moe_replay.engines.types import Completion, Engine, Request, RolloutGroup, SamplingParams
from moe_replay.routing import RoutingTrace

CHUNK, FEW = 64, 8
TURNS, TURN_LENGTH, ASKED_LENGTH = 3, 64, 8
BLOCK = 32  # tokens of a cache block on the CPU, see `moe_replay.engines.vllm.startup`
SEED = 0
# Noise of its own: with that of the rollout, first turns would repeat it and be cached.
TURN_SEED = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """An engine, and how many tokens of its prompts came from its cache."""

    engine: Engine
    """vLLM in this process."""
    cached: list[int]
    """Of each finished request."""


@contextmanager
def opened(folder: Path, dtype: str, **options: int) -> Iterator[Opened]:
    """Start vLLM with an empty cache."""
    from moe_replay.engines.vllm.engine import VllmEngine

    engine = VllmEngine(folder / "moe", dtype=dtype, max_context_length=512, **options)
    step, cached = engine._vllm.step, []

    def watched() -> list[object]:
        outputs = step()
        cached.extend(output.num_cached_tokens or 0 for output in outputs if output.finished)
        return outputs

    engine._vllm.step = watched
    try:
        yield Opened(engine=engine, cached=cached)
    finally:
        engine.close()


def recorded(opened_engine: Opened, given: Sequence[GivenTokens]) -> tuple[list[RoutingTrace], int]:
    """Return routes of given tokens, fed as prompts, and how many came from the cache."""
    before = len(opened_engine.cached)
    traces = [trace for _, trace in record_given(opened_engine.engine, given)]
    return traces, sum(opened_engine.cached[before:])


def compared(
    name: str,
    dtype: str,
    first: Sequence[RoutingTrace],
    second: Sequence[RoutingTrace],
    **more: object,
) -> dict[str, object]:
    """Return a line: how many (token, layer) pairs run other experts."""
    return {
        "row": f"{name}, {dtype}",
        "commit": commit(),
        "sequences": len(first),
        **flips_of(zip(first, second, strict=True)),
        **more,
    }


def measure(folder: Path, dtype: str, num_sequences: int | None) -> Iterator[dict[str, object]]:
    """Yield a line a comparison, for one number format."""
    rollout = RolloutFile(rollout_folder(folder, "moe", dtype, SEED))
    groups = [rollout.group(number) for number in rollout.request_ids][:num_sequences]
    given = list(given_tokens(groups))
    decoded = [group.completions[0].trace for group in groups]
    talks, hits_of_talks = conversations(folder, dtype, groups)
    with opened(folder, dtype) as one:
        cold, hits = recorded(one, given)
        yield compared("decoded beside prefilled", dtype, decoded, cold, cached=hits)
        again, hits = recorded(one, given)
        yield compared("from the prefix cache beside cold", dtype, again, cold, cached=hits)
        whole = [GivenTokens(name=str(n), token_ids=talk.token_ids) for n, talk in enumerate(talks)]
        cold_talks, _ = recorded(one, whole)
        yield other_format(folder, dtype, one, num_sequences)
    yield compared(
        f"last of {TURNS} turns beside cold",
        dtype,
        [talk.traces[-1] for talk in talks],
        cold_talks,
        cached=hits_of_talks,
    )
    yield compared(
        "complete blocks of the first turn in the last turn",
        dtype,
        *zip(*(shared_rows(talk) for talk in talks), strict=True),
        cached=hits_of_talks,
    )
    with opened(folder, dtype, max_tokens_per_forward=CHUNK, max_batch_size=CHUNK) as chunked:
        parts, hits = recorded(chunked, given)
    yield compared(f"prefilled in chunks of {CHUNK} beside cold", dtype, parts, cold, cached=hits)
    with opened(folder, dtype, max_batch_size=FEW) as few:
        repeated = few.engine.generate(
            [group.request for group in groups],
            SamplingParams(max_completion_length=MAX_COMPLETION, seed=SEED),
        )
    yield self_repeat(dtype, groups, repeated)


def other_format(
    folder: Path, dtype: str, one: Opened, num_sequences: int | None
) -> dict[str, object]:
    """Compare with the rollout of the other number format: the control, in which routes flip."""
    (other,) = (each for each in DTYPES if each != dtype)
    rollout = RolloutFile(rollout_folder(folder, "moe", other, SEED))
    groups = [rollout.group(number) for number in rollout.request_ids][:num_sequences]
    traces, hits = recorded(one, list(given_tokens(groups)))
    decoded = [group.completions[0].trace for group in groups]
    name = f"control: what {other} decoded, prefilled"
    return compared(name, dtype, decoded, traces, cached=hits)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Talk:
    """A conversation of several turns, each of which an engine sampled."""

    token_ids: np.ndarray
    """All of its tokens."""
    traces: Sequence[RoutingTrace]
    """Of each turn, from the first token of the conversation on."""


def conversations(
    folder: Path, dtype: str, groups: Sequence[RolloutGroup]
) -> tuple[list[Talk], int]:
    """Sample conversations, in which the beginning of another question follows each turn.

    Returns them, and how many tokens of their last prompts came from the cache.
    """
    prompts = [group.request.prompt_ids for group in groups]
    tokens, traces = list(prompts), [[] for _ in prompts]
    sampling = SamplingParams(max_completion_length=TURN_LENGTH, seed=TURN_SEED)
    with opened(folder, dtype) as engine:
        for turn in range(TURNS):
            before = len(engine.cached)
            answered = engine.engine.generate(
                [
                    Request(request_id=1000 * turn + number, prompt_ids=ids, num_generations=1)
                    for number, ids in enumerate(tokens)
                ],
                sampling,
            )
            for number, group in enumerate(answered):
                (completion,) = group.completions
                traces[number].append(completion.trace)
                tokens[number] = group.request.sequence(completion.token_ids)
                if turn + 1 < TURNS:
                    asked = prompts[(number + turn + 1) % len(prompts)][:ASKED_LENGTH]
                    tokens[number] = np.concatenate([tokens[number], asked])
        cached = sum(engine.cached[before:])
    talks = [
        Talk(token_ids=ids, traces=tuple(each)) for ids, each in zip(tokens, traces, strict=True)
    ]
    return talks, cached


def shared_rows(talk: Talk) -> tuple[RoutingTrace, RoutingTrace]:
    """Return the rows of the first turn in complete cache blocks, and the same of the last turn."""
    first, last = talk.traces[0], talk.traces[-1]
    rows = (len(first) - 1) // BLOCK * BLOCK
    return first.crop(0, rows), last.crop(0, rows)


def self_repeat(
    dtype: str, groups: Sequence[RolloutGroup], repeated: Sequence[RolloutGroup]
) -> dict[str, object]:
    """Compare a rollout with the same noise in smaller batches, up to the first other token."""
    pairs, sums, tokens, diverged, largest = [], 0.0, 0, 0, 0.0
    for one, other in zip(groups, repeated, strict=True):
        (first,), (second,) = one.completions, other.completions
        length = common_length(first, second)
        diverged += length < max(len(first.token_ids), len(second.token_ids))
        if length:
            ours, theirs = first.rollout_logprobs[:length], second.rollout_logprobs[:length]
            sums += k3_sum(ours, theirs)
            largest = max(largest, float(np.abs(ours - theirs).max()))
            tokens += length
        rows = len(one.request.prompt_ids) + length - 1
        pairs.append((first.trace.crop(0, rows), second.trace.crop(0, rows)))
    return compared(
        f"sampled {FEW} at a time beside 128",
        dtype,
        *zip(*pairs, strict=True),
        tokens=tokens,
        k3=rounded(sums / tokens),
        largest_difference=rounded(largest),
        diverged=diverged,
    )


def common_length(first: Completion, second: Completion) -> int:
    """Return how many tokens two completions begin with alike."""
    length = min(len(first.token_ids), len(second.token_ids))
    differ = np.flatnonzero(first.token_ids[:length] != second.token_ids[:length])
    return int(differ[0]) if len(differ) else length


def tables() -> dict[str, str]:
    """Return the table of the page by the name of its marks."""
    rows = read_rows("engine_routes")
    lines = [
        (
            row["row"],
            f"{row['sequences']:,}",
            f"{row['cached']:,}" if "cached" in row else "–",
            f"{row['flips']:,} of {row['pairs']:,}",
            f"{100 * row['flips'] / row['pairs']:.3g} %",
            f"{row['k3']:.1e} over {row['tokens']:,} tokens" if "k3" in row else "–",
        )
        for dtype in reversed(DTYPES)
        for row in rows.values()
        if row["row"].endswith(f", {dtype}")
    ]
    heads = ("vLLM beside itself", "sequences", "tokens from the cache", "flips", "share", "k3")
    return {"engine": table(heads, lines)}


def main() -> None:
    """Measure both number formats, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="models and rollouts")
    parser.add_argument("--sequences", type=int, help="of the rollout; default: all")
    options = parser.parse_args()
    if not options.table:
        for dtype in DTYPES:
            for row in measure(options.folder, dtype, options.sequences):
                keep_row("engine_routes", row)
                print(json.dumps(row), flush=True)
    fill_page(tables())


if __name__ == "__main__":
    main()
