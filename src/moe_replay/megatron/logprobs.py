"""Log-probabilities and entropies of tokens without their logits: `token_statistics`.

The logits of 16,384 tokens over 151,936 words are 9.3 GiB in float32, and a softmax with its
gradient takes several such tensors. Here the output layer runs on a few rows at a time, and again
in the backward pass, so that only those rows ever exist.

In: hidden rows, the output layer. Out: log-probabilities and entropies in nats, differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Float32, Int64
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from moe_replay.errors import UnsupportedError
from moe_replay.routing.candidates import Candidates

CHUNK_ROWS = 2048
"""Rows whose logits exist at a time: 1.2 GiB at 151,936 words. Below about 1,000 a GPU is limited
by reading the weights of the output layer for each chunk."""
# exp(-1000) is 0 already; 0 times minus infinity would be NaN.
_NO_SHARE = -1000.0
# Stands for the maximum of a row none of whose candidates is on this rank: their sum is 0 there,
# and minus infinity would make it NaN.
_NOWHERE = -1e30


@contextmanager
def token_statistics(
    model: Any,
    rows: Int64[torch.Tensor, " tokens"],
    token_ids: Int64[torch.Tensor, " tokens"],
    *,
    temperature: float,
    with_entropies: bool = False,
    entropies_learn: bool = True,
    candidates: Candidates | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Iterator[None]:
    """Make the forward pass of a GPTModel return ``[1, tokens, 1 or 2]`` instead of logits.

    Column 0 is ``log softmax(logits / temperature)`` at ``token_ids``, column 1 the entropy of that
    distribution, both float32 and differentiable; entropies only if ``entropies_learn``, which
    makes the backward pass slower. ``rows`` are those of the packed batch that predict
    ``token_ids``; other rows never reach the vocabulary. With ``candidates``, one set a token, both
    are those of the softmax over them alone. Works under tensor, sequence, context and pipeline
    parallelism; on a stage without an output layer it changes nothing.

    Examples:
        >>> with token_statistics(model, rows, next_ids, temperature=1.0):
        ...     logprobs = model(ids[None], positions[None], None)[0, :, 0]

    Raises:
        UnsupportedError: the model calls its output layer for more than the next token.
    """
    # On every stage, or the others would wait for the last one.
    _refuse_other_uses(model.config)
    if not model.post_process:
        yield
        return
    layer = model.output_layer
    is_embedding = model.share_embeddings_and_output_weights and model.pre_process

    def forward(
        hidden: torch.Tensor, weight: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        values = _Statistics.apply(
            _spread(layer, hidden).flatten(0, 1).index_select(0, rows),
            layer.weight if weight is None else weight,
            token_ids,
            temperature,
            layer.tp_group,
            chunk_rows,
            with_entropies,
            entropies_learn,
            is_embedding,
            _num_words(model, layer),
            _limits(candidates, layer, hidden.device),
        )
        # GPTModel swaps the first two axes.
        return values[:, None], None

    # On the instance, so that hooks, parameters and the state dict stay as they are.
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def _spread(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return all hidden rows, whose gradient is summed over the shards of the vocabulary."""
    spread = (
        gather_from_sequence_parallel_region
        if layer.sequence_parallel
        else copy_to_tensor_model_parallel_region
    )
    return spread(hidden, group=layer.tp_group)


def _refuse_other_uses(config: Any) -> None:
    for option in ("mtp_num_layers", "defer_embedding_wgrad_compute"):
        if getattr(config, option, None):
            raise UnsupportedError(
                f"{option} is {getattr(config, option)!r} in Megatron's configuration, expected it "
                "unset: log-probabilities are computed inside the output layer, which this option "
                "calls for other purposes; remove it from the overrides"
            )


