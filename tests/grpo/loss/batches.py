"""Ragged batches for the loss, and the loss of the code under test on them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moe_replay.grpo.loss.policy import LossStatistics, policy_loss
from moe_replay.grpo.loss.rows import BatchSize, TokenRows
from moe_replay.recipe.sections.training import GrpoSection

from .oracle import LIMIT, Completion

LEVELS = ("token", "sequence", "sequence_token")
CORRECTIONS = (
    "none",
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_truncate",
    "geometric_mask",
)


def random_batch(seed: int, sizes: Sequence[int]) -> list[Completion]:
    """Return completions of these lengths; every third one has no advantage, the last is untrained
    where there are more than two."""
    generator = np.random.default_rng(seed)
    made = []
    for number, size in enumerate(sizes):
        new = np.log(generator.uniform(0.05, 0.95, size))
        made.append(
            Completion(
                new=new,
                old=np.minimum(new + generator.normal(0, 0.4, size), -1e-3),
                mu=np.minimum(new + generator.normal(0, 0.5, size), -1e-3),
                ref=np.minimum(new + generator.normal(0, 0.7, size), -1e-3),
                entropy=generator.uniform(0, 2, size),
                advantage=float(generator.normal()) if number % 3 < 2 else 0.0,
            )
        )
    if len(made) > 2:
        made[-1] = replace(made[-1], trains=False, new=made[-1].new * np.nan)
    return made


def size_of(batch: Sequence[Completion], keys: dict[str, Any]) -> tuple[BatchSize, float]:
    """Return the size of a mini-batch and its entropy threshold."""
    trained = [sample for sample in batch if sample.trains]
    entropies = np.concatenate([sample.entropy for sample in trained])
    threshold = -np.inf
    if keys.get("top_entropy_quantile", 1) < 1:
        threshold = float(np.quantile(entropies, 1 - keys["top_entropy_quantile"]))
    size = BatchSize(
        num_samples=len(trained),
        num_tokens=sum(len(sample.new) for sample in trained),
        max_completion_length=int(LIMIT),
        num_uncertain=int((entropies >= threshold).sum()),
    )
    return size, threshold


def rows_of(
    held: Sequence[Completion],
    lengths: Sequence[int],
    threshold: float,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> TokenRows:
    """Return the tokens of a microbatch that a rank holds; ``lengths`` are of whole samples."""

    def of_tokens(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(sample, name) for sample in held]))

    sizes = torch.tensor([len(sample.new) for sample in held])
    sample = torch.repeat_interleave(torch.arange(len(held)), sizes)
    advantages = torch.tensor([s.advantage for s in held], dtype=torch.float64)
    return TokenRows(
        new_logprobs=of_tokens("new").requires_grad_(True),
        old_logprobs=of_tokens("old"),
        rollout_logprobs=of_tokens("mu"),
        ref_logprobs=of_tokens("ref"),
        entropies=of_tokens("entropy").requires_grad_(True),
        is_uncertain=of_tokens("entropy") >= threshold if np.isfinite(threshold) else None,
        advantages=advantages[sample],
        trains=torch.tensor([s.trains for s in held])[sample],
        sample=sample,
        lengths=torch.tensor(lengths, dtype=torch.float64),
        sum_over_ranks=sum_over_ranks,
    )


def computed(
    batch: Sequence[Completion], keys: dict[str, Any], microbatches: Sequence[Sequence[int]] = ()
) -> tuple[float, list[np.ndarray], list[LossStatistics]]:
    """Return loss and gradients of the code under test, over these microbatches of samples."""
    size, threshold = size_of(batch, keys)
    total, gradients, statistics = 0.0, [np.zeros(0)] * len(batch), []
    for numbers in microbatches or [range(len(batch))]:
        held = [batch[number] for number in numbers]
        rows = rows_of(held, [len(sample.new) for sample in held], threshold)
        loss, part = policy_loss(rows, size, GrpoSection(**keys))
        loss.backward()
        assert rows.new_logprobs.grad is not None
        ends = np.cumsum([len(sample.new) for sample in held])[:-1]
        for number, gradient in zip(
            numbers, np.split(rows.new_logprobs.grad.numpy(), ends), strict=True
        ):
            gradients[number] = gradient
        total += float(loss.detach())
        statistics.append(part)
    return total, gradients, statistics


def over_two_ranks(
    batch: Sequence[Completion], cuts: Sequence[int], keys: dict[str, Any]
) -> tuple[float, list[np.ndarray]]:
    """Return loss and gradients where each sample is cut in two, and two ranks hold the parts."""
    size, threshold = size_of(batch, keys)
    meets, slots = threading.Barrier(2), [torch.zeros(0)] * 2
    found: list[Any] = [None, None]

    def work(rank: int) -> None:
        def exchange(values: torch.Tensor) -> torch.Tensor:
            slots[rank] = values.detach().clone()
            meets.wait(timeout=300)
            total = slots[0] + slots[1]
            meets.wait(timeout=300)
            return total

        held = [
            sample.part(slice(None, cut) if rank == 0 else slice(cut, None))
            for sample, cut in zip(batch, cuts, strict=True)
        ]
        rows = rows_of(held, [len(sample.new) for sample in batch], threshold, exchange)
        loss, _ = policy_loss(rows, size, GrpoSection(**keys))
        loss.backward()
        assert rows.new_logprobs.grad is not None
        ends = np.cumsum([len(part.new) for part in held])[:-1]
        found[rank] = float(loss.detach()), np.split(rows.new_logprobs.grad.numpy(), ends)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (first, head), (second, tail) = found
    gradients = [np.concatenate(parts) for parts in zip(head, tail, strict=True)]
    return first + second, gradients
