"""The recipe: every option of a training run, typed, immutable and checked before anything heavy is loaded.

In: sections (see `load.load_recipe` for files and command lines). Out: `Recipe` and `ProcessSpec`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tomlkit
from pydantic import Field, model_validator

from moe_replay.errors import RecipeError
from moe_replay.recipe.bearer import without_secrets
from moe_replay.recipe.rules import GENERATED, effect_free_keys, rule_problems
from moe_replay.recipe.sections import (
    BatchSection,
    CheckpointSection,
    DataSection,
    EvalSection,
    GrpoSection,
    LoggingSection,
    MegatronSection,
    ModelSection,
    OptimizerSection,
    ReplaySection,
    RewardSection,
    RolloutSection,
    RunSection,
    Section,
)

_NO_EFFECT_ON_RESULTS = (
    "run.output_dir",
    "run.max_steps",
    "run.max_time",
    "data.cache_dir",
    "rollout.max_batch_size",
    "rollout.kv_cache_gib",
    "rollout.gpu_memory_utilization",
    "rollout.tensor_parallel_size",
    "rollout.urls",
    "rollout.token_file",
    "rollout.ca_file",
    "rollout.weights_dir",
    "rollout.path",
    "rollout.timeout_s",
    "rewards.timeout_s",
    "replay.min_coverage",
    "replay.guard",
    "replay.on_misaligned",
    "replay.max_dropped_frac",
    "replay.live_gap_every",
    "batch.max_tokens_per_microbatch",
    "batch.micro_batch_size",
    "megatron",
    "eval",
    "checkpoint",
    "logging",
)
_EFFECT_ON_RESULTS = ("megatron.moe_aux_loss_coeff",)
"""Keys that decide results although their section does not."""
_OF_EVALUATION = ("data.eval", "data.eval_size", "data.eval_seed", "data.eval_split", "data.task")
"""Keys that decide results only where training items are drawn that must not be among those held out."""
_PATH_KEYS = ("model.path", "data.train", "data.eval", "rewards.function")


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


class Recipe(Section):
    """A whole training run. Load one with `moe_replay.recipe.load.load_recipe`."""

    run: RunSection
    model: ModelSection
    data: DataSection
    rewards: Annotated[tuple[RewardSection, ...], Field(strict=False, min_length=1)]
    rollout: RolloutSection
    replay: ReplaySection = Field(default_factory=ReplaySection)
    batch: BatchSection
    grpo: GrpoSection = Field(default_factory=lambda: GrpoSection.model_validate({}))
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    megatron: MegatronSection = Field(default_factory=MegatronSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)

    @model_validator(mode="after")
    def _keep_the_rules_between_sections(self) -> Recipe:
        problems = rule_problems(dict(self))
        if problems:
            raise ValueError("; ".join(f"{problem.path}: {problem.text}" for problem in problems))
        return self

    @property
    def samples_per_step(self) -> int:
        """Completions sampled in a step, over all data-parallel ranks."""
        return self.batch.global_batch_size * self.batch.steps_per_generation

    @property
    def prompts_per_step(self) -> int:
        """Prompts sampled in a step, over all data-parallel ranks."""
        return self.samples_per_step // self.rollout.num_generations

    @property
    def max_sequence_length(self) -> int:
        """Most tokens of prompt and completion together."""
        return self.data.max_prompt_length + self.rollout.max_completion_length

    @property
    def replays(self) -> bool:
        """Whether any trainer pass replays routes."""
        return self.replay.router_replay_mode.replays

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel ranks among ``world_size`` processes.

        Raises:
            RecipeError: the processes cannot be divided into the layout of ``[megatron]``.
        """
        layout = self.megatron
        model_ranks = (
            layout.tensor_model_parallel_size
            * layout.pipeline_model_parallel_size
            * layout.context_parallel_size
        )
        if world_size % model_ranks:
            raise RecipeError(
                f"{world_size} processes were started, but [megatron] needs a multiple of {model_ranks} "
                "(tensor x pipeline x context parallel size): start another number or change the sizes"
            )
        return world_size // model_ranks

    def check_world(self, world_size: int) -> None:
        """Raise `RecipeError` unless the batch divides evenly among ``world_size`` processes."""
        ranks = self.data_parallel_size(world_size)
        prompts = self.batch.global_batch_size // self.rollout.num_generations
        problems = [
            f"{prompts} prompts per update (batch.global_batch_size / rollout.num_generations)"
        ] * bool(prompts % ranks)
        micro = self.batch.micro_batch_size
        if not problems and micro is not None and self.batch.global_batch_size % (ranks * micro):
            problems = [
                f"batch.global_batch_size = {self.batch.global_batch_size} samples in microbatches of {micro}"
            ]
        if problems:
            raise RecipeError(
                f"{problems[0]} cannot be shared evenly by {ranks} data-parallel ranks "
                f"(world size {world_size}): change the batch or the number of processes"
            )
        self._check_interleaving(ranks)

    def _check_interleaving(self, ranks: int) -> None:
        """Raise `RecipeError` unless a rank's samples make up whole rounds of the interleaved schedule, however long.

        With 6 samples and 4 stages, 5 microbatches would have to become 8: completions decide when that happens.
        """
        chunks = self.megatron.virtual_pipeline_model_parallel_size
        stages = self.megatron.pipeline_model_parallel_size
        samples = self.batch.global_batch_size // ranks
        if chunks is not None and samples % stages:
            step = math.lcm(self.rollout.num_generations, stages) * ranks
            raise RecipeError(
                f"batch.global_batch_size = {self.batch.global_batch_size} gives each of {ranks} data-parallel ranks "
                f"{samples} samples per update, expected a multiple of megatron.pipeline_model_parallel_size = {stages}: "
                "with virtual_pipeline_model_parallel_size Megatron-Core runs microbatches in rounds of that many, and "
                f"long completions need one microbatch each. Make global_batch_size a multiple of {step}, or remove "
                "virtual_pipeline_model_parallel_size"
            )

    def resolved_table(self) -> dict[str, Any]:
        """Every key that has an effect in this recipe, defaults filled in, as nested tables."""
        table = self.model_dump(mode="json", exclude_none=True)
        for path in effect_free_keys(dict(self)):
            section, key = path.split(".")
            table[section].pop(key, None)
        for reward in table["rewards"]:
            if not reward["args"]:
                del reward["args"]
        for key in ("task", "columns", "chat_template_kwargs"):
            if not table["data"].get(key):
                table["data"].pop(key, None)
        return {name: section for name, section in table.items() if section}

    def resolved_toml(self) -> str:
        """The recipe as TOML with absolute paths and all defaults; loading it gives an equal recipe.

        Keys without effect are left out, because a recipe that sets one is refused. Credentials in ``rollout.urls`` are
        masked, and have to be filled in again before such a text is a recipe.
        """
        table = self.resolved_table()
        if "urls" in table["rollout"]:
            table["rollout"]["urls"] = [without_secrets(url) for url in table["rollout"]["urls"]]
        return tomlkit.dumps(table)

    def fingerprint_items(self) -> dict[str, Any]:
        """Dotted key -> value of everything that decides the training results, rounding aside.

        Left out: the run directory, evaluation, checkpoints, logging, the watching of replay, and how a batch is
        split and laid out over processes. ``run.max_steps`` counts only where the learning rate depends on it. Of a
        path only the last part counts; `run_identity` puts digests of the contents in its place.
        """
        items: dict[str, Any] = {}
        for name, section in self.resolved_table().items():
            tables = enumerate(section) if isinstance(section, list) else [(None, section)]
            for number, table in tables:
                for key, value in table.items():
                    path = f"{name}.{key}" if number is None else f"{name}.{number}.{key}"
                    if f"{name}.{key}" in _PATH_KEYS:
                        value = Path(value).name
                    items[path] = value
        return {path: value for path, value in items.items() if self._decides_results(path)}

    def _decides_results(self, path: str) -> bool:
        path = re.sub(r"\.\d+\.", ".", path)
        if path == "run.max_steps":
            return self.optimizer.lr_scheduler != "constant"
        if path in _EFFECT_ON_RESULTS:
            return True
        if path in _OF_EVALUATION:
            return self.data.train.startswith(GENERATED)
        return (
            path not in _NO_EFFECT_ON_RESULTS
            and path.partition(".")[0] not in _NO_EFFECT_ON_RESULTS
        )