class _Statistics(torch.autograd.Function):
    """``(hidden, weight, ids, ...) -> [tokens, 1 or 2]``, in chunks of rows.

    Example of one row, two shards of the vocabulary with logits (1, 3) and (2, 0), target 2 (the
    first word of shard 1). Shard 0 has maximum 3, sum e^-2 + 1 = 1.135; shard 1 has maximum 2, sum
    1 + e^-2 = 1.135, shifted target 0. The maximum of both is 3, so shard 1 is rescaled by e^-1 and
    its target becomes -1: the sum is 1.135 + 0.418 = 1.553 and the log-probability
    -1 - ln 1.553 = -1.440.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[torch.Tensor, "tokens hidden"],
        weight: Float[torch.Tensor, "local_vocab hidden"],
        ids: Int64[torch.Tensor, " tokens"],
        temperature: float,
        group: dist.ProcessGroup,
        chunk_rows: int,
        with_entropies: bool,
        entropies_learn: bool,
        is_embedding: bool,
        num_words: int,
        limits: _VocabularyLimits | None,
    ) -> Float32[torch.Tensor, "tokens statistics"]:
        pieces = _pieces(len(hidden), chunk_rows)
        local_vocab = len(weight)
        # Megatron's marks are attributes of the parameter itself.
        ctx.parameter = weight
        weight = weight[:num_words]
        is_here = ids // local_vocab == group.rank()
        index = torch.where(is_here, ids % local_vocab, 0)
        top, total, moment, target = hidden.new_zeros(4, len(hidden), dtype=torch.float32)
        buffer = _buffer(pieces, hidden, num_words)
        second = torch.empty_like(buffer) if with_entropies else None
        for piece in pieces:
            shifted = _scaled_logits(hidden[piece], weight, temperature, buffer)
            if limits is not None:
                limits.apply(shifted, piece)
            torch.amax(shifted, -1, out=top[piece])
            if limits is not None:
                top[piece].clamp_(min=_NOWHERE)
            shifted.sub_(top[piece, None])
            target[piece] = shifted.gather(1, index[piece, None])[:, 0]
            if second is None:
                torch.sum(shifted.exp_(), -1, out=total[piece])
                continue
            shares = torch.exp(shifted, out=second[: len(shifted)])
            torch.sum(shares, -1, out=total[piece])
            torch.sum(shares.mul_(shifted.clamp_(min=_NO_SHARE)), -1, out=moment[piece])
        # Two collectives of one number a token, for all chunks together.
        highest = top.clone()
        if group.size() > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        shift = top - highest
        sums = torch.stack(
            [total, moment + total * shift, torch.where(is_here, target + shift, 0.0)]
        )
        sums[:2] *= shift.exp()
        if group.size() > 1:
            dist.all_reduce(sums, group=group)
        log_total = sums[0].log()
        entropies = log_total - sums[1] / sums[0] if with_entropies else None
        learned = entropies if entropies_learn else None
        ctx.save_for_backward(hidden, weight, index, is_here, highest + log_total, learned)
        ctx.options = temperature, pieces, is_embedding, limits
        logprobs = sums[2] - log_total
        return torch.stack([logprobs] if entropies is None else [logprobs, entropies], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # With p the distribution and H its entropy: d logprob / d logit = onehot - p, and
        # d H / d logit = -p (log p + H). The part of this shard; the caller sums over shards.
        (gradient,) = gradients
        hidden, weight, index, is_here, log_sum, entropies = ctx.saved_tensors
        temperature, pieces, is_embedding, limits = ctx.options
        needs_weight = ctx.needs_input_grad[1]
        sums, returned = (
            _weight_gradient(ctx.parameter, is_embedding) if needs_weight else (None, None)
        )
        sums_of_words = None if sums is None else sums[: len(weight)]
        hidden_gradient = torch.empty_like(hidden)
        buffer = _buffer(pieces, hidden, len(weight))
        second = torch.empty_like(buffer) if entropies is not None else None
        for piece in pieces:
            of_logprob = gradient[piece, :1]
            logprobs = _scaled_logits(hidden[piece], weight, temperature, buffer)
            if limits is not None:
                limits.apply(logprobs, piece)
            logprobs.sub_(log_sum[piece, None])
            if second is None:
                of_logits = logprobs.exp_().mul_(-of_logprob)
            else:
                shares = torch.exp(logprobs, out=second[: len(logprobs)])
                of_logits = logprobs.clamp_(min=_NO_SHARE).add_(entropies[piece, None])
                of_logits.mul_(gradient[piece, 1:]).add_(of_logprob).mul_(shares).neg_()
            of_logits.scatter_add_(1, index[piece, None], of_logprob * is_here[piece, None])
            if temperature != 1.0:
                of_logits.div_(temperature)
            of_logits = of_logits.to(weight.dtype)
            torch.mm(of_logits, weight, out=hidden_gradient[piece])
            if sums_of_words is None:
                continue
            if sums_of_words.dtype == of_logits.dtype:
                sums_of_words.addmm_(of_logits.t(), hidden[piece])
            else:
                sums_of_words.add_(of_logits.t() @ hidden[piece])
        if sums is not None and returned is None:
            returned = sums.to(weight.dtype)
        return hidden_gradient, returned, *[None] * 9


@dataclass(frozen=True, slots=True, kw_only=True)
class _VocabularyLimits:
    """The candidates of T tokens that lie in one rank's part of the vocabulary.

    Example: parts of 4 words, so that rank 1 holds ids 4 to 7. A token with candidates 3, 5 and 7
    has the local words 1 and 3 there, and another without candidates is not limited.
    """

    rows: Int64[torch.Tensor, " words"]
    """Row of each word, ascending."""
    words: Int64[torch.Tensor, " words"]
    """Index of each word within the part."""
    starts: Int64[np.ndarray, " ends"]
    """``[T + 1]``: row t has ``words[starts[t]:starts[t + 1]]``."""
    limited: Int64[torch.Tensor, " limited"]
    """Rows with candidates, on this rank or others, ascending."""
    limited_starts: Int64[np.ndarray, " ends"]
    """``[T + 1]``: of the rows before t that many are limited."""

    @classmethod
    def of(cls, candidates: Candidates, layer: Any, device: torch.device) -> _VocabularyLimits:
        """Return the candidates among the words of a rank's output layer."""
        size = layer.output_size_per_partition
        first = layer.tp_group.rank() * size
        row_of = np.repeat(np.arange(len(candidates)), candidates.counts)
        ids = candidates.ids.astype(np.int64)
        is_here = (ids >= first) & (ids < first + size)
        rows, is_limited = row_of[is_here], candidates.counts > 0
        counts = np.bincount(rows, minlength=len(candidates))

        def upload(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            rows=upload(rows),
            words=upload(ids[is_here] - first),
            starts=np.concatenate([[0], np.cumsum(counts)]),
            limited=upload(np.flatnonzero(is_limited)),
            limited_starts=np.concatenate([[0], np.cumsum(is_limited)]),
        )

    def apply(self, logits: Float32[torch.Tensor, "rows vocabulary"], piece: slice) -> None:
        """Set to minus infinity what is no candidate of the rows of ``piece``, which these are."""
        own = slice(self.starts[piece.start], self.starts[piece.stop])
        rows, words = self.rows[own] - piece.start, self.words[own]
        values = logits[rows, words]
        limited = slice(self.limited_starts[piece.start], self.limited_starts[piece.stop])
        logits.index_fill_(0, self.limited[limited] - piece.start, float("-inf"))
        logits[rows, words] = values


