"""Sections of what goes into a run and what comes out: data, rewards, evaluation, files."""

from __future__ import annotations

import re
from datetime import timedelta
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from moe_replay.recipe.sections.base import Dtype, Key, Section, Several, TomlPath
from moe_replay.recipe.sections.locations import GENERATED, anchored_dataset, anchored_function
from moe_replay.recipe.sections.mixture import MixtureSection
from moe_replay.recipe.sections.training import OptimizerSection

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(?=.)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


MAX_HELD_OUT = 1 << 22
"""Largest number of prompts of a held-out set: their request ids have that much room."""


def held_out_number(name: str) -> int:
    """Return the number of a held-out set, which follows from its name: of ``data.eval`` 0.

    Others have one from 1 to 2 ** 18 - 1, so that sets which come or go change nothing for them.
    """
    if not name:
        return 0
    return 1 + int.from_bytes(sha256(name.encode()).digest()[:8]) % ((1 << 18) - 1)


def seconds_of(text: str) -> float:
    """Return the seconds of a duration such as ``3h50m``.

    Raises:
        ValueError: when the text is not a duration, or is empty.
    """
    match = _DURATION.fullmatch(text)
    seconds = (
        sum(int(n) * unit for n, unit in zip(match.groups(), _UNITS.values(), strict=True) if n)
        if match
        else 0.0
    )
    if seconds <= 0:
        raise ValueError(
            "a duration above 0: a number of seconds, or days, hours, minutes and seconds as in "
            "'3h50m' or '1d12h'"
        )
    return seconds


def _as_duration(text: str) -> str:
    seconds_of(text)
    return text


def _rate_is_constant(optimizer: OptimizerSection) -> bool:
    return optimizer.lr_scheduler == "constant"


def _no_item_is_held_out(data: DataSection, mixture: tuple[MixtureSection, ...]) -> bool:
    """Return whether no generated item must stay out of training because it is held out."""
    trained = [data.train or "", *(entry.dataset for entry in mixture)]
    return not any(location.startswith(GENERATED) for location in trained)


class RunSection(Section):
    """``[run]``: where the run lives and how long it is."""

    output_dir: Annotated[TomlPath, Key(may_change=True, also_called=("output",))]
    """Run directory: checkpoints, metrics, completions. Starting again in it resumes."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling, of shuffling and of the trainer."""
    max_steps: Annotated[int, Key(may_change=_rate_is_constant, also_called=("steps",))] = Field(
        gt=0
    )
    """Steps to run; a step is one rollout batch and its ``batch.steps_per_generation`` optimizer
    updates."""
    max_time: Annotated[
        Annotated[str, AfterValidator(_as_duration)] | Annotated[float, Field(gt=0)] | None,
        Key(may_change=True),
    ] = None
    """Time after which the run saves and ends, to be resumed: seconds, or as ``3h50m``; no limit
    by default."""

    rank_timeout: Annotated[
        Annotated[str, AfterValidator(_as_duration)] | Annotated[float, Field(gt=0)],
        Key(may_change=True, also_called=("distributed_timeout", "nccl_timeout")),
    ] = "1d"
    """How long a rank waits for the others between two passes: for the slowest rollout, reward,
    reading or writing. A rank that ends is noticed at once; this ends the wait for one that
    hangs."""

    @property
    def wait_limit(self) -> timedelta:
        """``rank_timeout``."""
        given = self.rank_timeout
        return timedelta(seconds=seconds_of(given) if isinstance(given, str) else given)

    @property
    def max_seconds(self) -> float:
        """``max_time`` in seconds, counted from the start of the process."""
        assert self.max_time is not None
        return seconds_of(self.max_time) if isinstance(self.max_time, str) else self.max_time


class ModelSection(Section):
    """``[model]``: what is trained."""

    path: Annotated[TomlPath, Key(also_called=("model",))]
    """Directory of a Hugging Face checkpoint: config, safetensors and tokenizer."""
    dtype: Annotated[
        Literal["auto"] | Dtype, Key(default="bfloat16 on a GPU, float32 on a CPU")
    ] = "auto"
    """Number format of the trainer's parameters; bfloat16 keeps float32 main weights in the
    optimizer."""
    grouped_experts: bool = False
    """Run the experts of a layer as one grouped matrix product instead of one after the other."""


