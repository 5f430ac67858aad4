"""What was measured of one sequence, and under which settings.

In: an engine's completion, a trainer's passes over it. Out: Measured, Setting.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int32

from moe_replay.routing import RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """One sampled sequence of P prompt and S sampled tokens, as engine and trainer saw it."""

    name: str
    """Its name, ``<request>/<index>`` as in files."""
    prompt: int
    """Request that it answers; completions of one prompt have the same."""
    token_ids: Int32[np.ndarray, " tokens"]
    """``[P + S]``."""
    recorded: RoutingTrace | None
    """The engine's routes; None without any."""
    live: RoutingTrace | None
    """The trainer's own choice, in a pass that replays nothing; None for a dense model."""
    rollout_logprobs: Float32[np.ndarray, " sampled"] | None = None
    """``[S]``, the engine's, in nats; None where only routes were saved."""
    live_logprobs: Float32[np.ndarray, " sampled"] | None = None
    """``[S]``, the trainer's, in nats, with its own routes."""
    replayed_logprobs: Float32[np.ndarray, " sampled"] | None = None
    """``[S]``, the trainer's, under the engine's routes; None without these."""
    raw_logprobs: Float32[np.ndarray, " sampled"] | None = None
    """``[S]``, as ``live_logprobs`` at temperature 1; None where that is the sampling
    temperature."""
    live_kl: Float[np.ndarray, " sampled"] | None = None
    """``[S]``, KL(engine || trainer) over all words, in nats, of the pass with live routes; None
    where the engine gives no distributions."""
    replayed_kl: Float[np.ndarray, " sampled"] | None = None
    """The same under the engine's routes."""
    engine_again: Float[np.ndarray, " sampled"] | None = None
    """``[S]``, the engine's model over the finished sequence minus ``rollout_logprobs``: what one
    pass differs from decoding. Given with ``live_kl``."""
    margins: Float32[np.ndarray, "tokens layers"] | None = None
    """``[P + S, layers]``, score of the trainer's last chosen expert minus that of the first one
    left out, in the units that its router chooses by; None where they are not known."""
    server: str = ""
    """Address of the server that sampled it; empty without a server."""
    policy_version: int = 0
    """Weight pushes before it was sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What was compared with what."""

    engine: str
    """Name of the engine, such as ``vllm``."""
    engine_dtype: str
    """Number format of its weights."""
    trainer: str
    """``megatron`` or ``transformers``."""
    trainer_dtype: str
    """Number format of the trainer's weights."""
    temperature: float = 1.0
    """Softmax temperature of sampling, and of the trainer's log-probabilities."""
    no_kl: str = ""
    """Why there is no exact KL; empty where there is one."""
    no_weights: str = ""
    """Why it is not known which weights sampled; empty where it is."""

    @property
    def same_dtype(self) -> bool:
        """Whether both sides compute in one number format."""
        return self.engine_dtype == self.trainer_dtype
