"""Who computes what: samples dealt by their work, so that no rank waits long for another.

Memory goes by tokens, time by work: packing fills a budget of tokens, dealing evens out work.

In: lengths. Out: groups of sample positions, the same on every rank and in every run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence


def work_of(length: int, even_length: float) -> float:
    """Return the work of a sequence, in the unit of one token attending to one other.

    ``even_length`` are the tokens at which attention costs as much as all weights together. Worked
    example with 15,500, as in Qwen3-30B-A3B: 1,000 tokens are 1.65e7, 15,500 tokens 4.8e8: 15.5
    times as long is 29 times the work.
    """
    return length * (length + even_length)


def deal(
    work: Sequence[float],
    num_parts: int,
    *,
    has_room: Callable[[list[int], int], bool] = lambda part, position: True,
) -> list[list[int]] | None:
    """Deal positions of ``work`` to parts: the most work first, each to the part with least so far.

    Ties go by position, and to the part of the lowest number. ``has_room`` (a part, a position)
    says whether a part may take it; None when some position finds no part. A part is empty when
    there are fewer positions than parts.

    Worked example: work 5 4 3 3 1 for two parts. 5 goes to part 0, 4 and a 3 to part 1, the other 3
    to part 0, and 1 to part 1, which has 7 and not 8: ``[[0, 3], [1, 2, 4]]``, 8 each.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [(0.0, number) for number in range(num_parts)]
    for position in sorted(range(len(work)), key=lambda p: (-work[p], p)):
        full = []
        while loads and not has_room(parts[loads[0][1]], position):
            full.append(heapq.heappop(loads))
        if not loads:
            return None
        load, number = loads[0]
        parts[number].append(position)
        heapq.heapreplace(loads, (load + work[position], number))
        for entry in full:
            heapq.heappush(loads, entry)
    return [sorted(part) for part in parts]
