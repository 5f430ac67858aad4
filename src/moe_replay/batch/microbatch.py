"""Microbatch: the samples of one forward pass, each per-token value in the rows of one RowIndex.

In: samples. Out: Microbatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from moe_replay.batch.place import RankPlace
from moe_replay.batch.samples import Sample
from moe_replay.routing import RouteSlice, RowIndex
from moe_replay.routing.candidates import Candidates


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Microbatch:
    """The rows of one rank: arrays of ``[rows]`` in the order in which the model sees them."""

    key: int
    """Number of the microbatch in its pass; the replay scope finds routes by it."""
    samples: tuple[Sample, ...]
    """The samples, in the order of the concatenated batch; none where a rank runs along, because
    the pipeline or another rank needs more microbatches than it has samples."""
    index: RowIndex
    """Where each local row comes from."""
    token_ids: Int64[np.ndarray, " rows"]
    """Input ids; padding repeats those of samples, so that it uses experts as tokens do."""
    positions: Int64[np.ndarray, " rows"]
    """Position of the token in its own sequence, 0 at padding."""
    sample_ids: Int64[np.ndarray, " rows"]
    """`Sample.sample_id` of the row's sample, -1 at padding."""
    next_ids: Int64[np.ndarray, " rows"]
    """Id of the following token of the same sequence; 0 where there is none."""
    predicts_sampled: Bool[np.ndarray, " rows"]
    """True where the following token was sampled: the rows that have log-probabilities."""
    router_rows: slice
    """The local rows that this rank's routers see: all, or its part under sequence parallelism."""
    row_multiple: int
    """The rows of every rank are padded to a multiple of this."""
    routes: RouteSlice | None
    """Routes of the router rows; None when nothing is replayed, or before they were shared."""

    @property
    def router_index(self) -> RowIndex:
        """Row index of the router rows."""
        return replace(self.index, rows=self.index.rows[self.router_rows])

    @property
    def num_padding_rows(self) -> int:
        """Router rows that hold no token."""
        return int((~self.index.is_token[self.router_rows]).sum())

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(sample.token_ids) for sample in self.samples]

    @property
    def num_rows(self) -> int:
        """Local rows, padding included."""
        return len(self.token_ids)

    def place(self, values: Sequence[np.ndarray], *, fill: float) -> Float32[np.ndarray, " rows"]:
        """Put an array of ``[S]`` per sample (a value for each sampled token) into the local rows.

        Samples with prompts of 2 and 1 tokens and 2 sampled ones each: the value of the first
        sampled token stands in the row of the last prompt token, so ``[a b]`` and ``[c d]`` become
        the batch rows ``[- a b - c d -]``, of which a rank takes its own. Rows that predict a token
        of an environment stay empty too.
        """
        rows = np.full(self.index.num_rows, fill, dtype=np.float32)
        for predicting, array in zip(self._predicting_rows(), values, strict=True):
            assert len(array) == len(predicting), "one value for each sampled token"
            rows[predicting] = array
        return self.index.gather(rows, fill=fill)

    def collect(self, rows: Float32[np.ndarray, " batch_rows"]) -> list[np.ndarray]:
        """Return each sample's ``[S]`` values from all batch rows; the inverse of `place`."""
        return [rows[predicting] for predicting in self._predicting_rows()]

    def candidates(self) -> Candidates | None:
        """Return what the tokens that `predicts_sampled` rows of this rank predict were drawn from.

        In the order of these rows; None when all were drawn from the whole vocabulary.

        Samples with prompts of 2 and 1 tokens and 2 sampled ones each have the sets A, B and C, D,
        and the batch rows ``[- A B - C D -]`` with numbers ``[- 0 1 - 2 3 -]`` of the sampled
        tokens. A rank with the batch rows 5, 1, 0 and 4 has D, A and C: numbers 3, 0 and 2.
        """
        given = [sample.candidates for sample in self.samples]
        if all(each is None for each in given):
            return None
        every = Candidates.concat(
            Candidates.unlimited(sample.completion_length) if each is None else each
            for sample, each in zip(self.samples, given, strict=True)
        )
        numbers = np.zeros(self.index.num_rows, dtype=np.int64)
        rows = np.concatenate(list(self._predicting_rows()))
        numbers[rows] = np.arange(len(rows))
        return every.take(numbers[self.index.rows[self.predicts_sampled]])

    def _predicting_rows(self) -> Iterator[Int64[np.ndarray, " sampled"]]:
        """Yield for each sample the batch rows that predict its sampled tokens."""
        start = 0
        for sample in self.samples:
            yield start + np.flatnonzero(sample.predicts_sampled)
            start += len(sample.token_ids)


def build_microbatch(
    key: int,
    samples: Sequence[Sample],
    *,
    place: RankPlace = RankPlace(),  # noqa: B008 - frozen
    row_multiple: int = 1,
    spare_ids: Int32[np.ndarray, " spare"] | None = None,
) -> Microbatch:
    """Pack ``samples`` into the rows of one rank; the routes come later.

    ``row_multiple`` pads the local rows beyond what ``place`` needs, for a dispatcher that wants
    equally many rows on every rank. A microbatch without samples needs ``spare_ids``, tokens of
    others, to feed in its padding.
    """
    lengths = [len(sample.token_ids) for sample in samples]
    index = place.row_index(lengths, row_multiple=row_multiple)

    def joined(parts: list[np.ndarray]) -> Int64[np.ndarray, " batch_rows"]:
        return np.concatenate([*parts, np.empty(0, dtype=np.int64)]).astype(np.int64)

    tokens = joined([sample.token_ids for sample in samples])
    predicts = joined([sample.predicts_sampled for sample in samples]).astype(bool)
    spare = tokens if spare_ids is None else spare_ids.astype(np.int64)
    return Microbatch(
        key=key,
        samples=tuple(samples),
        index=index,
        token_ids=_fed_ids(index, tokens, spare),
        positions=index.gather(joined([np.arange(length) for length in lengths]), fill=0),
        sample_ids=index.gather(
            joined([np.full(len(s.token_ids), s.sample_id) for s in samples]), fill=-1
        ),
        next_ids=index.gather(
            joined([np.append(sample.token_ids[1:], 0) for sample in samples]), fill=0
        ),
        predicts_sampled=index.gather(predicts, fill=False),
        router_rows=place.router_rows(len(index.rows)),
        row_multiple=row_multiple,
        routes=None,
    )


def _fed_ids(
    index: RowIndex,
    tokens: Int64[np.ndarray, " batch_rows"],
    spare: Int64[np.ndarray, " spare"],
) -> Int64[np.ndarray, " rows"]:
    """Return the input ids of one rank; padding of one id would all go to the same experts."""
    ids = index.gather(tokens, fill=0)
    padding = np.flatnonzero(~index.is_token)
    ids[padding] = spare[padding % len(spare)]
    return ids
