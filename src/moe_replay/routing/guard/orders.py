"""Orders of rows that one side uses and the other does not: where a row's right route then lies.

A *source* says for each row where its right route was put. Both faults below come in two
directions: routes are cut or laid out in one order, tokens in the other, or the other way round.

In: numbers of rows, ranks and samples. Out: sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64, Integer

    Place = tuple[str, Int64[np.ndarray, " positions"], Bool[np.ndarray, " positions"]]
    Sources = tuple[str, Int64[np.ndarray, " tokens"], Int64[np.ndarray, " tokens"]]

_CP_SIZES = (2, 4, 8, 16)
_SPAN = 2**31
"""Above every position."""


def order_places(
    sample: Integer[np.ndarray, " rows"],
    position: Integer[np.ndarray, " rows"],
    valid: Bool[np.ndarray, " rows"],
    number: int,
    wanted: Int64[np.ndarray, " positions"],
) -> Iterator[Place]:
    """Yield (words, rows, which are valid) of the right routes of a sample under each fault.

    ``wanted`` are positions of sample ``number``. Rows that are not valid say how long samples are;
    where the last token of a sample has no row at all, as engines route none, it counts too.
    """
    given = np.flatnonzero(sample >= 0)
    order = given[np.lexsort((position[given], sample[given]))]
    at = position[order].astype(np.int64)
    keys = sample[order].astype(np.int64) * _SPAN + at
    numbers, starts = np.unique(sample[order], return_index=True)
    last = np.maximum.reduceat(at, starts)
    entry = int(np.searchsorted(numbers, number))
    for beyond in (1, 2):
        lengths = last + beyond
        for words, entries, positions in (
            *zigzag_sources(entry, int(lengths[entry])),
            *flattened_sources(entry, lengths),
        ):
            key = numbers[entries[wanted]].astype(np.int64) * _SPAN + positions[wanted]
            there = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            yield words, order[there], (keys[there] == key) & valid[order[there]]


def zigzag(num_rows: int, cp_size: int) -> Int64[np.ndarray, " rows"]:
    """Return the rows of a padded sequence in the order of context-parallel ranks, zigzag.

    Each rank holds a chunk from the start and its mirror from the end. Example: 8 rows on 2 ranks
    are ``[0 1 6 7 2 3 4 5]``.
    """
    chunks = np.arange(num_rows).reshape(2 * cp_size, -1)
    order = [part for rank in range(cp_size) for part in (rank, 2 * cp_size - 1 - rank)]
    return chunks[order].ravel()


def zigzag_sources(entry: int, num_tokens: int) -> Iterator[Sources]:
    """Yield (words, entries, positions) of the right routes of one sample's tokens.

    Each sequence is padded to a multiple of twice the ranks. ``entry`` counts samples.
    """
    for cp_size in _CP_SIZES:
        padded = -(-num_tokens // (2 * cp_size)) * 2 * cp_size
        if num_tokens < 4 * cp_size:
            return
        order = zigzag(padded, cp_size)
        for words, source in (
            ("routes were cut contiguously and tokens zigzag", order),
            ("routes were cut zigzag and tokens contiguously", np.argsort(order)),
        ):
            yield (
                f"context-parallel order of {cp_size} ranks: {words}",
                np.full(num_tokens, entry),
                source[:num_tokens],
            )


def flattened_sources(entry: int, lengths: Int64[np.ndarray, " samples"]) -> Iterator[Sources]:
    """Yield (words, entries, positions) of the right routes of one sample's tokens.

    In a padded microbatch of b samples of s rows, row t of sample i is row ``i s + t`` where it is
    flattened sample by sample, and ``t b + i`` where the sequence comes first. ``entry`` counts
    samples in the order of the batch, ``lengths`` are their tokens; b is any power of two.

    Worked example: b = 2, s = 3, and routes flattened sample by sample that were read sequence
    first. The route of row 1 of sample 1 is number 1 * 3 + 1 = 4 of all, which was read as row 2 of
    sample 0 (2 * 2 + 0 = 4).
    """
    size = 2
    while size <= len(lengths):
        first = entry // size * size
        if first + size <= len(lengths):
            longest = int(lengths[first : first + size].max())
            inside = entry - first
            row = np.arange(int(lengths[entry]))
            words = f"microbatch of {size} padded samples: routes were flattened"
            flat = inside * longest + row
            yield (
                f"{words} sample by sample and read sequence first",
                first + flat % size,
                flat // size,
            )
            flat = row * size + inside
            yield (
                f"{words} sequence first and read sample by sample",
                first + flat // longest,
                flat % longest,
            )
        size *= 2
