"""What calls to a server that knows nothing of moe-replay share: pushes as files that it reads, and a trial completion.

In: a URL, the model's facts. Out: a base of the calls to such a server. Called by: rollout.vllm_calls, rollout.sglang_calls.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from moe_replay.errors import RecipeError
from moe_replay.rollout.http_calls import CallError, Fault, HttpCalls
from moe_replay.rollout.model_facts import ModelFacts
from moe_replay.rollout.server_contract import WeightPart
from moe_replay.rollout.types import Completion, Request


class PlainCalls(HttpCalls):
    """One server of another project. Threads may call it at the same time."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        timeout_s: float,
        max_answer_bytes: int,
        facts: ModelFacts,
    ) -> None:
        super().__init__(url, token=token, timeout_s=timeout_s, max_answer_bytes=max_answer_bytes)
        self._facts = facts
        self._pushed: Path | None = None

    def put_weights(self, part: WeightPart) -> None:
        """Keep the folder of a push in mind; the server reads it when the push is committed."""
        self._pushed = part.path.parent

    def try_out(self, sample: Callable[[Request], Completion], *, hint: str = "") -> Completion:
        """Return what ``sample`` makes of a short prompt, once before anything is trained on.

        ``hint`` names a further cause, for the message.

        Raises:
            RecipeError: when what comes back does not fit the model.
            CallError: when the server does not answer.
        """
        # Not the first ids: the embedding of a padding token is zero, and so are its logits.
        prompt_ids = (np.arange(1, 5) * self._facts.vocab_size // 5).astype(np.int32)
        try:
            return sample(Request(request_id=0, prompt_ids=prompt_ids, num_generations=1))
        except CallError as error:
            if error.fault is not Fault.CORRUPT:
                raise
            raise RecipeError(
                "a trial completion failed, so the server serves another model than model.path, or does not return what it "
                f"should{hint}: {error}"
            ) from error
