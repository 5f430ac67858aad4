"""Everything that moves in a step, under a picture of the stations that pass it on.

A station is a file of this package, named for the loop's own word. It takes what stands above it,
gives what stands beside it, and imports no other station::

    tasks/          prompts
                       |
    rollout.py      sample completions of them         Rollout: completions, routes
                       |
    reward.py       score them, round after round      Rated, of all rounds: rounds.py
                       |
    reward.py       compare those of each prompt       Scored: rewards, advantages
                       |
    batch.py        pack them, bring every rank        StepBatch: microbatches of
                    the routes that it replays         each optimizer step
                       |
    score.py        old log-probabilities, judged      OldScores, with what the
                    by guard/ where they replay;       guard found: Judged
                    or those of the update's pass
                       |
    score.py        reference log-probabilities        sample id -> ScoredSample
                       |
    penalty.py      with kl_in_reward: compare once    OldScores, Scored: other
                    more, less the divergence          advantages
                       |
    update.py       one optimizer step a mini-batch    Update: metrics; new weights
                       |
    push.py         give the weights to the engine     policy version + 1
                       |
    evaluate.py     sample and score held-out prompts  EvalRecord
                       |
    checkpoint.py   write what a resumed run needs     RunPosition, on disk

`record.py` writes a step's numbers down as a StepRecord; `end.py` writes the trained model.

A sample has two names. Its ``sample_id`` counts the samples of one replica; its index in the step
counts those of all replicas, prompt after prompt. Example: a step of 4 prompts with 2 completions
each, 2 mini-batches, 2 replicas. Replica 1 has prompts 1 and 3 of the 4: its sample ids 0, 1, 2, 3
are the samples with the indices 2, 3, 6, 7 of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64

from moe_replay.batch import Microbatch, Sample
from moe_replay.engines.types import Completion, RolloutGroup
from moe_replay.grpo.metrics import Tally
from moe_replay.megatron.scorer import ScoredSample
from moe_replay.routing import Coverage, RouteSlice, RoutingTrace
from moe_replay.tasks.encoding import Prompt

MISALIGNED, LOST = "misaligned", "lost"
"""Why the guard keeps a sample out of training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one side said in a conversation."""

    by: Literal["policy", "environment"]
    """Who."""
    text: str
    """Of the environment: with what the chat template puts around it."""
    num_tokens: int
    """Its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What is known of a conversation in an environment beside its tokens."""

    parts: tuple[Part, ...]
    """After the prompt, in order."""
    num_calls: int
    """Calls of tools; of an environment that is stepped, its steps."""
    num_failed: int
    """Those that failed, or could not be read."""
    met_limit: bool
    """Whether ``environment.max_turns`` ended it."""
    reward: float
    """Of its environment, before the weight; NaN where that has no opinion or gives none."""

    @property
    def turns(self) -> list[Part]:
        """What the policy said."""
        return [part for part in self.parts if part.by == "policy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A step's prompts, and the completions that this rank sampled."""

    prompts: tuple[Prompt, ...]
    """All prompts of the step, mini-batch after mini-batch."""
    own: tuple[int, ...]
    """Indices of those that this rank sampled."""
    groups: tuple[RolloutGroup, ...]
    """One for each of ``own``, without traces."""
    traces: dict[tuple[int, int], RoutingTrace]
    """(index of the prompt, of the completion) -> its trace; emptied once the routes are cut."""
    num_cut: int
    """Tokens of this rank that the engine sampled after a stop string, and that were cut off."""
    policy_version: int
    """Weight pushes when the step began: what learns from it. Completions may be older."""
    conversations: tuple[Conversation, ...] = ()
    """One for each of `completions`, where there is an environment."""

    @property
    def completions(self) -> list[Completion]:
        """All completions of this rank, prompt after prompt."""
        return [completion for group in self.groups for completion in group.completions]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """A rollout, and what the reward functions say of it."""

    rollout: Rollout
    """Of the step, or with dynamic sampling of one of its rounds."""
    texts: tuple[str, ...]
    """What this rank's completions say, prompt after prompt."""
    rewards: Mapping[str, Float64[np.ndarray, "own generations"]]
    """Reward function -> scores before weights; NaN where it has no opinion."""
    totals: Float64[np.ndarray, "own generations"]
    """Weighted sums; NaN where no function has an opinion."""
    every_reward: Mapping[str, Float64[np.ndarray, "prompts generations"]]
    """``rewards`` of all ranks."""
    every_total: Float64[np.ndarray, "prompts generations"]
    """``totals`` of all ranks."""
    counts: Bool[np.ndarray, "prompts generations"]
    """False for a completion without a reward, or whose reward means nothing (it was aborted)."""
    tally: Tally
    """What reward functions of all ranks logged, and how often they failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Rewards of this rank's completions, and what the batch of all ranks says about them."""

    texts: tuple[str, ...]
    """What this rank's completions say, prompt after prompt."""
    rewards: Mapping[str, Float64[np.ndarray, "own generations"]]
    """Reward function -> scores before weights; NaN where it has no opinion."""
    totals: Float64[np.ndarray, "own generations"]
    """Weighted sums; NaN where no function has an opinion."""
    advantages: Float64[np.ndarray, "prompts generations"]
    """Of all completions of the step."""
    counts: Bool[np.ndarray, "prompts generations"]
    """False for a completion that was compared with nothing, and so must not train."""
    metrics: Mapping[str, float]
    """``reward``, ``reward_std``... over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrigin:
    """Where a sample comes from, in words that mean the same on every rank."""

    index: int
    """Of the sample among those of the step: prompt after prompt, completion after completion."""
    item: int
    """Dataset item of its prompt."""
    completion: int
    """Its index among the completions of the prompt."""
    server: str
    """Address of the server that sampled it; empty for an engine in a trainer's process."""
    policy_version: int
    """Weights that sampled its first token."""
    rank: int
    """The rank that sampled it, or asked a server to."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepBatch:
    """What a step learns from, on this rank."""

    minibatches: tuple[tuple[Microbatch, ...], ...]
    """What each optimizer step learns from, packed; every rank of the run has equally many."""
    origins: tuple[SampleOrigin, ...]
    """By ``sample_id``."""
    scoring: tuple[Microbatch, ...] = ()
    """All samples packed once more, for passes without gradient; empty where these run the
    microbatches of the update."""
    coverage: Coverage
    """Rows of samples reported here and of this rank's padding: replayed, or live by reason."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All samples of this replica, in the order of their ids."""
        held = [sample for microbatch in self.microbatches for sample in microbatch.samples]
        return tuple(sorted(held, key=lambda sample: sample.sample_id))

    @property
    def microbatches(self) -> list[Microbatch]:
        """All microbatches, with keys from 0."""
        return [microbatch for part in self.minibatches for microbatch in part]

    @property
    def for_scoring(self) -> list[Microbatch]:
        """The microbatches of a pass without gradient, with keys from 0."""
        return list(self.scoring) or self.microbatches

    def with_routes(self, routes: Mapping[int, RouteSlice]) -> StepBatch:
        """Return the batch with routes (microbatch key -> routes) for the update."""
        return self._each(lambda m: replace(m, routes=routes[m.key]))

    def with_scoring_routes(self, routes: Mapping[int, RouteSlice]) -> StepBatch:
        """Return the batch with routes (key in ``scoring`` -> routes) for scoring."""
        return replace(self, scoring=tuple(replace(m, routes=routes[m.key]) for m in self.scoring))

    def without(self, dropped: Collection[int]) -> StepBatch:
        """Return the batch in which the samples ``dropped`` (sample ids) do not train.

        They stay in their microbatches, and the denominators of the loss count them as they count
        other untrained samples: not at all.
        """

        def changed(m: Microbatch) -> Microbatch:
            kept = (replace(s, trains=s.trains and s.sample_id not in dropped) for s in m.samples)
            return replace(m, samples=tuple(kept))

        return self._each(changed) if dropped else self

    def with_advantages(self, advantages: Mapping[int, float]) -> StepBatch:
        """Return the batch in which samples (by id) have other advantages."""

        def changed(m: Microbatch) -> Microbatch:
            samples = (replace(s, advantage=advantages[s.sample_id]) for s in m.samples)
            return replace(m, samples=tuple(samples))

        return self._each(changed)

    def _each(self, change: Callable[[Microbatch], Microbatch]) -> StepBatch:
        parts = tuple(tuple(map(change, part)) for part in self.minibatches)
        return replace(self, minibatches=parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the guard found in the routes of a pass; the same on every rank."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """``replay/*``."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What belongs to a metric and is not a number, for the step's record."""
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Index in the step -> why the sample must not be learned from: `MISALIGNED` or `LOST`."""
    drifted: frozenset[tuple[str, str]] = frozenset()
    """(kind, name) of the groups of samples whose routes drift has left almost no meaning."""
    agreement: Mapping[int, float] = field(default_factory=dict)
    """Index in the step -> share of the sample's slots on which live and replayed routes agree."""
    flips: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    """Index in the step -> position -> layers in which its live expert set differs from the
    replayed one, for the samples whose tokens are kept."""

    def dropped_here(self, batch: StepBatch) -> set[int]:
        """Return the ids of the samples of this replica that are dropped."""
        return {
            sample_id
            for sample_id, origin in enumerate(batch.origins)
            if origin.index in self.dropped
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class OldScores:
    """What the trainer thinks of the samples before it learns from them."""

    batch: StepBatch
    """With the routes that the update replays: the engine's (R3) or those of this pass (R2)."""
    scored: Mapping[int, ScoredSample]
    """Sample id -> old log-probabilities and entropies; empty while the update's own forward pass
    has yet to give them."""
    metrics: Mapping[str, float]
    """Agreement of the replayed pass (R3), and the live gap when it was measured."""
    judged: Judged
    """What the guard found in the engine's routes (R3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What the optimizer steps of a step did."""

    old: OldScores
    """What the trainer thought of the samples before: as it was given, or as the update's own
    forward pass found it."""
    metrics: Mapping[str, float]
    """``loss``, ``clip_ratio/*``, ``grad_norm``... over all ranks."""
    details: Mapping[str, Any]
    """What belongs to a metric and is not a number."""