class DataSection(Section):
    """``[data]``: where prompts come from."""

    train: Annotated[str | None, Key(anchor=anchored_dataset, also_called=("dataset",))] = None
    """A ``.jsonl``, ``.json``, ``.parquet``, ``.csv`` or ``.arrow`` file, a folder of them,
    ``hf:ORG/NAME`` (read by the package ``datasets``), or ``reasoning_gym:<family>`` for endless
    generated items; needed unless there are ``[[mixture]]`` tables."""
    eval: Annotated[str | None, Key(anchor=anchored_dataset, may_change=_no_item_is_held_out)] = (
        None
    )
    """Held-out prompts, in the same forms as ``train``; nothing is evaluated without it."""
    prompt_column: str = "prompt"
    """Column, or dotted path such as ``extra_info.question``, with the prompt of a file dataset: a
    string, or a list of chat messages."""
    system_prompt: str | None = None
    """System message put before every chat that has none; needs a tokenizer with a chat
    template."""
    messages_column: str = "messages"
    """Column, or dotted path, with chat messages of a file dataset; used instead of
    ``prompt_column`` where a row has it."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names for columns, or for what lies in them: ``answer = "reward_model.ground_truth"`` gives
    rewards an ``answer``."""
    drop_columns: Several[str] = ()
    """Columns of a file dataset that neither prompts nor rewards get."""
    train_split: str = "train"
    """Split of ``train`` where that is a folder or a dataset of the hub."""
    eval_split: Annotated[str, Key(may_change=_no_item_is_held_out)] = "test"
    """Split of ``eval`` where that is a folder or a dataset of the hub."""
    hub_config: str | None = None
    """Configuration of a dataset of the hub that has several, such as ``main`` of
    ``hf:openai/gsm8k``."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the tokenizer's chat template, such as ``enable_thinking = false``; those in a
    column of this name win."""
    final_assistant_message: Literal["continue", "drop", "error"] = "continue"
    """What is done with a chat that ends with the assistant's message: the model continues it, it
    is dropped, or the run stops."""
    cache_dir: Annotated[TomlPath | None, Key(may_change=True)] = None
    """Folder for what is found out about datasets above 1 MiB, so that one process of a machine
    works for all; by default ``~/.cache/moe-replay``."""
    max_prompt_length: int = Field(default=512, gt=0)
    """Maximum prompt length in tokens, chat template included."""
    truncation: Literal["error", "delete", "left"] = "error"
    """What is done with a longer prompt: stop, omit it (counted), or drop tokens at its start."""
    shuffle: bool = True
    """Shuffle a file dataset again each epoch, by ``run.seed``."""
    train_seed: int = Field(default=1, ge=0)
    """Seed of the generated training items."""
    eval_seed: Annotated[int, Key(may_change=_no_item_is_held_out)] = Field(default=2, ge=0)
    """Seed of the generated held-out items."""
    eval_size: Annotated[int, Key(may_change=_no_item_is_held_out)] = Field(
        default=128, gt=0, le=MAX_HELD_OUT
    )
    """Held-out prompts: distinct generated items, or at most the first ones of a file."""
    task: Annotated[dict[str, Any], Key(may_change=_no_item_is_held_out)] = Field(
        default_factory=dict
    )
    """Configuration of the reasoning-gym family, such as ``max_terms``."""


class RewardSection(Section):
    """``[[rewards]]``: one reward function."""

    function: Annotated[str, Key(anchor=anchored_function, also_called=("reward",))]
    """``reasoning_gym``, ``exact_match``, ``math_verify``, ``format``, ``file.py:function``, or
    ``module:function`` of a module beside the recipe or an installed one."""
    weight: float = 1.0
    """Factor of its score in the reward."""
    name: Annotated[str, Key(default="the function's name")] = Field(
        default_factory=lambda reward: reward["function"].rpartition(":")[2], min_length=1
    )
    """Name in metrics; by default the function's own."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments passed on every call."""
    on_failure: Annotated[Literal["stop", "drop", "zero"], Key(may_change=True)] = "stop"
    """What happens where it raises, is late, ends its process or returns no number: the run stops,
    or the completions on which it fails are counted, and have no reward, so that they do not train
    (``drop``), or 0 from this function (``zero``)."""
    datasets: Several[str] = ()
    """Names of the sets of ``[[mixture]]`` and ``[[held_out]]`` whose completions it scores; it has
    no opinion on others. All by default."""
    num_workers: Annotated[int, Key(may_change=True, also_called=("num_processes",))] = Field(
        default=1, gt=0, le=256
    )
    """Processes of each rank that score completions by it at once, in parts that hold all
    completions of a prompt; 1 is the process that it shares with the other functions."""
    timeout_s: Annotated[float, Key(may_change=True)] = Field(default=1800.0, gt=0)
    """Longest time that one call may take, which scores all that a rank has sampled in a step, or
    one part of it; and its import."""


