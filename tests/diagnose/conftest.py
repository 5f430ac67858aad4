"""One rollout for all tests of diagnoses: sampled once, run live once, and planted into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from moe_replay.diagnose import Diagnosis, Setting, diagnose
from moe_replay.diagnose.hf_trainer import HfTrainer
from moe_replay.diagnose.measuring import measure_groups
from moe_replay.diagnose.passes import Pass
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Completion, Request, RolloutGroup, SamplingParams
from moe_replay.routing import RouteForm, RoutingTrace
from moe_replay.testing.tiny_models import write_tiny_checkpoint

NUM_PROMPTS, NUM_GENERATIONS, PROMPT, COMPLETION = 8, 4, 8, 20
Ids = np.ndarray
Plant = Callable[[list[Ids]], list[Ids]]
"""Routes of all samples -> what arrives instead; an id of -1 marks a row that arrives without."""


@dataclass
class Remembering:
    """A trainer that runs the same sequence under the same routes once."""

    trainer: HfTrainer
    runs: dict[tuple[bytes, ...], Pass] = field(default_factory=dict)

    @property
    def form(self) -> RouteForm | None:
        return self.trainer.form

    def run(self, token_ids, prompt_length, *, temperature, replayed) -> Pass:
        key = (token_ids.tobytes(),)
        if replayed is not None:
            key += replayed.expert_ids.tobytes(), replayed.valid.tobytes()
        if key not in self.runs:
            self.runs[key] = self.trainer.run(
                token_ids, prompt_length, temperature=temperature, replayed=replayed
            )
        return self.runs[key]


@dataclass(frozen=True)
class Rollout:
    """What an engine in float32 sampled, and trainers for it."""

    model: Path
    groups: list[RolloutGroup]
    coarse: Remembering
    fine: Remembering

    def diagnosed(
        self, groups: Sequence[RolloutGroup] | None = None, *, fine: bool = False
    ) -> Diagnosis:
        trainer = self.fine if fine else self.coarse
        setting = _setting("float32" if fine else "bfloat16")
        measured = measure_groups(
            self.groups if groups is None else groups, trainer, temperature=1.0
        )
        return diagnose(measured, setting, num_resamples=200)

    def judged(self, groups: Sequence[RolloutGroup]) -> Diagnosis:
        """Diagnose other routes for the same tokens without a pass that replays them."""
        clean = measure_groups(self.groups, self.coarse, temperature=1.0)
        traces = [completion.trace for group in groups for completion in group.completions]
        measured = (
            replace(each, recorded=trace, replayed_logprobs=None)
            for each, trace in zip(clean, traces, strict=True)
        )
        return diagnose(measured, _setting("bfloat16"), num_resamples=200)

    def with_routes(self, plant: Plant, *, only: int | None = None) -> list[RolloutGroup]:
        """Return the rollout with other routes, of all samples or of sample number ``only``."""
        traces = [c.trace for group in self.groups for c in group.completions]
        planted = plant(
            [np.where(t.valid[:, None, None], t.expert_ids.astype(np.int64), -1) for t in traces]
        )

        def change(number: int, completion: Completion) -> Completion:
            if only not in (None, number):
                return completion
            return replace(
                completion, trace=_with_ids(completion.trace, planted[number], self._tokens(number))
            )

        return self._changed(change)

    def with_logprobs(
        self, plant: Callable[[np.ndarray], np.ndarray], *, only: int | None = None
    ) -> list[RolloutGroup]:
        def change(number: int, completion: Completion) -> Completion:
            if only not in (None, number):
                return completion
            return replace(completion, rollout_logprobs=plant(completion.rollout_logprobs))

        return self._changed(change)

    def _changed(self, change: Callable[[int, Completion], Completion]) -> list[RolloutGroup]:
        return [
            replace(
                group,
                completions=tuple(
                    change(NUM_GENERATIONS * at + index, completion)
                    for index, completion in enumerate(group.completions)
                ),
            )
            for at, group in enumerate(self.groups)
        ]

    def _tokens(self, number: int) -> np.ndarray:
        group = self.groups[number // NUM_GENERATIONS]
        return group.request.sequence(group.completions[number % NUM_GENERATIONS].token_ids)


def _setting(dtype: str) -> Setting:
    return Setting(
        engine="embedded",
        engine_dtype="float32",
        trainer="transformers",
        trainer_dtype=dtype,
    )


def _with_ids(trace: RoutingTrace, ids: Ids, tokens: np.ndarray) -> RoutingTrace:
    """Return a trace of the same tokens with other ids; rows no router chooses arrive without."""
    ordered = np.sort(ids, axis=2)
    possible = (ordered[..., 0] >= 0).all(axis=1)
    possible &= (ordered[..., 1:] != ordered[..., :-1]).all(axis=(1, 2))
    return RoutingTrace.record(
        np.where(possible[:, None, None], ids, trace.expert_ids),
        token_ids=tokens,
        valid=trace.valid & possible,
        layers=trace.layers,
        num_experts=trace.num_experts,
        origin=trace.origin,
    )


@pytest.fixture(scope="session")
def rollout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rollout]:
    """32 samples of 28 tokens, top-4 of 384 experts in 4 layers."""
    model = write_tiny_checkpoint(
        tmp_path_factory.mktemp("model"), num_experts=384, moe_intermediate_size=8
    )
    rng = np.random.default_rng(0)
    requests = [
        Request(
            request_id=number,
            prompt_ids=rng.integers(4, 100, PROMPT).astype(np.int32),
            num_generations=NUM_GENERATIONS,
        )
        for number in range(NUM_PROMPTS)
    ]
    engine = EmbeddedEngine(model, dtype="float32")
    groups = engine.generate(requests, SamplingParams(max_completion_length=COMPLETION))
    engine.close()
    yield Rollout(
        model=model,
        groups=groups,
        coarse=Remembering(HfTrainer.load(model, dtype="bfloat16", device="cpu")),
        fine=Remembering(HfTrainer.load(model, dtype="float32", device="cpu")),
    )


@pytest.fixture(scope="session")
def rollout_of_other_weights(
    rollout: Rollout, tmp_path_factory: pytest.TempPathFactory
) -> list[RolloutGroup]:
    """The same prompts, answered by a model of another seed."""
    model = write_tiny_checkpoint(
        tmp_path_factory.mktemp("other"), seed=1, num_experts=384, moe_intermediate_size=8
    )
    engine = EmbeddedEngine(model, dtype="float32")
    requests = [group.request for group in rollout.groups[:3]]
    groups = engine.generate(requests, SamplingParams(max_completion_length=COMPLETION))
    engine.close()
    return groups
