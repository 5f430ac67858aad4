"""The loss of one mini-batch, microbatch by microbatch, and whether it pulls at the weights at all.

In: old and reference log-probabilities, samples. Out: parts of the loss to differentiate, and their statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from moe_replay.batch import Microbatch, Sample
from moe_replay.errors import UpdateError
from moe_replay.grpo.loss import (
    BatchSize,
    LossInputs,
    LossSettings,
    LossStatistics,
    policy_loss,
    sample_weights,
)
from moe_replay.grpo.run import Run
from moe_replay.megatron.scorer import ScoredSample


class MinibatchLoss:
    """The loss of one mini-batch, microbatch by microbatch, and what it saw."""

    def __init__(
        self,
        run: Run,
        old: Mapping[int, ScoredSample],
        reference: Mapping[int, ScoredSample] | None,
        samples: Sequence[Sample],
    ) -> None:
        """Weigh the ``samples`` of this replica in the mini-batch of all replicas; collective."""
        grpo = run.recipe.grpo
        self.settings = LossSettings(
            loss_type=grpo.loss_type,
            epsilon=grpo.epsilon,
            epsilon_high=grpo.epsilon_high,
            beta=grpo.beta,
        )
        self.old, self.reference = old, reference
        self.statistics: list[LossStatistics] = []
        self.samples = samples
        lengths = [sample.completion_length for sample in samples]
        trains = [sample.trains for sample in samples]
        counted = [length for length, counts in zip(lengths, trains, strict=True) if counts]
        # Every rank of a replica knows the same samples; one of them counts.
        speaks = int(run.replica.is_leader)
        pulls = [s.trains and (np.float32(s.advantage) != 0 or grpo.beta > 0) for s in samples]
        gathered = run.gather([speaks * len(counted), speaks * sum(counted), any(pulls)])
        self.is_idle = not (
            any(part[2] for part in gathered) or run.recipe.megatron.moe_aux_loss_coeff > 0
        )
        weights = sample_weights(
            lengths,
            trains,
            loss_type=grpo.loss_type,
            whole=BatchSize(
                num_samples=sum(part[0] for part in gathered),
                num_tokens=sum(part[1] for part in gathered),
            ),
            max_completion_length=run.recipe.rollout.max_completion_length,
        )
        ids = [sample.sample_id for sample in samples]
        self.weights = dict(zip(ids, weights, strict=True))

    def __call__(self, microbatch: Microbatch, new_logprobs: torch.Tensor) -> torch.Tensor:
        """Return the microbatch's part of the loss."""

        def rows(values: Sequence[np.ndarray]) -> torch.Tensor:
            placed = microbatch.place(values, fill=0.0)[microbatch.predicts_sampled]
            return torch.from_numpy(placed).to(new_logprobs.device)

        samples, reference = microbatch.samples, self.reference
        inputs = LossInputs(
            new_logprobs=new_logprobs,
            old_logprobs=rows([self.old[s.sample_id].token_logprobs for s in samples]),
            ref_logprobs=rows([reference[s.sample_id].token_logprobs for s in samples])
            if reference is not None
            else None,
            advantages=rows([np.full(s.completion_length, s.advantage) for s in samples]),
            weights=rows(
                [np.full(s.completion_length, self.weights[s.sample_id]) for s in samples]
            ),
        )
        loss, statistics = policy_loss(inputs, self.settings)
        self.statistics.append(statistics)
        return loss

    def require_pull(self, run: Run, grad_norm: float, *, where: str) -> None:
        """Raise `UpdateError` when the gradient is exactly 0 although samples pull at the weights; collective.

        It may well be 0 where every token is clipped or certain, or where equal completions with opposite advantages
        cancel: such a step goes on.
        """
        if grad_norm != 0:
            return
        speaks = run.replica.computes_loss
        pulled = sum(part.num_pulled for part in self.statistics) if speaks else 0
        gathered = run.gather([pulled, self._pulls_one_way()])
        tokens = sum(part[0] for part in gathered)
        if tokens and any(part[1] for part in gathered):
            raise UpdateError(
                f"{where}: the norm of the gradient is exactly 0, though {tokens} sampled tokens have an advantage, are "
                "not clipped and were not certain. The loss has lost its connection to the weights: they are frozen "
                "(requires_grad is off), or a hook or changed module detaches what it returns. No weight was changed by "
                "this update and nothing was pushed"
            )

    def _pulls_one_way(self) -> bool:
        """Tell whether some token sequence of this replica has advantages that do not cancel."""
        sums: dict[bytes, tuple[float, float]] = {}
        for sample in self.samples:
            pull = sample.advantage * self.weights[sample.sample_id]
            total, size = sums.get(sample.token_ids.tobytes(), (0.0, 0.0))
            sums[sample.token_ids.tobytes()] = (total + pull, size + abs(pull))
        return any(abs(total) > 1e-6 * size for total, size in sums.values())
