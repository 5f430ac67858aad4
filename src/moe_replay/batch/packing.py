"""Which samples share a microbatch: fill a token budget, the same way on every rank and every run.

In: sequence lengths. Out: groups of sample positions.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe_replay.batch.balance import deal
from moe_replay.errors import RecipeError


def spread_over(
    groups: list[list[int]],
    count: int,
    *,
    lengths: Sequence[int],
    work: Sequence[float],
    max_tokens: int | None,
    max_samples: int | None,
) -> list[list[int]]:
    """Return the samples of ``groups`` in ``count`` microbatches of about equal work, most first.

    Every rank runs as many microbatches, and where experts span replicas all wait for the slowest,
    so the heaviest of each run together. Where the budget leaves no way to deal by work, the
    fullest group is halved. Fewer samples than ``count`` leave empty microbatches.

    Worked example: a rank needs one group for lengths 3 1 2, another rank two. With work as the
    squares 9 1 4, ``count = 2`` gives ``[[0], [1, 2]]``; ``count = 4`` gives
    ``[[0], [2], [1], []]``.
    """
    assert count >= len(groups)

    def has_room(part: list[int], position: int) -> bool:
        tokens = sum(lengths[p] for p in part) + lengths[position]
        return (max_tokens is None or tokens <= max_tokens) and (
            max_samples is None or len(part) < max_samples
        )

    dealt = deal(work, count, has_room=has_room)
    parts = split_to(groups, lengths, count) if dealt is None else dealt
    return sorted(parts, key=lambda part: (-sum(work[p] for p in part), not part, part))


def split_to(groups: list[list[int]], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Return ``groups`` split until there are ``count``, by empty ones where no sample is left.

    The group of most tokens is halved first, by tokens. Worked example:
    ``split_to([[0, 1, 2]], [3, 1, 2], 2)`` gives ``[[0], [1, 2]]``, 3 tokens each.
    """
    parts = list(groups)
    while len(parts) < count:
        splittable = [index for index, part in enumerate(parts) if len(part) > 1]
        if not splittable:
            return parts + [[] for _ in range(count - len(parts))]
        largest = max(splittable, key=lambda i: (sum(lengths[p] for p in parts[i]), -i))
        group = parts[largest]
        half, tokens = 0, 0
        while half < len(group) - 1 and (
            half == 0 or 2 * (tokens + lengths[group[half]]) <= sum(lengths[p] for p in group)
        ):
            tokens += lengths[group[half]]
            half += 1
        parts[largest : largest + 1] = [group[:half], group[half:]]
    return parts


def plan_microbatches(
    lengths: Sequence[int], *, max_tokens: int | None, max_samples: int | None
) -> list[list[int]]:
    """Return positions of ``lengths`` grouped within ``max_tokens`` and ``max_samples``.

    First-fit in decreasing length, ties by position: deterministic, and at most 11/9 of the minimum
    number of groups.

    Worked example: lengths 4 1 3 2 with ``max_tokens=5``. In the order 4, 3, 2, 1: the 4 opens
    group 0, the 3 opens group 1, the 2 fits group 1 (5 tokens), the 1 fits group 0 (5 tokens):
    ``[[0, 1], [2, 3]]``.

    Raises:
        RecipeError: when one sequence alone exceeds the budget; it is never cut.
    """
    if max_tokens is not None and lengths and max(lengths) > max_tokens:
        raise RecipeError(
            f"a sequence of {max(lengths)} tokens does not fit batch.max_tokens_per_microbatch = {max_tokens}; raise the "
            "budget to at least rollout.max_prompt_length + rollout.max_completion_length"
        )
    groups: list[list[int]] = []
    used: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda p: (-lengths[p], p)):
        for group, tokens in enumerate(used):
            fits = max_tokens is None or tokens + lengths[position] <= max_tokens
            if fits and (max_samples is None or len(groups[group]) < max_samples):
                groups[group].append(position)
                used[group] += lengths[position]
                break
        else:
            groups.append([position])
            used.append(lengths[position])
    return [sorted(group) for group in groups]
