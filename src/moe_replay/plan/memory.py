"""The phases of a step on the fullest rank: who holds how many bytes in each, and whether they fit.

In: a recipe, the shape of its model, a machine. Out: MemoryPlan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.families.family import ModelShape
from moe_replay.megatron.model import transformer_config
from moe_replay.megatron.stages import stage_layers
from moe_replay.plan.host import HostBytes, gives_back, host_bytes
from moe_replay.plan.machine import Machine
from moe_replay.plan.rollout import EngineBytes, engine_bytes
from moe_replay.plan.trainer.candidates import candidate_bytes, most_candidates
from moe_replay.plan.trainer.kernels import GPU, GPU_LOCAL, Kernels
from moe_replay.plan.trainer.settings import Settings, settings_of
from moe_replay.plan.trainer.training import Resident, TrainerBytes, trainer_bytes
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.rollout import ServersEngineSection, VllmEngineSection

UNMODELLED_FRAC = 0.1
"""Added to all but parameters: three published peaks lie 5 to 16 % above the formulas."""
TIGHT_FRAC = 0.1
"""Less of the usable bytes left over is too little to rely on."""
EXACT = frozenset({"weights", "reference", "gradients", "optimizer", "engine weights", "cache"})
"""Parts that are sums of parameters, or are given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of a step, on the rank that needs most in it."""

    name: str
    """Which."""
    stage: int
    """Pipeline stage of that rank."""
    parts: Mapping[str, float]
    """What -> bytes; those that are 0 are omitted."""

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of a step."""

    phases: tuple[Phase, ...]
    """In their order."""
    usable: float
    """Bytes of a GPU that a plan fills."""
    host: HostBytes
    """Of the host memory of the fullest node."""
    usable_host: float
    """Bytes of it that there are."""
    engine: EngineBytes | None
    """The engine; None where nothing samples or its GPUs are unknown."""
    settings: Settings
    """What of the recipe decided."""
    kernels: Kernels
    """What the layers run on."""
    stages: Sequence[Sequence[int]]
    """Decoder layers of each pipeline stage."""
    trainer: Sequence[TrainerBytes]
    """The trainer alone, a stage each."""

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def headroom(self) -> float:
        """Usable bytes that the fullest phase leaves; negative where it does not fit."""
        return self.usable - self.peak.total

    @property
    def tight(self) -> Phase | None:
        """The fullest phase of the trainer, if it leaves less than `TIGHT_FRAC`.

        While an engine samples its cache takes what it is given, so little room says nothing.
        """
        fullest = max(
            (phase for phase in self.phases if "cache" not in phase.parts),
            key=lambda phase: phase.total,
        )
        return fullest if self.usable - fullest.total < TIGHT_FRAC * self.usable else None

    @property
    def short(self) -> list[str]:
        """What does not fit, in words; empty if all does."""
        found = [
            f"{phase.name}: {gb(phase.total)} GB of {gb(self.usable)}"
            for phase in self.phases
            if phase.total > self.usable
        ]
        if self.host.total > self.usable_host:
            found.append(
                f"host memory of a node: {gb(self.host.total)} GB of {gb(self.usable_host)}, "
                f"{gb(self.host.save)} of them while a checkpoint is saved"
            )
        engine = self.engine
        if engine is not None and engine.sequences(self.settings.max_sequence_length) < 1:
            found.append(
                f"the engine's cache: {gb(engine.cache)} GB hold no sequence of "
                f"{self.settings.max_sequence_length} tokens"
            )
        return found

    @property
    def fits(self) -> bool:
        """Whether everything does."""
        return not self.short


def gb(num_bytes: float) -> str:
    """Return bytes as GB (10^9) with one decimal."""
    return f"{num_bytes / 1e9:.1f}"


def plan_memory(
    recipe: Recipe, shape: ModelShape, machine: Machine, kernels: Kernels | None = None
) -> MemoryPlan:
    """Compute the bytes of every phase of a step; ``kernels`` are those that the recipe runs on.

    Raises:
        UnsupportedError: the model cannot be cut like that.
        RecipeError: the batch, or the ranks, do not divide.
    """
    recipe = recipe.on_device("cuda")
    # Adapters stand beside Megatron-Core's own layers.
    kernels = kernels or (GPU_LOCAL if recipe.lora.is_on else GPU)
    stages = check_layout(recipe, shape, machine)
    settings = settings_of(recipe, machine.num_gpus)
    trainer = trainer_bytes(shape, settings, stages, kernels)
    engine = engine_bytes(
        shape,
        recipe.rollout,
        gpu_bytes=(machine.servers or machine).gpu_gb * 1e9,
        max_sequence_length=recipe.max_sequence_length,
        server_ranks=_server_ranks(recipe, machine),
    )
    bound = most_candidates(recipe.rollout, shape.vocab_size)
    per_stage = [
        _phases(recipe, settings, found, engine, kernels, bound * (found is trainer[-1]))
        for found in trainer
    ]
    phases = tuple(
        max(same, key=lambda phase: phase.total) for same in zip(*per_stage, strict=True)
    )
    return MemoryPlan(
        phases=phases,
        usable=machine.usable_bytes,
        host=host_bytes(recipe, settings, trainer, 0.0 if engine is None else engine.host, machine),
        usable_host=machine.rates.host_gb * 1e9,
        engine=engine,
        settings=settings,
        kernels=kernels,
        stages=stages,
        trainer=trainer,
    )


