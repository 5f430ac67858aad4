"""A public engine without a model, so that whatever drives an engine can be tested in milliseconds.

It is a table, but an honest one: its log-probabilities are those of the distribution it samples
from, its routes belong to its tokens, its noise does not depend on the batch, and a push changes
what it says.

In: requests. Out: completions with routes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float32, Integer

from moe_replay.engines.checks import check_requests, check_sampling
from moe_replay.engines.lifecycle import VersionedEngine
from moe_replay.engines.noise import completion_noise, sample_tokens
from moe_replay.engines.types import (
    Completion,
    EngineDescription,
    FinishReason,
    Request,
    RolloutGroup,
    SamplingParams,
    grouped,
)
from moe_replay.errors import EngineError
from moe_replay.routing.candidates import Candidates

# Routes depend on the token and on its position modulo this, so a repeated token changes routes.
_NUM_POSITIONS = 61


class FakeEngine(VersionedEngine):
    """Completes prompts from a random table of next tokens, and routes them by another.

    Examples:
        >>> engine = FakeEngine(num_experts=8, topk=2, moe_layers=(1, 3))
        >>> groups = engine.generate(requests, SamplingParams(max_completion_length=16))
    """

    def __init__(
        self,
        *,
        vocab_size: int = 32,
        num_experts: int = 8,
        topk: int = 2,
        moe_layers: Sequence[int] = (0, 1),
        max_context_length: int = 4096,
        eos_id: int = 1,
        weight_shapes: Mapping[str, tuple[int, ...]] | None = None,
        seed: int = 0,
    ) -> None:
        self._vocab_size, self._eos_id, self._seed = vocab_size, eos_id, seed
        self._weight_shapes = weight_shapes
        super().__init__(
            EngineDescription(
                name="fake",
                version="1",
                dtype="float32",
                records_routes=True,
                moe_layers=tuple(moe_layers),
                num_experts=num_experts,
                topk=topk,
                max_context_length=max_context_length,
            )
        )
        self._fill_tables()

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Complete every request; the groups come back in the order of ``requests``.

        Raises:
            EngineError: when a request is malformed or too long, or the engine is closed.
        """
        self._check_state("ready")
        check_sampling(sampling)
        check_requests(
            requests, sampling, description=self._description, vocab_size=self._vocab_size
        )
        return grouped(
            requests,
            (
                self._complete(request, number, sampling)
                for request in requests
                for number in range(request.num_generations)
            ),
        )

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int
    ) -> None:
        """Adopt ``policy_version``, and with it other tables.

        The names and shapes must be those of ``weight_shapes``; without it any push is accepted.

        Raises:
            EngineError: when a name is unknown, missing or of another shape, or the version goes
                backwards.
        """
        self._check_push(policy_version)
        pushed = {name: tuple(tensor.shape) for name, tensor in weights}
        if self._weight_shapes is not None and pushed != dict(self._weight_shapes):
            odd = sorted(set(pushed.items()) ^ set(self._weight_shapes.items()))
            raise EngineError(f"the push and weight_shapes differ in these names and shapes: {odd}")
        self._policy_version = policy_version
        self._fill_tables()

    def next_logits(
        self, token_ids: Integer[np.ndarray, " tokens"]
    ) -> Float32[np.ndarray, "tokens vocabulary"]:
        """Return the logits after each of ``token_ids`` under the current policy.

        Tests compare log-probabilities with them.
        """
        return self._next_logits[torch.from_numpy(token_ids).long()].numpy()

    def routes_of(
        self, token_ids: Integer[np.ndarray, " tokens"]
    ) -> Integer[np.ndarray, "tokens layers topk"]:
        """Return the routes of ``token_ids`` under the current policy, to compare traces with."""
        positions = np.arange(len(token_ids)) % _NUM_POSITIONS
        scores = self._token_scores[token_ids] + self._position_scores[positions]
        return np.argsort(-scores, axis=-1)[..., : self._description.topk]

    def _fill_tables(self) -> None:
        rng = np.random.default_rng([self._seed, self._policy_version])
        shape = (len(self._description.moe_layers), self._description.num_experts)
        logits = rng.normal(size=(self._vocab_size, self._vocab_size)).astype(np.float32)
        self._next_logits = torch.from_numpy(logits)
        self._token_scores = rng.random((self._vocab_size, *shape))
        self._position_scores = rng.random((_NUM_POSITIONS, *shape))

    def _complete(self, request: Request, number: int, sampling: SamplingParams) -> Completion:
        sampling = request.sampling(sampling)
        noise = completion_noise(
            seed=sampling.seed,
            request_id=request.request_id,
            completion=number,
            length=sampling.max_completion_length,
        )
        stops = {self._eos_id, *sampling.stop_token_ids}
        last, tokens, logprobs = int(request.prompt_ids[-1]), [], []
        sets: list[np.ndarray] = []
        kept_mass: list[float] = []
        for position in range(sampling.max_completion_length):
            drawn = sample_tokens(
                self._next_logits[last][None],
                torch.from_numpy(noise[position : position + 1]),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
            )
            last = int(drawn.ids)
            tokens.append(last)
            logprob, mass = drawn.among_kept()
            logprobs.append(float(logprob if sampling.keeps_candidates else drawn.rollout_logprobs))
            sets += drawn.sets()
            kept_mass.append(float(mass))
            if last in stops:
                break
        token_ids = np.array(tokens, dtype=np.int32)
        sequence = request.sequence(token_ids)
        return Completion(
            token_ids=token_ids,
            rollout_logprobs=np.array(logprobs, dtype=np.float32),
            trace=self._description.trace(
                self.routes_of(sequence), sequence, policy_version=self._policy_version
            ),
            finish_reason=FinishReason.STOP if last in stops else FinishReason.LENGTH,
            policy_version=self._policy_version,
            candidates=Candidates.of_sets(sets, kept_mass) if sampling.keeps_candidates else None,
        )
