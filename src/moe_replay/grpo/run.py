"""Run: everything that a run holds, and its position.

In: the parts of a run. Out: what its stations read and move on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from moe_replay.checkpoint.tokenizer import num_known_ids
from moe_replay.engines.stop_strings import StopStrings
from moe_replay.engines.types import Completion, Engine, SamplingParams
from moe_replay.engines.vllm.capacity import HasCache
from moe_replay.engines.weight_stream import drain
from moe_replay.errors import CheckpointError
from moe_replay.grpo.engines import recipe_sampling
from moe_replay.grpo.inputs import Inputs, data_lines
from moe_replay.grpo.metrics import Tally
from moe_replay.grpo.model_settings import run_layout
from moe_replay.grpo.records import Reporter, RunSummary
from moe_replay.grpo.sampling_words import describe_drawing, describe_ends
from moe_replay.grpo.stopping import StopRequest, droppable, raise_together
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.checkpoint import CheckpointFolder, RunPosition
from moe_replay.megatron.ranks.messages import HostGroup, all_ranks
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.megatron.scorer import MegatronScorer
from moe_replay.megatron.weights import export_hf_weights, save_hf_checkpoint
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.routing import ReplayMode
from moe_replay.routing.guard import Guard
from moe_replay.tasks.completion_text import completion_text

T = TypeVar("T")
NEW_EXPORT = "export.new"
"""Folder of an export that is being written; what a killed writer left has this name too, or that with ``.partial``."""


@dataclass(kw_only=True)
class Run:
    """The parts of a run and its position. Stations read it and move it on."""

    recipe: Recipe
    process: ProcessSpec
    reporter: Reporter
    inputs: Inputs
    engine: Engine
    actor: MegatronActor
    replica: Replica
    reference: MegatronScorer | None
    guard: Guard | None
    checkpoints: CheckpointFolder
    identity: Mapping[str, Any]
    """What decides the results, by content, see `run_identity`; on rank 0, which writes it down, only."""
    stop: StopRequest
    """Whether somebody wants the run to end before its last step."""
    notes: tuple[str, ...] = ()
    """What a person should know about how the run was taken up."""
    step: int = 0
    """Finished steps; during a step, its number."""
    policy_version: int = 0
    """Weight pushes that the engine has received."""
    next_prompt: int = 0
    """Position of the next step's first prompt."""
    evaluation_is_owed: bool = True
    """The present weights were to be evaluated and have not been."""
    saved_step: int = 0
    """Step of the newest checkpoint; 0 without one."""
    _step_began_at: int | None = None
    _seconds: dict[str, float] = field(default_factory=dict)
    _warnings: list[str] = field(default_factory=list)
    _kinds_said: set[str] = field(default_factory=set)
    _noticed: frozenset[str] = frozenset()

    @property
    def mode(self) -> ReplayMode:
        """Where routes come from."""
        return self.recipe.replay.router_replay_mode

    @property
    def temperature(self) -> float:
        """Temperature at which the trainer computes log-probabilities: that of the rollout."""
        return self.recipe.rollout.temperature

    @property
    def min_coverage(self) -> float:
        """Coverage below which the run stops; 0 when nothing is replayed."""
        return self.recipe.replay.min_coverage if self.mode.replays else 0.0

    @property
    def device(self) -> torch.device:
        """Device of the trainer."""
        return self.actor.device

    @property
    def ranks(self) -> HostGroup:
        """All ranks."""
        return all_ranks()

    @property
    def directory(self) -> Path:
        """Run directory."""
        return self.recipe.run.output_dir

    @property
    def export_path(self) -> Path:
        """Folder of the exported Hugging Face checkpoint."""
        return self.directory / "export"

    @property
    def evaluation_is_due(self) -> bool:
        """Whether to evaluate after this step: at the end, and every ``eval.every_steps``."""
        every = self.recipe.eval.every_steps
        return self.step == self.recipe.run.max_steps or (every > 0 and self.step % every == 0)

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether to save after this step: at the end, and every ``checkpoint.save_steps``."""
        every = self.recipe.checkpoint.save_steps
        return self.step == self.recipe.run.max_steps or self.step % every == 0

    @property
    def live_gap_is_due(self) -> bool:
        """Whether this step also measures the engine gap with live routing."""
        every = self.recipe.replay.live_gap_every
        return every > 0 and (self.step - 1) % every == 0

    def goes_on(self) -> bool:
        """Tell whether there is another step to take: one is left, and no rank was asked to stop; collective."""
        return self.step < self.recipe.run.max_steps and not self.agrees_to_stop()

    def agrees_to_stop(self) -> bool:
        """Tell whether any rank was asked to stop, and let all of them know why; collective."""
        asked = self.ranks.first(self.stop.reason)
        if asked is not None:
            self.stop.ask(asked[1])
        return asked is not None

    def droppable(self, work: Callable[[], T], *, alone: bool = True) -> T:
        """Return the result of sampling or scoring, unless a rank fails or is asked to stop meanwhile; collective at its end.

        ``alone`` says that ``work`` is not collective: a request breaks it off on the rank that receives it, and an error of
        one rank is raised on all, after the others have done their part. Errors are not reported when some rank was asked
        to stop: the signal may have reached what they work with too.

        Raises:
            StepDropped: on every rank, when one of them was asked to stop.
            MoeReplayError: of the kind that another rank raised.
        """
        return droppable(work, self.stop, self.gather, alone=alone)

    def begin_step(self) -> None:
        """Move on to the next step."""
        self._step_began_at = self.next_prompt
        self.step += 1

    def drop_step(self) -> None:
        """Go back to where the step in flight began; nothing that it has done so far outlives it."""
        assert self._step_began_at is not None
        self.step -= 1
        self.next_prompt = self._step_began_at

    @contextmanager
    def station(self, name: str) -> Iterator[None]:
        """Announce a station and time it."""
        self.reporter.station(self.step, name)
        started = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - started
            self._seconds[name] = self._seconds.get(name, 0.0) + passed

    def warn(self, text: str) -> None:
        """Keep what a person should know of this step; said twice, it is shown once."""
        if text not in self._warnings:
            self._warnings.append(text)

    def warn_once(self, kind: str, text: str) -> None:
        """Say ``text`` unless something of its kind has been said since this process started."""
        if kind not in self._kinds_said:
            self._kinds_said.add(kind)
            self.warn(text)

    def warn_of_changes(self, notices: Mapping[str, str]) -> None:
        """Keep those of a step's ``notices`` (kind -> text) that the step before did not have."""
        for kind, text in notices.items():
            if kind not in self._noticed:
                self.warn(text)
        self._noticed = frozenset(notices)

    def take_warnings(self) -> tuple[str, ...]:
        """Return the warnings since the last call."""
        warnings, self._warnings = tuple(self._warnings), []
        return warnings

    def take_seconds(self) -> dict[str, float]:
        """Return the seconds of each station since the last call; what follows a record counts to the next one."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def share_of_prompts(self) -> list[int]:
        """Return this replica's places among the step's prompts: an equal part of every mini-batch.

        With 2 mini-batches of 4 prompts, replica 1 of 2 gets places 2, 3, 6, 7, so that a mini-batch holds the same
        prompts whatever the number of ranks.
        """
        per_update = self.recipe.prompts_per_step // self.recipe.batch.steps_per_generation
        per_replica = per_update // self.replica.num_replicas
        first = self.replica.number * per_replica
        return [
            update * per_update + first + place
            for update in range(self.recipe.batch.steps_per_generation)
            for place in range(per_replica)
        ]

    def own_prompts(self) -> list[int]:
        """Return the places of the prompts that this rank samples: its part of its replica's."""
        return self.share_of_prompts()[self.replica.own :: self.replica.size]

    def sampling(self) -> SamplingParams:
        """Return how training completions are sampled."""
        return recipe_sampling(self.recipe)

    @cached_property
    def stop_strings(self) -> StopStrings:
        """Texts that end a completion."""
        return StopStrings(strings=self.recipe.rollout.stop, tokenizer=self.inputs.tokenizer)

    @cached_property
    def num_known_ids(self) -> int:
        """Token ids from here on are unknown to the tokenizer."""
        return num_known_ids(self.inputs.tokenizer)

    def decode(self, completion: Completion) -> str:
        """Return what the model wrote, special tokens such as ``<think>`` included."""
        return completion_text(self.inputs.tokenizer, completion, stop=self.recipe.rollout.stop)

    def gather(self, value: Any) -> list[Any]:
        """Return the ``value`` of every rank, any plain object, in rank order; collective."""
        return self.ranks.gather(value)

    def merge(self, tally: Tally) -> dict[str, float]:
        """Return the metrics of ``tally`` over all ranks."""
        return Tally.merge(
            Tally.from_plain(part) for part in self.gather(tally.to_plain())
        ).finish()

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the policy's weights under their Hugging Face names; every rank iterates together."""
        return export_hf_weights(self.actor.modules)

    def give_weights(self) -> None:
        """Give the engine the policy's weights under the present policy version; collective.

        Raises:
            MoeReplayError: on every rank, when the engine of one of them does not take them.
        """
        weights, failure = self.export_weights(), None
        try:
            self.engine.load_weights(weights, policy_version=self.policy_version)
        except Exception as error:  # noqa: BLE001 - the seam: the engine may be the user's
            drain(weights, error)
            failure = error
        raise_together(failure, self.gather)

    def write_export(self) -> None:
        """Write the policy as a Hugging Face checkpoint that transformers loads; that of an earlier end goes only then.

        Raises:
            CheckpointError: when it cannot be written; the earlier export stays.
        """
        new = self.export_path.with_name(NEW_EXPORT)
        self._remove_export(new)
        try:
            save_hf_checkpoint(self.actor.modules, self.recipe.model.path, new)
        except CheckpointError as error:
            self._remove_export(new)
            raise CheckpointError(
                f"{error}. The checkpoint of step {self.step} is whole: free some space and start the same command again, "
                "which then only writes the export"
            ) from error
        if self.process.rank == 0:
            shutil.rmtree(self.export_path, ignore_errors=True)
            new.rename(self.export_path)
        self.ranks.barrier()

    def _remove_export(self, folder: Path) -> None:
        if self.process.rank == 0:
            for path in (folder, folder.with_name(f"{folder.name}.partial")):
                shutil.rmtree(path, ignore_errors=True)
        self.ranks.barrier()

    def position(self) -> RunPosition:
        """Return where the run stands."""
        return RunPosition(
            step=self.step,
            policy_version=self.policy_version,
            next_prompt=self.next_prompt,
            identity=self.identity,
            scheduler=self.actor.scheduler.state_dict(),
            evaluation_is_owed=self.evaluation_is_owed,
            guard=self.guard.to_plain() if self.guard is not None else {},
        )

    def resume_or_start(self, step: int | None, *, restart: bool) -> None:
        """Continue after the checkpoint of ``step``, or start at step 0 when it is None; every rank calls this.

        ``restart`` discards all checkpoints.
        """
        if restart and self.process.rank == 0:
            self.checkpoints.remove_all()
        if step is None:
            self.ranks.barrier()
            return
        self.reporter.station(step, "loading the checkpoint")
        position = self.checkpoints.load(self.actor, step)
        self.step, self.next_prompt = position.step, position.next_prompt
        self.saved_step, self.evaluation_is_owed = position.step, position.evaluation_is_owed
        self.policy_version = position.policy_version
        if self.guard is not None and position.guard:
            self.guard.restore(position.guard)
        self.give_weights()

    def _what_fits(self) -> list[str]:
        """Say how many sequences the engine's cache holds; a warning of the first step when they are too few."""
        if not isinstance(self.engine, HasCache):
            return []
        if shortage := self.engine.capacity.shortage():
            self.warn(shortage)
        return [self.engine.capacity.describe()]

    def _what_is_kept(self) -> list[str]:
        """Say how many completions are written down, where that is not all of them."""
        kept, sampled = self.recipe.logging.completions, self.recipe.samples_per_step
        if kept >= sampled:
            return []
        return [f"texts of {kept} of {sampled} completions a step are kept (logging.completions)"]

    def summary(self) -> RunSummary:
        """Return what is about to run, in words."""
        recipe, engine = self.recipe, self.engine.description
        num_parameters = sum(
            p.numel() for module in self.actor.modules for p in module.parameters()
        )
        passes = self.mode.passes
        replayed = passes.replayed_in
        if self.mode.replays:
            replayed = f"routes of {passes.recorded_by}, replayed in {replayed}"
        layers = len(self.actor.routers)
        return RunSummary(
            sections={
                "Model": [
                    f"{recipe.model.path}: {num_parameters / 1e6:.2f}M parameters, {layers} MoE layers, "
                    f"top-{engine.topk} of {engine.num_experts} experts",
                    f"trained in {recipe.model.dtype} on {self.device}",
                ],
                "Layout": [
                    f"{self.replica.num_replicas} data-parallel replica(s) of {self.replica.size} rank(s): "
                    f"{run_layout(recipe).describe()}"
                ],
                "Engine": [
                    f"{engine.name} {engine.version}, {engine.dtype}, context {engine.max_context_length}",
                    describe_drawing(recipe),
                    *describe_ends(recipe, self.inputs.tokenizer),
                    *self._what_fits(),
                ],
                "Data": data_lines(recipe, self.inputs),
                "Replay": [
                    f"router_replay_mode = {self.mode.value}: {replayed}",
                    "live: padding rows, the token sampled last, and rows that the engine left out",
                    f"guard {'on' if self.guard else 'off'}, min_coverage {self.min_coverage}",
                ],
                "Batch": [
                    f"{recipe.prompts_per_step} prompts x {recipe.rollout.num_generations} completions a step, "
                    f"{recipe.batch.steps_per_generation} update(s) of {recipe.batch.global_batch_size} samples",
                ],
                "Output": [
                    f"{self.directory} (every key of the recipe: recipe.toml)",
                    *self._what_is_kept(),
                    *self.notes,
                ],
            },
            first_step=self.step + 1,
            max_steps=recipe.run.max_steps,
        )