class HeldOutSection(Section):
    """``[[held_out]]``: one more set of held-out prompts, evaluated beside ``data.eval``."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name in metrics, which are ``eval/<name>/reward`` and so on."""
    dataset: Annotated[str, Key(anchor=anchored_dataset, may_change=_no_item_is_held_out)]
    """Its prompts, in the forms of ``data.train``; columns are named as ``[data]`` says."""
    split: Annotated[str, Key(may_change=_no_item_is_held_out)] = "test"
    """Split of ``dataset`` where that is a folder or a dataset of the hub."""
    size: Annotated[int, Key(may_change=_no_item_is_held_out)] = Field(
        default=128, gt=0, le=MAX_HELD_OUT
    )
    """Prompts: distinct generated items, or at most the first ones of a file."""
    seed: Annotated[int, Key(may_change=_no_item_is_held_out)] = Field(default=2, ge=0)
    """Seed of generated items."""
    task: Annotated[dict[str, Any], Key(may_change=_no_item_is_held_out)] = Field(
        default_factory=dict
    )
    """Configuration of the reasoning-gym family of generated items."""

    may_change: ClassVar[bool] = True


class EvalSection(Section):
    """``[eval]``: evaluation on ``data.eval`` and ``[[held_out]]``."""

    may_change: ClassVar[bool] = True

    every_steps: int = Field(default=0, ge=0)
    """Evaluate every so many steps; 0 only before and after."""
    temperature: float = Field(default=0.0, ge=0)
    """Softmax temperature; 0 takes the most likely token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many of the most likely tokens; 0 keeps all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens at least this many times as likely as the most likely one; 0 keeps all."""
    max_completion_length: Annotated[int | None, Key(default="rollout.max_completion_length")] = (
        Field(default=None, gt=0)
    )
    """Maximum number of sampled tokens; at most that of the rollout."""
    num_generations: Annotated[int, Key(also_called=("num_generations_eval", "val_n"))] = Field(
        default=1, gt=0
    )
    """Completions per held-out prompt."""
    pass_k: Several[Annotated[int, Field(gt=0)]] = ()
    """Report ``pass@k`` for these k: the chance that one of k completions passes, estimated
    without bias from all ``num_generations`` of a prompt."""
    pass_reward: str | None = None
    """Name of the reward function whose score decides what passes; by default the reward."""
    pass_threshold: float = 1.0
    """Score from which on a completion passes."""


class CheckpointSection(Section):
    """``[checkpoint]``: what is kept for resuming and for use."""

    may_change: ClassVar[bool] = True

    save_steps: Annotated[int | None, Key(default="as often as saving costs little")] = Field(
        default=None, gt=0
    )
    """Save every so many steps, and after the last. By default once 20 times as long has passed as
    the last one took, which is after every step where steps are that long, and after every step
    too while one takes at most 1 s."""
    save_total_limit: int = Field(default=2, gt=0)
    """Checkpoints kept."""
    export: bool = True
    """Write a Hugging Face checkpoint at the end."""
    export_every_save: Annotated[bool, Key(also_called=("save_safetensors",))] = False
    """Write one beside every checkpoint too, in ``export-step-<n>/``, for as long as that is
    kept."""
    metric_for_best_model: str | None = None
    """Metric of an evaluation, such as ``eval/reward``: the checkpoint of the evaluation where it
    was best stays beside the newest ones, and its model in ``export-best/``."""
    greater_is_better: bool = True
    """Whether a higher value of that metric is better."""
    asynchronous: bool = False
    """Write checkpoints while the next steps run, from a copy in host memory that each rank makes
    of its part; a failure stops the run after the step in which it is noticed."""


class LoggingSection(Section):
    """``[logging]``: sinks besides the console and the files of the run directory."""

    may_change: ClassVar[bool] = True

    sinks: Annotated[
        Several[Literal["tensorboard", "wandb", "trackio"]], Key(also_called=("report_to",))
    ] = ()
    """Names of sinks."""
    completions: int = Field(default=1024, ge=0)
    """Completions of each step, and of each evaluation, whose texts are kept: the first ones,
    prompt after prompt."""
    num_with_tokens: int = Field(default=8, ge=0)
    """Completions of each step that are kept with every token, its log-probability by engine and
    trainer, and its flips: half of them those that the guard dropped or whose routes agree least,
    the others the first; wherever they stand, so that a few more than ``completions`` may be kept.
    With ``completions = 0`` none is. Takes some 40 bytes a token."""
