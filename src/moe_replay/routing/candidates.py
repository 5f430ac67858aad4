"""Candidates: the vocabulary ids that truncation left for each sampled token.

With ``top_p``, ``top_k`` or ``min_p`` a token is drawn from a few of all ids, so the policy that
sampled is the softmax over these alone. A trainer that divides by the sum over the whole vocabulary
computes the probabilities of another policy; one that knows the candidates computes those of the
policy that sampled.

In: kept ids of each token. Out: one array of ids with a count a token, checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import EngineError
from moe_replay.routing.arrays import kept, owned

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32, Int64, Integer, UInt32

_ROUNDING = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidates:
    """Of S sampled tokens, the ids that each was drawn from: 8 bytes a token and 4 an id.

    Example: the first token was drawn from ids 3 and 7, which have 0.9 of the probability; of the
    second nothing was cut off; the third could only be 5::

        counts     2    0    1
        ids        3 7       5
        kept_mass  0.9  1.0  0.6
    """

    counts: Int32[np.ndarray, " sampled"]
    """``[S]`` candidates of each token; 0 where nothing was cut off, so that all ids are."""
    ids: UInt32[np.ndarray, " ids"]
    """Candidates of token after token, those of a token in ascending order."""
    kept_mass: Float32[np.ndarray, " sampled"]
    """``[S]``, above 0: the candidates' probability before the others were cut off; 1 where nothing
    was."""

    def __post_init__(self) -> None:
        wanted = (("counts", np.int32), ("ids", np.uint32), ("kept_mass", np.float32))
        for name, dtype in wanted:
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
                got = (
                    f"{array.dtype}{list(array.shape)}"
                    if isinstance(array, np.ndarray)
                    else type(array).__name__
                )
                raise EngineError(
                    f"{name} of candidates is {got}, expected a 1-dimensional numpy array of "
                    f"{np.dtype(dtype).name}"
                )
            object.__setattr__(self, name, kept(array))
        total, negative = int(self.counts.sum(dtype=np.int64)), bool((self.counts < 0).any())
        if negative or total != len(self.ids) or len(self.kept_mass) != len(self.counts):
            raise EngineError(
                f"candidates of {len(self.counts)} tokens have counts from "
                f"{self.counts.min(initial=0)} on that sum to {total}, {len(self.ids)} ids and "
                f"{len(self.kept_mass)} values of kept_mass, expected counts of 0 or more, one id "
                "for each counted one, and a kept_mass a token: the answer was cut or mixed up"
            )

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.counts.nbytes + self.ids.nbytes + self.kept_mass.nbytes

    @property
    def starts(self) -> Int64[np.ndarray, " ends"]:
        """``[S + 1]``: token t has ``ids[starts[t]:starts[t + 1]]``."""
        return np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])

    def of(self, token: int) -> UInt32[np.ndarray, " ids"]:
        """Return the candidates of one token; none where nothing was cut off."""
        starts = self.starts
        return self.ids[starts[token] : starts[token + 1]]

    def crop(self, stop: int) -> Candidates:
        """Return those of the first ``stop`` tokens."""
        return Candidates(
            counts=self.counts[:stop],
            ids=self.ids[: int(self.counts[:stop].sum(dtype=np.int64))],
            kept_mass=self.kept_mass[:stop],
        )

    def take(self, tokens: Int64[np.ndarray, " tokens"]) -> Candidates:
        """Return those of some tokens, in the order of ``tokens``.

        Example: of counts 2, 0, 1 and ids ``3 7 5`` the tokens 2 and 0 are counts 1, 2 and ids
        ``5 3 7``. Token 2 starts at 2 and token 0 at 0; the output positions 0, 1, 2 begin at 0
        and 1, so the ids are those at 2 + 0, then 0 + 0 and 0 + 1.
        """
        counts = self.counts[tokens]
        ends = np.cumsum(counts, dtype=np.int64)
        shift = np.repeat(self.starts[:-1][tokens] - (ends - counts), counts)
        return Candidates(
            counts=owned(counts),
            ids=owned(self.ids[np.arange(len(shift)) + shift]),
            kept_mass=owned(self.kept_mass[tokens]),
        )

    @staticmethod
    def concat(parts: Iterable[Candidates]) -> Candidates:
        """Return those of the tokens of all parts, one after another."""
        parts = list(parts)
        none = Candidates.unlimited(0)
        return Candidates(
            counts=owned(np.concatenate([none.counts, *(part.counts for part in parts)])),
            ids=owned(np.concatenate([none.ids, *(part.ids for part in parts)])),
            kept_mass=owned(np.concatenate([none.kept_mass, *(part.kept_mass for part in parts)])),
        )

    @staticmethod
    def unlimited(num_tokens: int) -> Candidates:
        """Return the candidates of tokens that were drawn from the whole vocabulary."""
        return Candidates(
            counts=owned(np.zeros(num_tokens, dtype=np.int32)),
            ids=owned(np.empty(0, dtype=np.uint32)),
            kept_mass=owned(np.ones(num_tokens, dtype=np.float32)),
        )

    @staticmethod
    def of_sets(
        sets: Sequence[Integer[np.ndarray, " _"]],
        kept_mass: Sequence[float] | Float32[np.ndarray, " sampled"],
    ) -> Candidates:
        """Return those of tokens whose candidates come one array a token."""
        none = np.empty(0, dtype=np.uint32)
        return Candidates(
            counts=owned(np.array([len(each) for each in sets], dtype=np.int32)),
            ids=owned(np.concatenate([none, *(each.astype(np.uint32) for each in sets)])),
            kept_mass=owned(np.array(kept_mass, dtype=np.float32)),
        )

    def check(
        self, sampled_ids: Int32[np.ndarray, " sampled"], *, vocab_size: int, where: str
    ) -> None:
        """Raise `EngineError` unless these can be the candidates of the tokens that were sampled.

        Every id must be in the vocabulary and once in its set, and every sampled token in its own.
        """
        if len(self) != len(sampled_ids):
            raise EngineError(
                f"{where}: candidates of {len(self)} tokens, expected {len(sampled_ids)}, one set "
                "for each sampled token"
            )
        token_of = np.repeat(np.arange(len(self)), self.counts)
        ids = self.ids.astype(np.int64)
        if len(ids) and ids.max() >= vocab_size:
            wrong = int((ids >= vocab_size).argmax())
            raise EngineError(
                f"{where}: a candidate of sampled token {token_of[wrong]} is {ids[wrong]}, expected "
                f"ids below {vocab_size}, the vocabulary of the model that is trained; the engine "
                "runs another model"
            )
        falls = (np.diff(ids) <= 0) & (np.diff(token_of) == 0)
        if falls.any():
            at = int(falls.argmax())
            raise EngineError(
                f"{where}: the candidates of sampled token {token_of[at]} hold {ids[at]} before "
                f"{ids[at + 1]}, expected ascending ids, each once; a repeated one would count "
                "twice: sort each set, and send each id once"
            )
        holds = self.counts == 0
        holds[token_of[ids == sampled_ids[token_of]]] = True
        if not holds.all():
            at = int((~holds).argmax())
            shown = self.of(at)
            raise EngineError(
                f"{where}: sampled token {at} is {sampled_ids[at]}, which is not among its "
                f"{len(shown)} candidates {shown[:8].tolist()}{'...' * (len(shown) > 8)}, expected "
                "every token to be drawn from its own; the sets belong to other tokens (shifted by "
                "one, or of another completion), or the engine draws from another set than it sends"
            )
        mass = self.kept_mass
        wrong_mass = ~((mass > 0) & (mass <= 1 + _ROUNDING))
        if wrong_mass.any():
            at = int(wrong_mass.argmax())
            raise EngineError(
                f"{where}: the candidates of sampled token {at} had the probability {mass[at]}, "
                "expected above 0 and at most 1"
            )
