"""Sample: one prompt with one completion and its advantage, as the trainer sees it.

In: completions and advantages. Out: Sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32

from moe_replay.errors import TraceError
from moe_replay.routing.arrays import kept
from moe_replay.routing.candidates import Candidates


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """P prompt tokens, then S sampled ones and E of an environment between them.

    Row ``t`` predicts token ``t + 1``, so the log-probability of a sampled token is found in the
    row before it, and the last row predicts nothing. With S = 0 a sample cannot train.

    A prompt of 2 tokens, 2 sampled, 1 of a tool, 1 sampled::

        token             p0  p1  a   b   t   c
        is_sampled        -   -   x   x   -   x
        predicts_sampled  -   x   x   -   x   -
    """

    sample_id: int
    """Index among the samples of the replica in this step."""
    token_ids: Int32[np.ndarray, " tokens"]
    """``[P + S + E]``."""
    prompt_length: int
    """P, at least 1."""
    rollout_logprobs: Float32[np.ndarray, " sampled"]
    """``[S]``, in nats, from the engine: one for each sampled token."""
    advantage: float
    """The same for every sampled token."""
    trains: bool
    """False when the sample is kept for metrics but not in the loss (an overlong one, say)."""
    server: str = ""
    """Address of the server that sampled it; empty for an engine in a trainer's process."""
    reported_here: bool = True
    """Whether this rank reports its metrics: one of those that train on it does."""
    turn_mask: Bool[np.ndarray, " completion"] | None = None
    """``[S + E]``, of the tokens after the prompt: True where the policy sampled the token; None
    when it sampled all of them. See `is_sampled`."""
    candidates: Candidates | None = None
    """``[S]`` sets of ids that the sampled tokens were drawn from; None when all of them were drawn
    from the whole vocabulary."""

    def __post_init__(self) -> None:
        # What is checked here must stay: a caller's buffer may hold the next sample soon.
        for name in ("token_ids", "rollout_logprobs", "turn_mask"):
            if (array := getattr(self, name)) is not None:
                object.__setattr__(self, name, kept(array))
        completion = len(self.token_ids) - self.prompt_length
        mask = self.turn_mask
        sampled = completion if mask is None else int(mask.sum())
        fewest = 1 if self.trains else 0
        if (
            self.prompt_length < 1
            or completion < 0
            or sampled < fewest
            or len(self.rollout_logprobs) != sampled
            or len(mask if mask is not None else self.token_ids[self.prompt_length :]) != completion
        ):
            flags = (
                ""
                if mask is None
                else f" and {len(mask)} flags in turn_mask, {sampled} of them True,"
            )
            raise TraceError(
                f"sample {self.sample_id}: {len(self.token_ids)} tokens with a prompt of {self.prompt_length}{flags} leave "
                f"{sampled} sampled tokens, and there are {len(self.rollout_logprobs)} rollout_logprobs"
            )

        if self.candidates is not None and len(self.candidates) != sampled:
            raise TraceError(
                f"sample {self.sample_id}: candidates of {len(self.candidates)} tokens, expected "
                f"those of its {sampled} sampled ones"
            )

    @property
    def completion_length(self) -> int:
        """S: sampled tokens, without those of an environment."""
        return len(self.rollout_logprobs)

    @property
    def is_sampled(self) -> Bool[np.ndarray, " tokens"]:
        """``[P + S + E]``, True at the tokens that the policy sampled: what a loss may count."""
        flags = np.zeros(len(self.token_ids), dtype=bool)
        flags[self.prompt_length :] = True if self.turn_mask is None else self.turn_mask
        return flags

    @property
    def predicts_sampled(self) -> Bool[np.ndarray, " tokens"]:
        """``[P + S + E]``, True at the rows whose next token was sampled."""
        return np.append(self.is_sampled[1:], False)
