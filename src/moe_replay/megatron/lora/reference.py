"""WithoutAdapters: the model that adapters started beside, as the reference of the KL term."""

from __future__ import annotations

from collections.abc import Sequence

from moe_replay.batch import Microbatch
from moe_replay.megatron.lora.adapters import Adapters
from moe_replay.megatron.scorer import MegatronScorer, Scores
from moe_replay.routing import Routing


class WithoutAdapters:
    """Scores with a policy's frozen weights alone: a reference without a second copy of them."""

    def __init__(self, policy: MegatronScorer, adapters: Adapters) -> None:
        """Switch ``adapters`` of ``policy`` off for every pass."""
        self._policy, self._adapters = policy, adapters

    def score(
        self, microbatches: Sequence[Microbatch], *, temperature: float, routing: Routing
    ) -> Scores:
        """Score as `MegatronScorer.score` does."""
        with self._adapters.off():
            return self._policy.score(microbatches, temperature=temperature, routing=routing)
