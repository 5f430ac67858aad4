"""MegatronScorer: forward passes over packed microbatches, live, recording or replaying.

In: microbatches. Out: log-probabilities and entropies per sample, recorded traces, evidence for the
guard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float32
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from moe_replay.batch import Microbatch, RankPlace
from moe_replay.batch.routes import empty_slice
from moe_replay.errors import UnsupportedError
from moe_replay.megatron.chunks import moe_layers, unwrap
from moe_replay.megatron.logprobs import CHUNK_ROWS, token_statistics
from moe_replay.megatron.offload import (
    DeviceMemory,
    Holding,
    Part,
    drop_scratch_memory,
    weights_of,
)
from moe_replay.megatron.replay import RecordScope, ReplayScope, RouterScope
from moe_replay.megatron.replay.overlap import RowOwners, WatchedRoutes
from moe_replay.recipe.sections.training import GivenBack
from moe_replay.routing import RouteForm, RouteSlice, Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteWatch:
    """Looks at live next to replayed experts of every row, before anything is learned from them."""

    observe: Callable[[Microbatch, WatchedRoutes], None]
    """Called for each microbatch of which this rank replays a row."""
    keeps_live: bool = False
    """Bring the live ids of all rows to the host too: for the few microbatches of a second look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSample:
    """Values of one sample's T sampled tokens."""

    token_logprobs: Float32[np.ndarray, " completion"]
    """``[T]``, in nats, at the sampling temperature."""
    entropies: Float32[np.ndarray, " completion"]
    """``[T]``, in nats, of the distribution each token was drawn from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a forward pass found."""

    samples: Mapping[int, ScoredSample]
    """Sample id -> its values, for all samples of this rank's replica."""
    routes: Mapping[int, RouteSlice]
    """Microbatch key -> recorded routes of this rank, of which a pipeline stage without routers
    has none; empty unless the pass recorded."""
    margins: Mapping[int, Float32[np.ndarray, "rows layers"]] = field(default_factory=dict)
    """Microbatch key -> `RecordScope.margins` of this rank's router rows, if asked for."""


