"""Log-probabilities and entropies of tokens; the logits are split over tensor-parallel ranks.

In: logits of this rank. Out: log-probabilities (differentiable) and entropies, in nats.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def token_logprobs(
    logits: Float[torch.Tensor, "tokens local_vocab"],
    token_ids: Int64[torch.Tensor, " tokens"],
    *,
    temperature: float,
) -> Float[torch.Tensor, " tokens"]:
    """Return ``log softmax(logits / temperature)`` at ``token_ids``, in float32."""
    # The copy matters: the cross entropy subtracts the maximum in place.
    scaled = logits.float() / temperature if temperature != 1.0 else logits.float().clone()
    return -vocab_parallel_cross_entropy(scaled.unsqueeze(1), token_ids.unsqueeze(1)).squeeze(1)


@torch.no_grad()
def token_entropies(
    logits: Float[torch.Tensor, "tokens local_vocab"],
    *,
    temperature: float,
    tp_group: dist.ProcessGroup,
) -> Float[torch.Tensor, " tokens"]:
    """Return the entropy of ``softmax(logits / temperature)``, ``log Z - sum(p * logit)``."""
    scaled = logits.float() / temperature
    top = scaled.amax(dim=-1, keepdim=True)
    if tp_group.size() > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp_group)
    shifted = scaled - top
    # A logit of minus infinity has no share: 0, where 0 times minus infinity is NaN. exp(-1000) is
    # 0 already.
    shifted.clamp_(min=-1000.0)
    weight = shifted.exp()
    sums = torch.stack([weight.sum(dim=-1), (weight * shifted).sum(dim=-1)])
    if tp_group.size() > 1:
        dist.all_reduce(sums, group=tp_group)
    return sums[0].log() - sums[1] / sums[0]
