"""The recipe: every option of a training run, typed, immutable and checked before anything loads.

Load one with `load.load_recipe`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import Field, SerializeAsAny, TypeAdapter
from pydantic.fields import FieldInfo

from moe_replay.errors import RecipeError, UnsupportedError
from moe_replay.recipe.bearer import without_secrets
from moe_replay.recipe.rule import Problem
from moe_replay.recipe.rules import effect_free_keys, rule_problems
from moe_replay.recipe.sections.base import Section, is_path, key_of, sections_for
from moe_replay.recipe.sections.environment import EnvironmentSection
from moe_replay.recipe.sections.lora import LoraSection
from moe_replay.recipe.sections.mixture import CurriculumSection, MixtureSection
from moe_replay.recipe.sections.rollout import RolloutSection
from moe_replay.recipe.sections.run import (
    CheckpointSection,
    DataSection,
    EvalSection,
    HeldOutSection,
    LoggingSection,
    ModelSection,
    RewardSection,
    RunSection,
)
from moe_replay.recipe.sections.training import (
    BatchSection,
    GrpoSection,
    MegatronSection,
    OptimizerSection,
    ReplaySection,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """Which process of the run this one is; read from the environment by the command line only."""

    rank: int = 0
    """Rank among all processes, from 0."""
    world_size: int = 1
    """Processes of the run."""
    local_rank: int = 0
    """Rank among the processes of this machine: the index of its GPU."""
    launched_by_torchrun: bool = False
    """Whether torchrun started it, so that a rendezvous address is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """A dataset to train on, wherever in the recipe it stands."""

    key: str
    """Dotted key of its dataset."""
    name: str
    """Name in metrics; empty for ``data.train``."""
    dataset: str
    """A file, a folder, or one that is generated or of the hub."""
    split: str
    """Split of a folder or of a dataset of the hub."""
    seed: int
    """Seed of generated items."""
    task: Mapping[str, Any]
    """Configuration of the family of generated items."""
    weight: float = 1.0
    """How often it is drawn from, in proportion to the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutSet:
    """A set of held-out prompts, wherever in the recipe it stands."""

    key: str
    """Dotted key of its dataset."""
    name: str
    """Name in metrics; empty for ``data.eval``."""
    dataset: str
    """A file, a folder, or one that is generated or of the hub."""
    split: str
    """Split of a folder or of a dataset of the hub."""
    size: int
    """Prompts, at most."""
    seed: int
    """Seed of generated items."""
    task: Mapping[str, Any]
    """Configuration of the family of generated items."""

    @staticmethod
    def of_data(data: DataSection, dataset: str) -> HeldOutSet:
        """Return the set of ``data.eval``."""
        return HeldOutSet(
            key="data.eval",
            name="",
            dataset=dataset,
            split=data.eval_split,
            size=data.eval_size,
            seed=data.eval_seed,
            task=data.task,
        )


class Recipe(Section):
    """A whole training run. Load one with `moe_replay.recipe.load.load_recipe`."""

    run: RunSection
    model: ModelSection
    data: DataSection
    mixture: Annotated[tuple[MixtureSection, ...], Field(strict=False)] = ()
    curriculum: CurriculumSection | None = None
    rewards: Annotated[tuple[RewardSection, ...], Field(strict=False)] = ()
    environment: EnvironmentSection | None = None
    rollout: SerializeAsAny[RolloutSection]
    replay: ReplaySection = Field(default_factory=ReplaySection)
    batch: BatchSection
    grpo: GrpoSection = Field(default_factory=GrpoSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    megatron: MegatronSection = Field(default_factory=MegatronSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    held_out: Annotated[tuple[HeldOutSection, ...], Field(strict=False)] = ()
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)

    @property
    def samples_per_step(self) -> int:
        """Completions sampled in a step, over all data-parallel ranks."""
        return self.batch.global_batch_size * self.batch.steps_per_generation

    @property
    def prompts_per_step(self) -> int:
        """Prompts sampled in a step, over all data-parallel ranks."""
        return self.samples_per_step // self.rollout.num_generations

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the run."""
        return self.run.max_steps * self.batch.steps_per_generation

    @property
    def max_sequence_length(self) -> int:
        """Maximum number of tokens of prompt and completion together."""
        return self.data.max_prompt_length + self.rollout.max_completion_length

    @property
    def training_sets(self) -> tuple[TrainingSet, ...]:
        """The datasets to train on: ``data.train``, without a name, or ``[[mixture]]``."""
        data = self.data
        if data.train is not None:
            own = TrainingSet(
                key="data.train",
                name="",
                dataset=data.train,
                split=data.train_split,
                seed=data.train_seed,
                task=data.task,
            )
            return (own,)
        return tuple(
            TrainingSet(key=f"mixture.{number}.dataset", **dict(entry))
            for number, entry in enumerate(self.mixture)
        )

    def step_of(self, position: int) -> int:
        """Return the step (from 1) that trains on a prompt, where each takes equally many."""
        return position // self.prompts_per_step + 1

    @property
    def held_out_sets(self) -> tuple[HeldOutSet, ...]:
        """The sets of held-out prompts: ``data.eval``, without a name, and ``[[held_out]]``."""
        data = self.data
        first = () if data.eval is None else (HeldOutSet.of_data(data, data.eval),)
        return first + tuple(
            HeldOutSet(
                key=f"held_out.{number}.dataset",
                name=entry.name,
                dataset=entry.dataset,
                split=entry.split,
                size=entry.size,
                seed=entry.seed,
                task=entry.task,
            )
            for number, entry in enumerate(self.held_out)
        )

    @property
    def replays(self) -> bool:
        """Whether any trainer pass replays routes."""
        return self.replay.router_replay_mode.replays

    @property
    def why_old_pass(self) -> str | None:
        """Why old log-probabilities take a pass of their own; None where the update gives them."""
        return self.batch.why_old_pass(self.replay.router_replay_mode) or self.grpo.why_old_pass

    def on_device(self, device: Literal["cpu", "cuda"]) -> Recipe:
        """Return the recipe with every ``auto`` decided for the kind of device that trains.

        Example: ``model.dtype`` becomes bfloat16 on CUDA and float32 on a CPU. What a recipe sets
        stays.

        Raises:
            RecipeError: what a value became does not go with another key.
        """
        on_cuda = device == "cuda"
        decided: dict[str, Section] = {}
        if self.model.dtype == "auto":
            dtype = "bfloat16" if on_cuda else "float32"
            decided["model"] = self.model.model_copy(update={"dtype": dtype})
        if self.megatron.offload_during_rollout == "auto":
            level = "optimizer" if on_cuda and self.rollout.shares_device else "none"
            update = {"offload_during_rollout": level}
            decided["megatron"] = self.megatron.model_copy(update=update)
        recipe = self.model_copy(update=decided)
        if decided and (problems := rule_problems(dict(recipe))):
            raise problems_error(problems, f"recipe, on {'CUDA' if on_cuda else 'a CPU'},")
        return recipe

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel ranks among ``world_size`` processes.

        Raises:
            RecipeError: the processes cannot be divided into the layout of ``[megatron]``.
        """
        model_ranks = self.megatron.model_parallel_size
        if world_size % model_ranks:
            raise RecipeError(
                f"{world_size} processes were started, but [megatron] needs a multiple of "
                f"{model_ranks} (tensor x pipeline x context parallel size): start that many, or "
                "change the sizes"
            )
        return world_size // model_ranks

    def check_world(self, world_size: int) -> None:
        """Raise `RecipeError` unless the batch divides evenly among ``world_size`` processes."""
        ranks = self.data_parallel_size(world_size)
        prompts = self.batch.global_batch_size // self.rollout.num_generations
        micro = self.batch.micro_batch_size
        uneven = None
        if prompts % ranks:
            uneven = (
                f"{prompts} prompts per update (batch.global_batch_size / rollout.num_generations)"
            )
        elif micro is not None and self.batch.global_batch_size % (ranks * micro):
            uneven = (
                f"batch.global_batch_size = {self.batch.global_batch_size} samples in microbatches "
                f"of {micro}"
            )
        if uneven is not None:
            raise RecipeError(
                f"{uneven} cannot be shared evenly by {ranks} data-parallel ranks "
                f"(world size {world_size}): change the batch or the number of processes"
            )

    def resolved_table(self) -> dict[str, Any]:
        """Every key that has an effect in this recipe, defaults filled in, as nested tables."""
        table = self.model_dump(mode="json", exclude_none=True)
        for path in effect_free_keys(dict(self)):
            *owner, key = path.split(".")
            _at(table, owner).pop(key, None)
        for path, _, _, entry in self._keys(table):
            if entry[_leaf(path)] == {}:
                del entry[_leaf(path)]
        return {name: section for name, section in table.items() if section}

    def resolved_toml(self) -> str:
        """The recipe as TOML with absolute paths and defaults; loading it gives an equal recipe.

        Keys without effect are omitted, because a recipe that sets one is refused. Credentials are
        masked, and have to be filled in again before such a text is a recipe.
        """
        table = self.resolved_table()
        for path, _, field, entry in self._keys(table):
            if key_of(field).holds_secrets:
                entry[_leaf(path)] = [without_secrets(text) for text in entry[_leaf(path)]]
        return tomlkit.dumps(table)

    def fingerprint_items(self) -> dict[str, Any]:
        """Dotted key -> value of everything that decides the training results, rounding aside.

        Keys whose `Key.may_change` allows it are omitted, and so are names in a table that
        `Key.may_change_inside` lists. Of a path only the last part counts; `run_identity` puts
        digests of the contents in its place.
        """
        items = {}
        for path, section, field, entry in self._keys(self.resolved_table()):
            if self._may_change(section, field):
                continue
            value = entry[_leaf(path)]
            if allowed := key_of(field).may_change_inside:
                items |= {f"{path}.{name}": value[name] for name in sorted(value.keys() - allowed)}
            else:
                items[path] = _last_parts(value) if is_path(field) else value
        return items

    def fingerprint_defaults(self) -> dict[str, Any]:
        """Dotted key -> its default, for those of `fingerprint_items` that have one.

        A run of an earlier revision, which did not know a key, trained as its default does.
        """
        defaults = {}
        for path, _, field, entry in self._keys(self.resolved_table()):
            if not field.is_required():
                own = field.get_default(call_default_factory=True, validated_data=entry)
                plain = TypeAdapter(Any).dump_python(own, mode="json")
                defaults[path] = _last_parts(plain) if is_path(field) and plain else plain
        return defaults

    def _keys(
        self, table: dict[str, Any]
    ) -> Iterator[tuple[str, Section, FieldInfo, dict[str, Any]]]:
        """Yield (dotted key, its section, its definition, the table with its value) of a dump."""
        for name, part in table.items():
            section = getattr(self, name)
            if isinstance(section, Section):
                entries = [(name, section, part)]
            else:
                entries = [(f"{name}.{n}", each, part[n]) for n, each in enumerate(section)]
            for prefix, each, entry in entries:
                for key in list(entry):
                    yield f"{prefix}.{key}", each, type(each).model_fields[key], entry

    def _may_change(self, section: Section, field: FieldInfo) -> bool:
        """Return whether a run resumes with another value of a key."""
        allowed = key_of(field).may_change
        if not callable(allowed):
            return section.may_change if allowed is None else allowed
        needed = sections_for(allowed, dict(self))
        assert needed is not None
        return allowed(**needed)


def _at(table: Any, path: Sequence[str]) -> Any:
    """Return what lies at a path of keys and, in lists, of indices."""
    for part in path:
        table = table[int(part)] if isinstance(table, list) else table[part]
    return table


def _last_parts(paths: str | list[str]) -> str | list[str]:
    """Return the last part of a path, or of each of several."""
    return Path(paths).name if isinstance(paths, str) else [Path(path).name for path in paths]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def problems_error(problems: Sequence[Problem], where: str) -> RecipeError:
    """Return one error that names all problems of a recipe, of which there is at least one.

    It is an `UnsupportedError` if each of them only cannot be honoured.
    """
    lines = [f"  {problem.path}: {problem.text}" for problem in problems]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    message = without_secrets("\n".join([f"{where} has {count}:", *lines]))
    if all(problem.is_unsupported for problem in problems):
        return UnsupportedError(message)
    return RecipeError(message)
