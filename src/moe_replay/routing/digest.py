"""A rolling digest of token ids binds routes to their tokens after any cut or transport.

The digest of row ``r`` covers the tokens of rows ``0..r``: ``d[r] = sum_{i<=r} mix(token[i]) * B**i
(mod 2**64)``, with ``mix`` the finaliser of SplitMix64 and ``B`` odd, hence invertible. Prefix sums
make cropping (subtract and divide by ``B**start``) linear in the rows, without the tokens. It
guards against mistakes, not against an adversary.

Worked example in decimal, mod 100, with ``mix(t) = t`` and ``B = 3`` (``1/3 = 67``): tokens 5 7 4.

    digest        5,  5 + 7*3 = 26,  26 + 4*9 = 62
    crop(1, 3)    (26 - 5) * 67 = 7,  (62 - 5) * 67 = 19     = the digest of 7 4:  7,  7 + 4*3 = 19
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Integer, UInt64

_BASE = 0x9E3779B97F4A7C15 | 1
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_OFFSET = 0x9E3779B97F4A7C15


def _mix(token_ids: Integer[np.ndarray, " tokens"]) -> UInt64[np.ndarray, " tokens"]:
    x = token_ids.astype(np.uint64) + np.uint64(_OFFSET)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FACTORS[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return x ^ (x >> np.uint64(31))


def _unmix(mixed: UInt64[np.ndarray, " tokens"]) -> UInt64[np.ndarray, " tokens"]:
    inverse = [np.uint64(pow(factor, -1, 1 << 64)) for factor in _FACTORS]
    x = mixed ^ (mixed >> np.uint64(31)) ^ (mixed >> np.uint64(62))
    x = x * inverse[1]
    x = x ^ (x >> np.uint64(27)) ^ (x >> np.uint64(54))
    x = x * inverse[0]
    x = x ^ (x >> np.uint64(30)) ^ (x >> np.uint64(60))
    return x - np.uint64(_OFFSET)


def _powers(base: int, count: int) -> UInt64[np.ndarray, " count"]:
    steps = np.full(count, base, dtype=np.uint64)
    if count:
        steps[0] = 1
    return np.cumprod(steps, dtype=np.uint64)


def digest_tokens(token_ids: Integer[np.ndarray, " tokens"]) -> UInt64[np.ndarray, " tokens"]:
    """Return the digest of every prefix of ``token_ids``.

    ``digest_tokens([5, 7])[0] == digest_tokens([5])[0]``: row ``r`` depends on rows ``0..r`` only.
    """
    ids = np.asarray(token_ids)
    return np.cumsum(_mix(ids) * _powers(_BASE, len(ids)), dtype=np.uint64)


def recover_tokens(digest: UInt64[np.ndarray, " tokens"]) -> UInt64[np.ndarray, " tokens"]:
    """Return the token ids that a digest was made of, negative ones modulo ``2**64``.

    Each step of the digest can be undone, so tokens and digest say the same in fewer or more bytes:
    ``digest_tokens(recover_tokens(d))`` is ``d`` for every ``d``.
    """
    steps = np.diff(digest, prepend=np.uint64(0))
    return _unmix(steps * _powers(_BASE_INVERSE, len(digest)))


def crop_digest(
    digest: UInt64[np.ndarray, " tokens"], start: int, stop: int
) -> UInt64[np.ndarray, " cropped"]:
    """Return the digest that the rows ``start:stop`` would have on their own."""
    before = digest[start - 1] if start else np.uint64(0)
    undo = np.uint64(pow(_BASE_INVERSE, start, 1 << 64))
    return (digest[start:stop] - before) * undo


def num_different_tokens(
    digest: UInt64[np.ndarray, " tokens"], rows: Bool[np.ndarray, " tokens"]
) -> int:
    """Count the different tokens among ``rows``."""
    return len(np.unique(recover_tokens(digest)[rows]))


def first_difference(
    ours: UInt64[np.ndarray, " tokens"], theirs: UInt64[np.ndarray, " tokens"]
) -> int | None:
    """Return the first row at which two digests differ, or None when every row agrees."""
    differs = ours != theirs
    return int(differs.argmax()) if differs.any() else None
