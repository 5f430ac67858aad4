"""Padded batches through the replay scope equal packed ones, with padding on either side.

The trainer packs; trainers that do not can use the scope all the same. The rows of a rectangle come
from `RowIndex.padded`, its tokens go through Megatron's own schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe_replay.batch import Microbatch, RankPlace, build_microbatch
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.layout import ParallelLayout
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.megatron.upstream.attention import SDPACoreAttention
from moe_replay.routing import RouteSlice, Routing, RowIndex, slice_routes
from moe_replay.testing.layouts import coded_samples, layout
from moe_replay.testing.policies import gradients, mean_loss, pack, shared, start_policy
from moe_replay.testing.ranks import run_ranks

pytestmark = pytest.mark.ranks
LAYERS = tuple(range(1, 8))
MAX_LENGTH = 32
"""Columns of every rectangle; the longest sample has 24 tokens."""
BOUND = 1e-5
"""Relative; float32 reductions in another order."""
Side = Literal["left", "right"]
Found = tuple[dict[str, torch.Tensor], dict[int, np.ndarray]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangle(RankPlace):
    """A rank whose microbatches are rectangles of samples side by side."""

    side: Side
    """Where the padding of a sample is."""

    def row_index(self, lengths: Sequence[int], *, row_multiple: int = 1) -> RowIndex:
        """Return the rows that this rank feeds to its model, sequence-major."""
        return RowIndex.padded(
            lengths,
            max_length=MAX_LENGTH,
            side=self.side,
            cp_size=self.cp_size,
            cp_rank=self.cp_rank,
        )


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally to tokens alone; the trainer's attention knows no padding before one."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    causal = (
        torch.ones(query.size(2), key.size(2), dtype=torch.bool).tril() if mask is None else mask
    )
    allowed = causal & module.is_token[:, None, None, :]
    # A padding row before all tokens attends to padding, so that nothing becomes NaN.
    allowed = allowed | (causal & ~allowed.any(dim=-1, keepdim=True))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, enable_gqa=query.size(1) != key.size(1)
    )
    return out.permute(2, 0, 1, 3)


def forward_rectangle(side: Side, chunk: Any, microbatch: Microbatch, scope: Any) -> torch.Tensor:
    """Feed ``[samples, columns]``, and return the logits in the order of the rows."""
    width = len(microbatch.samples)

    def rectangle(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.reshape(-1, width).T.copy())

    columns = np.arange(MAX_LENGTH)
    lengths = np.array(microbatch.lengths)[:, None]
    is_token = columns < lengths if side == "right" else columns >= MAX_LENGTH - lengths
    for module in chunk.modules():
        if isinstance(module, SDPACoreAttention):
            attention: Any = module
            attention.is_token = torch.from_numpy(is_token)
            attention._attend = partial(attend, attention)
    with scope.microbatch(microbatch.key):
        output = chunk(
            input_ids=rectangle(microbatch.token_ids),
            position_ids=rectangle(microbatch.positions),
            attention_mask=None,
        )
    # The last stage gives [samples, columns, vocabulary], the others [columns, samples, hidden] to
    # the next one.
    return output.transpose(0, 1).flatten(0, 1)[None] if unwrap(chunk).post_process else output


def batch_major(microbatch: Microbatch, actor: MegatronActor) -> Microbatch:
    """Plant routes flattened sample by sample, which fit, and lie on other tokens (defect A2)."""
    traces = {s.sample_id: s.trace for s in coded_samples(LAYERS)}
    index = microbatch.router_index
    turned = index.rows.reshape(-1, len(microbatch.samples)).T.reshape(-1)
    routes = slice_routes(
        [traces[sample.sample_id] for sample in microbatch.samples],
        replace(index, rows=turned.copy()),
        layers=tuple(actor.routers),
    )
    return replace(microbatch, routes=routes)


def _trained(checkpoint: Path, where: ParallelLayout, side: Side | None, planted: bool) -> Found:
    """Return gradients and old log-probabilities of rectangles; packed without ``side``."""
    actor = start_policy(checkpoint, where)
    samples = coded_samples(LAYERS)
    if side is None:
        microbatches = pack(samples, scorer=actor, count=4)
    else:
        place = Rectangle(
            side=side,
            **{f.name: getattr(actor.place, f.name) for f in fields(RankPlace)},
        )
        replica = Replica.find(tuple(actor.routers), place=place)
        rectangles = [
            build_microbatch(key, samples[2 * key : 2 * key + 2], place=place)
            for key in range(len(samples) // 2)
        ]
        microbatches = shared(rectangles, samples, replica)
        actor._forward = partial(forward_rectangle, side)
    if planted:
        microbatches = [batch_major(microbatch, actor) for microbatch in microbatches]
    assert all(isinstance(microbatch.routes, RouteSlice) for microbatch in microbatches)
    scored = actor.score(microbatches, temperature=0.9, routing=Routing.REPLAY).samples
    actor.optimizer.step = lambda: (True, 0.0, 0)
    actor.update(microbatches, mean_loss, temperature=0.9, routing=Routing.REPLAY)
    return gradients(actor), {i: sample.token_logprobs for i, sample in scored.items()}


@cache
def packed(checkpoint: Path) -> Found:
    """Return what a single process finds that packs."""
    return run_ranks(_trained, 1, checkpoint, layout(), None, False)[0]


def error(found: Found, expected: Found) -> float:
    """Return the largest relative error of a gradient or a sample's log-probabilities."""
    gradient_errors = [
        float((found[0][name] - gradient).norm() / (gradient.norm() + 1e-12))
        for name, gradient in expected[0].items()
    ]
    logprob_errors = [
        float(np.abs(found[1][i] - values).max() / np.abs(values).max())
        for i, values in expected[1].items()
    ]
    return max(gradient_errors + logprob_errors)


LAYOUTS = {
    "one": (layout(), 1),
    "tp2": (layout(tp=2), 2),
    "cp2": (layout(cp=2), 2),
    "pp2 vpp2": (layout(pp=2, vpp=2), 2),
    "tp2 cp2": (layout(tp=2, cp=2), 4),
}
CASES: list[tuple[str, Side]] = [
    ("one", "left"),
    ("one", "right"),
    ("tp2", "left"),
    ("tp2", "right"),
    ("cp2", "left"),
    ("cp2", "right"),
    ("pp2 vpp2", "left"),
    ("tp2 cp2", "left"),
]


@pytest.mark.parametrize(("name", "side"), CASES)
def test_padded_batches_equal_packed_ones_of_a_single_process(
    checkpoint: Path, name: str, side: Side
) -> None:
    where, ranks = LAYOUTS[name]
    for found in run_ranks(_trained, ranks, checkpoint, where, side, False):
        assert error(found, packed(checkpoint)) < BOUND


@pytest.mark.parametrize("name", ["one", "tp2", "cp2"])
def test_routes_flattened_sample_by_sample_are_seen(checkpoint: Path, name: str) -> None:
    where, ranks = LAYOUTS[name]
    for found in run_ranks(_trained, ranks, checkpoint, where, "right", True):
        assert error(found, packed(checkpoint)) > 0.1
