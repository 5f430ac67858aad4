"""MegatronScorer: forward passes of a Megatron model over packed microbatches, live, recording or replaying.

In: microbatches. Out: log-probabilities and entropies per sample, recorded traces, evidence for the guard.
Called by: megatron.actor (which trains the same model), grpo (for the reference model).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float32, Int64
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from moe_replay.batch import Microbatch
from moe_replay.errors import TraceError, UnsupportedError
from moe_replay.megatron.compat import VERSION
from moe_replay.megatron.logprobs import token_entropies, token_logprobs
from moe_replay.megatron.model import moe_layers
from moe_replay.megatron.replay import MicrobatchRoutes, RecordScope, ReplayScope
from moe_replay.routing import Origin, RoutingTrace


class Routing(Enum):
    """How the routers of a pass choose experts."""

    LIVE = "live"
    """By the current weights."""
    RECORD = "record"
    """By the current weights, keeping the choice."""
    REPLAY = "replay"
    """As the microbatch's traces say; rows without a route by the current weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteWatch:
    """Looks at live next to replayed experts of some rows, after a pass and before anything is learned from it."""

    num_rows: int
    """Rows to watch in one pass, spread evenly over its microbatches; 0 watches none."""
    observe: Callable[
        [Microbatch, Int64[np.ndarray, " watched"], np.ndarray, tuple[int, ...]], None
    ]
    """Called for each microbatch with (microbatch, watched rows, their live ids ``[watched layers topk]``, layers)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSample:
    """Values of one sample's T sampled tokens."""

    token_logprobs: Float32[np.ndarray, " completion"]
    """``[T]``, in nats, at the sampling temperature."""
    entropies: Float32[np.ndarray, " completion"]
    """``[T]``, in nats, of the distribution each token was drawn from."""
    trace: RoutingTrace | None
    """The routes of this pass when it recorded, else None."""


