"""Sample: one prompt with one completion and its advantage, as the trainer sees it.

In: completions and advantages. Out: Sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32

from moe_replay.errors import TraceError
from moe_replay.routing.arrays import kept


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """P prompt tokens followed by T sampled ones; with T = 0 it cannot train.

    Row ``t`` predicts token ``t + 1``; rows ``P-1 .. P+T-2`` therefore carry the log-probabilities
    of the T sampled tokens, and the last row predicts nothing.
    """

    sample_id: int
    """Index among the samples of the replica in this step."""
    token_ids: Int32[np.ndarray, " tokens"]
    """``[P + T]``."""
    prompt_length: int
    """P, at least 1."""
    rollout_logprobs: Float32[np.ndarray, " completion"]
    """``[T]``, in nats, from the engine."""
    advantage: float
    """The same for every token of the completion."""
    trains: bool
    """False when the sample is kept for metrics but not in the loss (an overlong one, say)."""
    server: str = ""
    """Address of the server that sampled it; empty for an engine in a trainer's process."""
    reported_here: bool = True
    """Whether this rank reports its metrics: one of those that train on it does."""

    def __post_init__(self) -> None:
        # What is checked here must stay: a caller's buffer may hold the next sample soon.
        for name in ("token_ids", "rollout_logprobs"):
            object.__setattr__(self, name, kept(getattr(self, name)))
        completion = len(self.token_ids) - self.prompt_length
        fewest = 1 if self.trains else 0
        if (
            self.prompt_length < 1
            or completion < fewest
            or len(self.rollout_logprobs) != completion
        ):
            raise TraceError(
                f"sample {self.sample_id}: {len(self.token_ids)} tokens with a prompt of {self.prompt_length} leave "
                f"{completion} sampled tokens, and there are {len(self.rollout_logprobs)} rollout_logprobs"
            )

    @property
    def completion_length(self) -> int:
        """T."""
        return len(self.token_ids) - self.prompt_length

    @property
    def predicts_sampled(self) -> Bool[np.ndarray, " tokens"]:
        """``[P + T]``, True at the rows whose next token was sampled."""
        rows = np.zeros(len(self.token_ids), dtype=bool)
        rows[self.prompt_length - 1 : -1] = True
        return rows
