"""Which samples of a step are kept token by token: those that tell most, and the first."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def samples_with_tokens(
    agreement: Mapping[int, float], dropped: Collection[int], *, num_kept: int
) -> frozenset[int]:
    """Return the indices in the step of the samples whose tokens are kept, at most ``num_kept``.

    Half of them are those that the guard dropped, then those with the lowest agreement; the others
    are the first of the step. Where nothing was replayed, all are the first.

    Examples:
        >>> sorted(samples_with_tokens({0: 0.99, 1: 0.98, 2: 0.99, 3: 0.2}, {3}, num_kept=2))
        [0, 3]
    """
    lowest = sorted(agreement, key=lambda index: (index not in dropped, agreement[index], index))
    chosen = set(lowest[: (num_kept + 1) // 2])
    first = 0
    while len(chosen) < num_kept:
        chosen.add(first)
        first += 1
    return frozenset(chosen)