class MegatronScorer:
    """A Megatron model that scores samples."""

    def __init__(self, chunks: Sequence[torch.nn.Module], *, num_experts: int) -> None:
        """Take the model chunks of this rank, wrapped for precision or data parallelism as may be."""
        # Any: Megatron's wrappers have methods that torch's Module does not declare.
        self.chunks: list[Any] = list(chunks)
        self.routers = moe_layers(self.chunks)
        self.num_experts = num_experts
        self.device = next(self.chunks[0].parameters()).device

    def score(
        self,
        microbatches: Sequence[Microbatch],
        *,
        temperature: float,
        routing: Routing,
        watch: RouteWatch | None = None,
        policy_version: int = 0,
    ) -> dict[int, ScoredSample]:
        """Run a forward pass without gradients; return sample id -> its values.

        ``policy_version`` labels recorded traces. Every rank returns the values of all samples of its own
        data-parallel replica.
        """
        outputs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(microbatch: Microbatch, logits: torch.Tensor) -> None:
            rows, next_ids = self._predicting(microbatch)
            picked = logits[0, rows]
            outputs[microbatch.key] = (
                token_logprobs(picked, next_ids, temperature=temperature),
                token_entropies(
                    picked,
                    temperature=temperature,
                    tp_group=parallel_state.get_tensor_model_parallel_group(),
                ),
            )

        for chunk in self.chunks:
            chunk.eval()
        scope = self._scope(microbatches, routing, watch)
        with torch.no_grad(), opened(scope):
            self._run(microbatches, scope, keep)
        self._observe(microbatches, scope, watch)
        scored: dict[int, ScoredSample] = {}
        for microbatch in microbatches:
            values = self._assemble(microbatch, outputs.get(microbatch.key))
            traces = self._recorded(microbatch, scope, policy_version)
            parts = zip(
                microbatch.samples,
                microbatch.collect(values[0]),
                microbatch.collect(values[1]),
                traces,
                strict=True,
            )
            for sample, logprobs, entropies, trace in parts:
                scored[sample.sample_id] = ScoredSample(
                    token_logprobs=logprobs, entropies=entropies, trace=trace
                )
        return scored

    def _run(
        self,
        microbatches: Sequence[Microbatch],
        scope: ReplayScope | RecordScope | None,
        keep: Callable[[Microbatch, torch.Tensor], None],
    ) -> None:
        """Drive Megatron's own schedule, forward only."""

        def step(batches: Iterator[Microbatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            microbatch = next(batches)
            output = self._forward(chunk, microbatch, scope)

            def collect(logits: torch.Tensor, non_loss_data: bool = True) -> None:
                keep(microbatch, logits)

            return output, collect

        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=self._iterators(microbatches),
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(microbatches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )

    def _iterators(self, microbatches: Sequence[Microbatch]) -> Any:
        if len(self.chunks) == 1:
            return iter(microbatches)
        return [iter(microbatches) for _ in self.chunks]

    def _forward(
        self,
        chunk: torch.nn.Module,
        microbatch: Microbatch,
        scope: ReplayScope | RecordScope | None,
    ) -> torch.Tensor:
        ends = np.cumsum([0, *microbatch.index.padded_lengths])
        bounds = torch.from_numpy(ends.astype(np.int32)).to(self.device)
        longest = max(microbatch.index.padded_lengths)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            cu_seqlens_q_padded=bounds,
            cu_seqlens_kv_padded=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        inside: AbstractContextManager[Any] = (
            scope.microbatch(microbatch.key) if scope is not None else contextlib.nullcontext()
        )
        with inside:
            return chunk(
                input_ids=self._tensor(microbatch.token_ids)[None],
                position_ids=self._tensor(microbatch.positions)[None],
                attention_mask=None,
                packed_seq_params=packed,
            )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _predicting(self, microbatch: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
        rows = np.flatnonzero(microbatch.predicts_sampled)
        return self._tensor(rows), self._tensor(microbatch.next_ids[rows])

    def _scope(
        self, microbatches: Sequence[Microbatch], routing: Routing, watch: RouteWatch | None
    ) -> ReplayScope | RecordScope | None:
        if routing is Routing.LIVE:
            return None
        if routing is Routing.RECORD:
            return RecordScope(self.routers, [microbatch.key for microbatch in microbatches])
        for microbatch in microbatches:
            self._check_experts(microbatch)
        share = -(-watch.num_rows // len(microbatches)) if watch is not None else 0
        return ReplayScope(self.routers, {m.key: _local_routes(m, share) for m in microbatches})

    def _check_experts(self, microbatch: Microbatch) -> None:
        if microbatch.expert_ids is not None and microbatch.num_experts != self.num_experts:
            raise TraceError(
                f"microbatch {microbatch.key}: the routes come from a model of {microbatch.num_experts} experts, this "
                f"one has {self.num_experts}; the engine runs another checkpoint than the trainer"
            )

    def _observe(
        self,
        microbatches: Sequence[Microbatch],
        scope: ReplayScope | RecordScope | None,
        watch: RouteWatch | None,
    ) -> None:
        if watch is None or watch.num_rows == 0 or not isinstance(scope, ReplayScope):
            return
        for microbatch in microbatches:
            rows = scope.watched_rows(microbatch.key)
            if len(rows):
                watch.observe(microbatch, rows, scope.live_ids(microbatch.key), scope.layers)

    def _assemble(
        self, microbatch: Microbatch, local: tuple[torch.Tensor, torch.Tensor] | None
    ) -> Float32[np.ndarray, "2 batch_rows"]:
        """Return log-probabilities and entropies over the concatenated batch, on every rank of the replica."""
        whole = np.zeros((2, microbatch.index.num_rows), dtype=np.float32)
        if local is not None:
            rows = microbatch.index.rows[np.flatnonzero(microbatch.predicts_sampled)]
            for place, values in zip(whole, local, strict=True):
                place[rows] = values.float().cpu().numpy()
        cp_group = parallel_state.get_context_parallel_group()
        pp_group = parallel_state.get_pipeline_model_parallel_group()
        if cp_group.size() == 1 and pp_group.size() == 1:
            return whole
        shared = self._tensor(whole)
        if cp_group.size() > 1:
            dist.all_reduce(shared, group=cp_group)
        if pp_group.size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(shared, src=last, group=pp_group)
        return shared.cpu().numpy()

    def _recorded(
        self,
        microbatch: Microbatch,
        scope: ReplayScope | RecordScope | None,
        policy_version: int,
    ) -> list[RoutingTrace | None]:
        """Bind recorded routes to the samples of the microbatch."""
        if not isinstance(scope, RecordScope):
            return [None for _ in microbatch.samples]
        local = scope.expert_ids(microbatch.key)
        if len(local) != microbatch.num_rows or not microbatch.index.num_rows <= len(local):
            raise UnsupportedError(
                f"recorded {len(local)} of {microbatch.num_rows} rows: R2 under tensor or context parallelism needs "
                "the routes of all ranks, which this version does not gather; use R3 or data parallelism"
            )
        whole = np.zeros((microbatch.index.num_rows, *local.shape[1:]), dtype=local.dtype)
        microbatch.index.scatter(local, whole)
        traces: list[RoutingTrace | None] = []
        start = 0
        for sample in microbatch.samples:
            stop = start + len(sample.token_ids)
            traces.append(
                RoutingTrace.record(
                    whole[start:stop],
                    token_ids=sample.token_ids,
                    valid=np.ones(stop - start, dtype=bool),
                    layers=scope.layers,
                    num_experts=self.num_experts,
                    origin=Origin.single(
                        engine="trainer",
                        engine_version=f"megatron-core {VERSION[0]}.{VERSION[1]}",
                        policy_version=policy_version,
                        num_rows=stop - start,
                    ),
                )
            )
            start = stop
        return traces


def opened(scope: ReplayScope | RecordScope | None) -> AbstractContextManager[Any]:
    """Open ``scope`` for the time of a block; without a scope, do nothing."""
    return contextlib.nullcontext() if scope is None else scope.open()


def _local_routes(microbatch: Microbatch, num_watched: int) -> MicrobatchRoutes:
    """Return the routes in the rows of this rank's routers, watching evenly spaced valid rows."""
    if microbatch.expert_ids is None:
        raise UnsupportedError(
            f"microbatch {microbatch.key} has no routes to replay: the engine recorded none "
            "(start it with route capture on), or the pass that records (R2) did not run"
        )
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    size = microbatch.num_rows // tp_size
    here = slice(tp_rank * size, (tp_rank + 1) * size)
    valid = microbatch.route_valid[here]
    candidates = np.flatnonzero(valid)
    spacing = max(1, len(candidates) // num_watched) if num_watched else 1
    return MicrobatchRoutes(
        expert_ids=microbatch.expert_ids[here],
        valid=valid,
        layers=microbatch.layers,
        watched_rows=candidates[::spacing][:num_watched],
    )