def _limits(
    candidates: Candidates | None, layer: Any, device: torch.device
) -> _VocabularyLimits | None:
    return None if candidates is None else _VocabularyLimits.of(candidates, layer, device)


def _num_words(model: Any, layer: Any) -> int:
    """Return the rows of this rank's part of the vocabulary that are words, not padding.

    A model that was not built from a checkpoint's shape has no padding that anybody knows of.
    """
    size = layer.output_size_per_partition
    shape = getattr(model, "model_shape", None)
    if shape is None:
        return size
    return min(max(shape.vocab_size - layer.tp_group.rank() * size, 0), size)


def _pieces(num_rows: int, chunk_rows: int) -> list[slice]:
    """Return chunks of at most ``chunk_rows`` rows and nearly equal size.

    A chunk of one row would use another kernel, which rounds differently. Example: 5 rows in
    chunks of 4 are 3 and 2.
    """
    number = -(-num_rows // chunk_rows)
    ends = [num_rows * index // number for index in range(number + 1)] if number else [0]
    return [slice(start, stop) for start, stop in pairwise(ends)]


def _buffer(pieces: list[slice], hidden: torch.Tensor, local_vocab: int) -> torch.Tensor:
    rows = max((piece.stop - piece.start for piece in pieces), default=0)
    return hidden.new_empty(rows, local_vocab, dtype=torch.float32)


def _scaled_logits(
    hidden: torch.Tensor, weight: torch.Tensor, temperature: float, buffer: torch.Tensor
) -> torch.Tensor:
    """Write ``logits / temperature`` into the buffer, rounded first as Megatron's layer does."""
    out = buffer[: len(hidden)]
    if weight.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    else:
        out.copy_(hidden @ weight.t())
    return out if temperature == 1.0 else out.div_(temperature)


def _weight_gradient(weight: Any, is_embedding: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return where the weight's gradient is summed in float32, and what autograd gets for it.

    Under Megatron's DDP the sum goes straight into ``main_grad``, and autograd gets a tensor that
    nobody reads, or zeros if the embedding adds a gradient of its own to the same weight. None
    stands for the sum itself.
    """
    adds_zeros = getattr(weight, "zero_out_wgrad", False)
    if not hasattr(weight, "grad_added_to_main_grad") or (is_embedding and not adds_zeros):
        return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device), None
    weight.grad_added_to_main_grad = True
    return weight.main_grad, (torch.zeros_like if adds_zeros else torch.empty_like)(weight)
