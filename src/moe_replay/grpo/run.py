"""Run: the parts of a run and its position, which stations read and move on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from moe_replay.checkpoint.tokenizer import num_known_ids
from moe_replay.engines.stop_strings import StopStrings
from moe_replay.engines.types import Completion, Engine
from moe_replay.grpo.ahead import Ahead
from moe_replay.grpo.inputs import Inputs
from moe_replay.grpo.journal import Journal
from moe_replay.grpo.memory import SharedDevice
from moe_replay.grpo.records import BaseReporter
from moe_replay.grpo.saves import SavePace
from moe_replay.grpo.stopping import StepDropped, StopRequest, StopRequested
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.checkpoint import CheckpointFolder, PendingCheckpoint
from moe_replay.megatron.lora.reference import WithoutAdapters
from moe_replay.megatron.ranks.messages import HostGroup, all_ranks, as_text, raise_first
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.megatron.scorer import MegatronScorer
from moe_replay.megatron.step_work import even_length
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.recipe.sections.rollout import FilesEngineSection, ServersEngineSection
from moe_replay.routing import ReplayMode
from moe_replay.routing.guard import Guard
from moe_replay.tasks.completion_text import completion_text
from moe_replay.tasks.mixture import MixedPrompts

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BestStep:
    """The evaluation with the best value of a metric."""

    step: int
    """Steps before it."""
    value: float
    """Of the metric."""
    metric: str
    """Its name."""
    is_greatest: bool
    """Whether a greater value would be better."""
    measured_on: str = ""
    """Digest of what it was measured on, see `measured.measured_on`; empty where none was kept."""


@dataclass(kw_only=True)
class Run:
    """The parts of a run and its position."""

    recipe: Recipe
    process: ProcessSpec
    reporter: BaseReporter
    inputs: Inputs
    engine: Engine
    actor: MegatronActor
    replica: Replica
    reference: MegatronScorer | WithoutAdapters | None
    guard: Guard | None
    checkpoints: CheckpointFolder
    identity: Mapping[str, Any]
    """What decides the results, by content, see `run_identity`; only on rank 0, which writes it."""
    stop: StopRequest
    """Whether somebody wants the run to end before its last step."""
    notes: tuple[str, ...] = ()
    """What a person should know about how the run was resumed."""
    journal: Journal = field(default_factory=Journal)
    """Warnings and seconds of the step in flight."""
    ahead: Ahead = field(default_factory=Ahead)
    """The rollout of the next step, where the run samples it beside the trainer."""
    step: int = 0
    """Finished steps; during a step, its number."""
    policy_version: int = 0
    """Weight pushes that the engine has received."""
    next_prompt: int = 0
    """Position of the next step's first prompt."""
    evaluation_is_owed: bool = True
    """The present weights were to be evaluated and have not been."""
    best: BestStep | None = None
    """The best evaluation so far, by ``checkpoint.metric_for_best_model``."""
    saved_step: int = 0
    """Step of the newest checkpoint, finished or being written; 0 without one."""
    saving: PendingCheckpoint | None = None
    """The checkpoint that is being written beside the run."""
    _step_began_at: int | None = None

    @cached_property
    def device(self) -> SharedDevice:
        """What the trainer holds where the engine may sample."""
        models: list[MegatronScorer] = [self.actor]
        if isinstance(self.reference, MegatronScorer):
            models.append(self.reference)
        return SharedDevice(
            models,
            ranks=self.ranks,
            makes_room=self.recipe.megatron.offload_during_rollout not in ("auto", "none"),
            overlaps=self.overlaps,
        )

    @property
    def finished_steps(self) -> int:
        """Steps that are finished; that in flight is not, until it has its completions."""
        return self.step if self._step_began_at is None else self.step - 1

    @property
    def mode(self) -> ReplayMode:
        """Where routes come from."""
        return self.recipe.replay.router_replay_mode

    @property
    def mixture(self) -> MixedPrompts | None:
        """The datasets to train on, where there are several."""
        return self.inputs.train if isinstance(self.inputs.train, MixedPrompts) else None

    @property
    def temperature(self) -> float:
        """Temperature of the trainer's log-probabilities: that of the rollout."""
        return self.recipe.rollout.temperature

    @property
    def overlaps(self) -> bool:
        """Whether the engine samples while the trainer computes: nothing of either may make way."""
        return self.recipe.rollout.max_staleness > 0

    @property
    def pushes_in_flight(self) -> bool:
        """Whether weights are pushed while the rollout of the next step goes on."""
        rollout = self.recipe.rollout
        return isinstance(rollout, ServersEngineSection) and rollout.push_in_flight

    @property
    def may_be_stale(self) -> bool:
        """Whether a step may learn from completions of older weights than the trainer's."""
        rollout = self.recipe.rollout
        return self.overlaps or (isinstance(rollout, FilesEngineSection) and rollout.allow_stale)

    @property
    def min_coverage(self) -> float:
        """Coverage below which the run stops; 0 when nothing is replayed."""
        return self.recipe.replay.min_coverage if self.mode.replays else 0.0

    @property
    def ranks(self) -> HostGroup:
        """All ranks."""
        return all_ranks()

    @property
    def directory(self) -> Path:
        """Run directory."""
        return self.recipe.run.output_dir

    @property
    def evaluation_is_due(self) -> bool:
        """Whether to evaluate after this step: at the end, and every ``eval.every_steps``."""
        every = self.recipe.eval.every_steps
        return self.step == self.recipe.run.max_steps or (every > 0 and self.step % every == 0)

    @cached_property
    def saves(self) -> SavePace:
        """When checkpoints are due before the last step."""
        return SavePace(self.recipe.checkpoint.save_steps)

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether to save after this step, by the clock of rank 0; collective."""
        is_due = self.saves.is_due(self.step, now=time.monotonic())
        is_best = self.best is not None and self.best.step == self.step
        is_last = self.step == self.recipe.run.max_steps
        return is_last or is_best or self.ranks.gather(is_due)[0]

    @property
    def live_gap_is_due(self) -> bool:
        """Whether this step also measures the engine gap with live routing."""
        every = self.recipe.replay.live_gap_every
        return every > 0 and (self.step - 1) % every == 0

    def goes_on(self) -> bool:
        """Whether another step is left and no rank was asked to stop; collective."""
        return self.step < self.recipe.run.max_steps and not self.agrees_to_stop()

    def agrees_to_stop(self) -> bool:
        """Whether any rank was asked to stop; tells all of them why; collective."""
        asked = self.ranks.first(self.stop.reason)
        if asked is not None:
            self.stop.ask(asked[1])
        return asked is not None

    def droppable(self, work: Callable[[], T], *, alone: bool = True) -> T:
        """Return what ``work`` returns unless a rank fails or is asked to stop; collective.

        ``alone`` says that ``work`` is not collective: a request breaks it off on the rank that
        receives it, and an error of one rank is raised on all, after the others have done their
        part. Errors are not reported when some rank was asked to stop: the signal may have reached
        what they work with too.

        Raises:
            StepDropped: on every rank, when one of them was asked to stop.
            MoeReplayError: of the kind that another rank raised.
        """
        result: T | None = None
        try:
            with self.stop.breaking_off() if alone else nullcontext():
                result = work()
        except StopRequested:
            pass
        except Exception as error:
            # Ranks that wait for this one inside ``work`` would never hear of it.
            if not alone and self.stop.reason is None:
                raise
            # In here, so that a connection that breaks now does not hide the error.
            self._agree(error)
        else:
            self._agree(None)
            return cast("T", result)
        self._agree(None)
        raise StepDropped

    def _agree(self, failure: Exception | None) -> None:
        """Leave on every rank when one of them was asked to stop, or has failed; collective."""
        gathered = self.ranks.gather((self.stop.reason, as_text(failure)))
        asked = next((reason for reason, _ in gathered if reason is not None), None)
        if asked is not None:
            self.stop.ask(asked)
            raise StepDropped
        raise_first(failure, [failed for _, failed in gathered])

    def leave_saving(self) -> None:
        """Wait until nothing writes files of a checkpoint that stays unfinished."""
        if self.saving is not None:
            self.saving.wait()

    def begin_step(self) -> None:
        """Move on to the next step."""
        self._step_began_at = self.next_prompt
        self.step += 1

    def keep_step(self) -> None:
        """Finish the step in flight from here on, whatever asks the run to stop."""
        self._step_began_at = None
        self.ahead.keep()

    def drop_step(self) -> None:
        """Go back to where the step in flight began; nothing of it remains."""
        assert self._step_began_at is not None
        self.step -= 1
        self.next_prompt = self._step_began_at
        self.ahead.put_back()

    @contextmanager
    def station(self, name: str) -> Iterator[None]:
        """Announce a station and time it."""
        self.reporter.station(self.step, name)
        with self.journal.timed(name):
            yield

    @cached_property
    def stop_strings(self) -> StopStrings:
        """Texts that end a completion."""
        return StopStrings(strings=self.recipe.rollout.stop, tokenizer=self.inputs.tokenizer)

    @cached_property
    def even_length(self) -> float:
        """Tokens of a sequence at which attention costs as much as all weights together."""
        return even_length(self.actor.weights, self.actor.chunks[0])

    @cached_property
    def num_known_ids(self) -> int:
        """Token ids from here on are unknown to the tokenizer."""
        return num_known_ids(self.inputs.tokenizer)

    def decode(self, completion: Completion) -> str:
        """Return what the model wrote, special tokens such as ``<think>`` included."""
        return completion_text(self.inputs.tokenizer, completion, stop=self.recipe.rollout.stop)