def check_layout(recipe: Recipe, shape: ModelShape, machine: Machine) -> Sequence[Sequence[int]]:
    """Return the decoder layers of each stage, or refuse what cannot be cut like that."""
    layout, num_ranks = recipe.megatron, machine.num_gpus
    needed = math.lcm(layout.model_parallel_size, layout.expert_parallel_size)
    if num_ranks % needed:
        raise UnsupportedError(
            f"{num_ranks} GPUs, expected a multiple of {needed}: [megatron] has "
            f"{layout.describe()}, so a copy of the dense layers takes "
            f"{layout.model_parallel_size} ranks and one of the experts "
            f"{layout.expert_parallel_size}; change the sizes, or the number of GPUs"
        )
    recipe.check_world(num_ranks)
    # Options that need a GPU, or Transformer Engine, decide no stage.
    stages = stage_layers(transformer_config(shape, layout))
    rollout = recipe.rollout
    if isinstance(rollout, VllmEngineSection):
        ranks = rollout.tensor_parallel_size
        if num_ranks % ranks or machine.gpus_per_node % ranks:
            raise UnsupportedError(
                f"rollout.tensor_parallel_size = {ranks} on {machine.describe()}: one engine takes "
                "that many ranks of a node; choose a divisor of both"
            )
        if shape.num_attention_heads % ranks:
            raise UnsupportedError(
                f"rollout.tensor_parallel_size = {ranks}, but the model has "
                f"{shape.num_attention_heads} attention heads; choose a divisor"
            )
    return stages


def _server_ranks(recipe: Recipe, machine: Machine) -> int | None:
    if not isinstance(recipe.rollout, ServersEngineSection) or machine.servers is None:
        return None
    ranks, left = divmod(machine.servers.num_gpus, len(recipe.rollout.urls))
    if left or not ranks:
        raise UnsupportedError(
            f"{machine.servers.num_gpus} GPUs of servers for the {len(recipe.rollout.urls)} "
            "addresses of rollout.urls, expected equally many for each"
        )
    return ranks


def _phases(
    recipe: Recipe,
    settings: Settings,
    found: TrainerBytes,
    engine: EngineBytes | None,
    kernels: Kernels,
    num_candidates: int,
) -> list[Phase]:
    """Return the phases on a rank of one stage, whether or not it is the fullest one.

    ``num_candidates`` are those of a token there.
    """
    held, given = found.resident, gives_back(recipe)
    # What was given back comes when it is needed: the optimizer's state for its step alone, unless
    # an earlier update of the same step has brought it.
    all_of_it = parts_of(held)
    learning = all_of_it
    if given >= 2 and recipe.batch.steps_per_generation == 1:
        learning = all_of_it | {"optimizer": 0.0}
    scoring = {name: part for name, part in learning.items() if given < 1 or name != "gradients"}
    if given >= 2:
        scoring = scoring | {"optimizer": 0.0}
    engine_here = engine is not None and engine.shares_gpu
    asleep = {"engine weights": engine.stays} if engine is not None and engine_here else {}
    other = {"CUDA, NCCL": float(kernels.other_bytes)}
    phases: list[Phase] = []

    def add(name: str, *parts: Mapping[str, float]) -> None:
        every: dict[str, float] = {}
        for some in (*parts, other):
            for what, size in some.items():
                every[what] = every.get(what, 0.0) + size
        unsure = sum(size for what, size in every.items() if what not in EXACT)
        every["unmodelled"] = UNMODELLED_FRAC * unsure
        kept = {what: size for what, size in every.items() if size}
        phases.append(Phase(name=name, stage=found.stage, parts=kept))

    if engine is not None and engine_here:
        remains = parts_of(held, given)
        add(
            "rollout",
            remains,
            {"engine weights": engine.weights, "cache": engine.cache, "engine work": engine.work},
        )
    scored, passed = _passing(found.scoring), _passing(found.update)
    if num_candidates:
        tokens = settings.scoring_tokens
        scored |= {"candidates": candidate_bytes(settings, num_candidates, tokens)}
        passed |= {"candidates": candidate_bytes(settings, num_candidates)}
    if recipe.why_old_pass is not None:
        add("old log-probabilities", scoring, asleep, scored)
    if settings.has_reference:
        add("reference log-probabilities", scoring, asleep, scored)
    add("update", learning, asleep, passed)
    add("optimizer step", all_of_it, asleep)
    pushed = parts_of(held, min(given, 2)) | {"push": 2 * found.largest_push}
    if engine is not None and engine_here:
        pushed = pushed | {"engine weights": engine.weights}
    add("push", pushed)
    return phases


def parts_of(held: Resident, given: int = 0) -> dict[str, float]:
    """Return what a rank holds, without what it has given back."""
    return {
        "weights": held.weights if given < 3 else 0.0,
        "reference": held.reference if given < 3 else 0.0,
        "gradients": held.gradients if given < 1 else 0.0,
        "optimizer": held.optimizer if given < 2 else 0.0,
    }


def _passing(passing: object) -> dict[str, float]:
    return {name: getattr(passing, name) for name in ("activations", "logits", "routes")}