class MegatronScorer:
    """A Megatron model that scores samples."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        *,
        num_experts: int,
        chunk_rows: int = CHUNK_ROWS,
        gives_back: GivenBack = "none",
    ) -> None:
        """Take the model chunks of this rank, with whatever wrappers they have.

        Logits exist for ``chunk_rows`` token rows at a time. ``gives_back`` says what leaves the
        device when ``memory`` is asked to give back.
        """
        # Any: Megatron's wrappers have methods that torch's Module does not declare.
        self.chunks: list[Any] = list(chunks)
        self.routers = moe_layers(self.chunks)
        self.num_experts, self.chunk_rows = num_experts, chunk_rows
        self.place = RankPlace(
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            cp_size=parallel_state.get_context_parallel_world_size(),
            cp_rank=parallel_state.get_context_parallel_rank(),
        )
        self.device = next(self.chunks[0].parameters()).device
        holdings: dict[Part, Holding] = {
            "weights": Holding(tensors=lambda: weights_of(self.chunks))
        }
        self.memory = DeviceMemory(
            self.device, holdings, gives_back=gives_back, before=drop_scratch_memory
        )
        """What it holds on its device."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return unwrap(self.chunks[0]).model_shape.vocab_size

    def score(
        self,
        microbatches: Sequence[Microbatch],
        *,
        temperature: float,
        routing: Routing,
        watch: RouteWatch | None = None,
        with_margins: bool = False,
    ) -> Scores:
        """Run a forward pass without gradients.

        Every rank returns the values of all samples of its own data-parallel replica.
        ``with_margins`` also records how close each choice of experts was, in a pass that records.
        """
        outputs: dict[int, torch.Tensor] = {}
        scope = self._scope(microbatches, routing, watch, with_margins=with_margins)

        def step(batches: Iterator[Microbatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            microbatch = next(batches)
            output = self._statistics(
                chunk, microbatch, scope, temperature=temperature, with_entropies=True
            )

            def collect(statistics: torch.Tensor, non_loss_data: bool = True) -> None:
                outputs[microbatch.key] = statistics[0]

            return output, collect

        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad(), opened(scope):
            self._schedule(step, microbatches, forward_only=True)
        self._observe(microbatches, scope, watch)
        routes: dict[int, RouteSlice] = {}
        margins: dict[int, np.ndarray] = {}
        if isinstance(scope, RecordScope):
            routes = {m.key: self._recorded(m, scope) for m in microbatches}
            if with_margins and scope.layers:
                margins = {m.key: scope.margins(m.key) for m in microbatches}
        return Scores(samples=self._scored(microbatches, outputs), routes=routes, margins=margins)

    def _scored(
        self, microbatches: Sequence[Microbatch], outputs: Mapping[int, torch.Tensor]
    ) -> dict[int, ScoredSample]:
        """Return sample id -> values, on every rank of a replica; collective over it.

        ``outputs`` are the statistics of each microbatch that this rank computed, by its key.
        """
        scored: dict[int, ScoredSample] = {}
        for microbatch in microbatches:
            values = self._assemble(microbatch, outputs.get(microbatch.key))
            parts = zip(
                microbatch.samples,
                microbatch.collect(values[0]),
                microbatch.collect(values[1]),
                strict=True,
            )
            for sample, logprobs, entropies in parts:
                scored[sample.sample_id] = ScoredSample(
                    token_logprobs=logprobs, entropies=entropies
                )
        return scored

    def _schedule(
        self,
        step: Callable[[Iterator[Microbatch], torch.nn.Module], tuple[torch.Tensor, Any]],
        microbatches: Sequence[Microbatch],
        *,
        forward_only: bool,
    ) -> None:
        """Drive Megatron's own schedule; the last stage calls what ``step`` returns."""
        self.memory.take_back("weights")
        interleaved = len(self.chunks) > 1
        data = [iter(microbatches) for _ in self.chunks]
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=data if interleaved else data[0],
            model=self.chunks if interleaved else self.chunks[0],
            num_microbatches=len(microbatches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _statistics(
        self,
        chunk: torch.nn.Module,
        microbatch: Microbatch,
        scope: RouterScope | None,
        *,
        temperature: float,
        with_entropies: bool = False,
        entropies_learn: bool = False,
    ) -> torch.Tensor:
        """Run a forward pass; the last stage returns `token_statistics` of the sampled tokens."""
        rows = np.flatnonzero(microbatch.predicts_sampled)
        with token_statistics(
            unwrap(chunk),
            self._tensor(rows),
            self._tensor(microbatch.next_ids[rows]),
            temperature=temperature,
            with_entropies=with_entropies,
            entropies_learn=entropies_learn,
            candidates=microbatch.candidates() if unwrap(chunk).post_process else None,
            chunk_rows=self.chunk_rows,
        ):
            return self._forward(chunk, microbatch, scope)

    def _forward(
        self, chunk: torch.nn.Module, microbatch: Microbatch, scope: RouterScope | None
    ) -> torch.Tensor:
        with contextlib.nullcontext() if scope is None else scope.microbatch(microbatch.key):
            return chunk(
                input_ids=self._tensor(microbatch.token_ids)[None],
                position_ids=self._tensor(microbatch.positions)[None],
                attention_mask=None,
                packed_seq_params=packed_rows(microbatch.index.padded_lengths, self.device),
                padding_mask=self._padding_mask(chunk, microbatch),
            )

    def _padding_mask(self, chunk: torch.nn.Module, microbatch: Microbatch) -> torch.Tensor | None:
        """Return ``[1, rows]``, True at padding, which routers omit from the loads of experts."""
        if not self.num_experts:
            return None
        is_padding = ~microbatch.index.is_token
        # The first stage cuts the mask for sequence parallelism as it cuts the tokens; later ones
        # take it as it is.
        rows = slice(None) if unwrap(chunk).pre_process else microbatch.router_rows
        return self._tensor(is_padding[rows])[None]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _scope(
        self,
        microbatches: Sequence[Microbatch],
        routing: Routing,
        watch: RouteWatch | None,
        *,
        with_margins: bool = False,
    ) -> RouterScope | None:
        if routing is Routing.LIVE:
            return None
        # A stage may hold dense layers only, as long as the model has routers elsewhere.
        may_be_empty = self.num_experts > 0
        if routing is Routing.RECORD:
            keys = [microbatch.key for microbatch in microbatches]
            return RecordScope(
                self.routers, keys, with_margins=with_margins, may_be_empty=may_be_empty
            )
        routes = {m.key: _routes_of(m) for m in microbatches}
        return ReplayScope(
            self.routers,
            routes,
            owners={m.key: _owners_of(m) for m in microbatches} if watch is not None else None,
            keeps_live=watch is not None and watch.keeps_live,
            may_be_empty=may_be_empty,
        )

    def _observe(
        self,
        microbatches: Sequence[Microbatch],
        scope: RouterScope | None,
        watch: RouteWatch | None,
    ) -> None:
        if watch is None or not isinstance(scope, ReplayScope):
            return
        for microbatch in microbatches:
            watched = scope.watched(microbatch.key)
            if watched is not None:
                watch.observe(microbatch, watched)

    def _assemble(
        self, microbatch: Microbatch, local: torch.Tensor | None
    ) -> Float32[np.ndarray, "2 batch_rows"]:
        """Return log-probabilities and entropies of all batch rows, on all ranks of a replica."""
        found = np.zeros((2, microbatch.index.num_rows), dtype=np.float32)
        if not microbatch.samples:
            return found
        if local is not None:
            rows = microbatch.index.rows[np.flatnonzero(microbatch.predicts_sampled)]
            found[:, rows] = local.t().cpu().numpy()
        cp_group = parallel_state.get_context_parallel_group()
        pp_group = parallel_state.get_pipeline_model_parallel_group()
        if cp_group.size() == 1 and pp_group.size() == 1:
            return found
        shared = self._tensor(found)
        if cp_group.size() > 1:
            dist.all_reduce(shared, group=cp_group)
        if pp_group.size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(shared, src=last, group=pp_group)
        return shared.cpu().numpy()

    def _recorded(self, microbatch: Microbatch, scope: RecordScope) -> RouteSlice:
        """Return what was recorded as routes to replay; every row of a token has one."""
        if not scope.layers:
            # As engine routes arrive at such a stage: a slice of no layers, for the update that
            # replays it.
            topk = unwrap(self.chunks[0]).config.moe_router_topk
            form = RouteForm(layers=(), num_experts=self.num_experts, topk=topk)
            return empty_slice(form, len(microbatch.router_index.rows))
        return RouteSlice(
            expert_ids=scope.expert_ids(microbatch.key),
            valid=microbatch.index.is_token[microbatch.router_rows],
            layers=scope.layers,
            num_experts=self.num_experts,
        )


def packed_rows(lengths: Sequence[int], device: torch.device | str = "cpu") -> PackedSeqParams:
    """Say to Megatron's attention where the sequences of a packed row end, padding included.

    Examples:
        >>> packed_rows([3, 5]).cu_seqlens_q
        tensor([0, 3, 8], dtype=torch.int32)
    """
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=ends,
        cu_seqlens_kv_padded=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def opened(scope: RouterScope | None) -> AbstractContextManager[Any]:
    """Open ``scope`` for the time of a block; without a scope, do nothing."""
    return contextlib.nullcontext() if scope is None else scope.open()


def _routes_of(microbatch: Microbatch) -> RouteSlice:
    if microbatch.routes is None:
        raise UnsupportedError(
            f"microbatch {microbatch.key} has no routes to replay: the engine recorded none "
            "(start it with route capture on), or the pass that records (R2) did not run"
        )
    return microbatch.routes


def _owners_of(microbatch: Microbatch) -> RowOwners:
    rows = microbatch.router_rows
    return RowOwners(sample=microbatch.sample_ids[rows], position=microbatch.positions[rows])
