"""Weights that have diverged: named when they are pushed, and when a token is drawn from logits that are no numbers.

In: weights on their way to an engine, log-probabilities of drawn tokens. Out: the same, or `DivergedError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_replay.errors import DivergedError

if TYPE_CHECKING:
    from jaxtyping import Float32

NOT_A_LOGPROB = 9999.0
"""Stands for the log-probability of a token whose logits are NaN where NaN cannot travel: vLLM's JSON has none."""


def finite_weights(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor after checking that it holds numbers only; one pass over it, without a copy.

    Raises:
        DivergedError: when a tensor holds NaN or infinity.
    """
    for name, tensor in weights:
        if tensor.is_floating_point() and tensor.numel():
            # Both ends are NaN as soon as one value is.
            low, high = torch.aminmax(tensor.detach() if tensor.itemsize > 1 else tensor.float())
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                bad = int((~torch.isfinite(tensor.float())).sum())
                raise DivergedError(
                    f"weight {name} was pushed with {bad} of {tensor.numel()} values that are NaN or infinite: the training "
                    "has diverged; lower optimizer.lr, and resume from a checkpoint before it"
                )
        yield name, tensor


def refuse_no_numbers(
    rollout_logprobs: Float32[np.ndarray, " completion"], *, where: str, policy_version: int
) -> None:
    """Raise `DivergedError` when a token was drawn from logits that are not numbers (NaN, or `NOT_A_LOGPROB`)."""
    bad = np.isnan(rollout_logprobs) | (rollout_logprobs >= NOT_A_LOGPROB)
    if bad.any():
        raise no_numbers(where, int(bad.argmax()), policy_version)


def no_numbers(where: str, position: int, policy_version: int) -> DivergedError:
    """Return the error for a token whose logits are not numbers; ``position`` counts sampled tokens."""
    cause = (
        "training has diverged: lower optimizer.lr, and resume from a checkpoint before it"
        if policy_version
        else "the checkpoint holds NaN, or its values overflow in the engine's number format: see rollout.dtype"
    )
    return DivergedError(
        f"{where}: the logits of sampled token {position} are not finite under policy version {policy_version}, so no token "
        f"can be drawn; {cause}"
    )
