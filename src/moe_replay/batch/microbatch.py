"""Microbatch: the samples of one forward pass, with every per-token value in the rows of one RowIndex.

In: samples. Out: Microbatch. Called by: megatron.actor, grpo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer

from moe_replay.batch.samples import Sample
from moe_replay.errors import TraceError
from moe_replay.routing import Coverage, LiveReason, RowIndex


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Microbatch:
    """The rows of one rank: arrays of ``[rows]`` in the order in which the model sees them."""

    key: int
    """Number of the microbatch in its pass; the replay scope finds routes by it."""
    samples: tuple[Sample, ...]
    """The samples, in the order of the concatenated batch."""
    index: RowIndex
    """Where each local row comes from."""
    token_ids: Int64[np.ndarray, " rows"]
    """Input ids, 0 at padding."""
    positions: Int64[np.ndarray, " rows"]
    """Position of the token in its own sequence, 0 at padding."""
    sample_ids: Int64[np.ndarray, " rows"]
    """`Sample.sample_id` of the row's sample, -1 at padding."""
    next_ids: Int64[np.ndarray, " rows"]
    """Id of the following token of the same sequence; 0 where there is none."""
    predicts_sampled: Bool[np.ndarray, " rows"]
    """True where the following token was sampled: the rows that have log-probabilities."""
    expert_ids: Integer[np.ndarray, "rows layers topk"] | None
    """Routes of the rows, in the trace's own layers; None when no sample has a trace."""
    route_valid: Bool[np.ndarray, " rows"]
    """True where ``expert_ids`` holds a route; elsewhere the row is routed live."""
    layers: tuple[int, ...]
    """Global decoder index of each entry of the layer dim of ``expert_ids``; empty without routes."""
    num_experts: int
    """Routed experts a layer of the model that recorded the routes; 0 without routes."""
    coverage: Coverage
    """Rows with and without routes, padding included."""

    @property
    def num_rows(self) -> int:
        """Local rows, padding included."""
        return len(self.token_ids)

    def place(self, values: Sequence[np.ndarray], *, fill: float) -> Float32[np.ndarray, " rows"]:
        """Put one array of ``[T]`` per sample (one value for each sampled token) into the local rows.

        Raises:
            TraceError: when an array does not have one value for each sampled token of its sample.
        """
        whole = np.full(self.index.num_rows, fill, dtype=np.float32)
        for (start, sample), array in zip(self._spans(), values, strict=True):
            if len(array) != sample.completion_length:
                raise TraceError(
                    f"sample {sample.sample_id}: {len(array)} values for {sample.completion_length} sampled tokens"
                )
            first = start + sample.prompt_length - 1
            whole[first : first + len(array)] = array
        return self.index.gather(whole, fill=fill)

    def collect(self, whole: Float32[np.ndarray, " batch_rows"]) -> list[np.ndarray]:
        """Return each sample's ``[T]`` values from an array over the concatenated batch; the inverse of `place`."""
        out = []
        for start, sample in self._spans():
            first = start + sample.prompt_length - 1
            out.append(whole[first : first + sample.completion_length])
        return out

    def _spans(self) -> list[tuple[int, Sample]]:
        starts = np.cumsum([0] + [len(sample.token_ids) for sample in self.samples[:-1]])
        return list(zip((int(start) for start in starts), self.samples, strict=True))


def build_microbatch(
    key: int,
    samples: Sequence[Sample],
    *,
    cp_size: int = 1,
    cp_rank: int = 0,
    pad_multiple: int = 1,
) -> Microbatch:
    """Pack ``samples`` into the rows of one rank.

    Raises:
        TraceError: when the samples' traces come from models of different shape, or only some have one.
    """
    index = RowIndex.packed(
        [len(sample.token_ids) for sample in samples],
        cp_size=cp_size,
        cp_rank=cp_rank,
        pad_multiple=pad_multiple,
    )
    tokens = np.concatenate([sample.token_ids for sample in samples]).astype(np.int64)
    positions = np.concatenate([np.arange(len(sample.token_ids)) for sample in samples])
    owners = np.concatenate(
        [np.full(len(sample.token_ids), sample.sample_id, dtype=np.int64) for sample in samples]
    )
    following = np.concatenate([np.append(sample.token_ids[1:], 0) for sample in samples])
    predicts = np.concatenate([sample.predicts_sampled for sample in samples])
    ids, valid, layers, num_experts = _routes(samples)
    local_valid = index.gather(valid, fill=False)
    padding = Coverage(num_live={LiveReason.PADDING: int((~index.is_token).sum())})
    return Microbatch(
        key=key,
        samples=tuple(samples),
        index=index,
        token_ids=index.gather(tokens, fill=0),
        positions=index.gather(positions, fill=0),
        sample_ids=index.gather(owners, fill=-1),
        next_ids=index.gather(following.astype(np.int64), fill=0),
        predicts_sampled=index.gather(predicts, fill=False),
        expert_ids=None if ids is None else index.gather(ids, fill=0),
        route_valid=local_valid,
        layers=layers,
        num_experts=num_experts,
        coverage=Coverage.total([padding, *(sample.coverage() for sample in samples)])
        if ids is not None
        else Coverage(),
    )


def _routes(
    samples: Sequence[Sample],
) -> tuple[
    Integer[np.ndarray, "rows layers topk"] | None, Bool[np.ndarray, " rows"], tuple[int, ...], int
]:
    traces = [sample.trace for sample in samples if sample.trace is not None]
    if not traces:
        rows = sum(len(sample.token_ids) for sample in samples)
        return None, np.zeros(rows, dtype=bool), (), 0
    if len(traces) != len(samples):
        without = [sample.sample_id for sample in samples if sample.trace is None]
        raise TraceError(
            f"samples {without} have no trace while others of the microbatch do; a missing trace must be a trace with "
            "valid=False rows, so that it is counted"
        )
    shapes = {(trace.layers, trace.num_experts, trace.topk) for trace in traces}
    if len(shapes) > 1:
        raise TraceError(
            f"traces of one microbatch differ in (layers, experts, topk): {sorted(shapes)}"
        )
    ids = np.concatenate([trace.expert_ids for trace in traces])
    valid = np.concatenate([trace.valid for trace in traces])
    return ids, valid, traces[0].layers, traces[0].num_experts
