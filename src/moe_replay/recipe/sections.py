"""The sections of a recipe: every key with its type, its default, its range and what it does.

In: tables. Out: one frozen model per section.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from moe_replay.routing import ReplayMode

Dtype = Literal["float32", "bfloat16"]


_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(?=.)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


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
            "a duration above 0: a number of seconds, or days, hours, minutes and seconds as in '3h50m' or '1d12h'"
        )
    return seconds


def _as_duration(text: str) -> str:
    seconds_of(text)
    return text


class Section(BaseModel):
    """Base of every table of a recipe: frozen, strict types (an integer may stand for a float), no unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _take_one_value_for_a_list(cls, table: Any) -> Any:
        """Take ``sinks = "wandb"`` for ``sinks = ["wandb"]``."""
        if not isinstance(table, dict):
            return table
        fields = cls.model_fields
        return {
            key: (value,)
            if key in fields and is_list(fields[key].annotation) and _is_single(value)
            else value
            for key, value in table.items()
        }


def is_list(annotation: Any) -> bool:
    """Tell whether a type is a list of values, optional ones included."""
    return get_origin(annotation) is tuple or any(map(is_list, get_args(annotation)))


def _is_single(value: Any) -> bool:
    return not isinstance(value, list | tuple | dict) and value is not None


class RunSection(Section):
    """``[run]``: where the run lives and how long it is."""

    output_dir: Annotated[Path, Field(strict=False)]
    """Run directory: checkpoints, metrics, completions. Starting again in it resumes."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling, of shuffling and of the trainer."""
    max_steps: int = Field(gt=0)
    """Steps to run; a step is one rollout batch and its ``batch.steps_per_generation`` optimizer updates."""
    max_time: (
        Annotated[str, AfterValidator(_as_duration)] | Annotated[float, Field(gt=0)] | None
    ) = None
    """Time after which the run saves and ends, to be resumed: seconds, or as ``3h50m``; no limit when left out."""

    @property
    def max_seconds(self) -> float:
        """``max_time`` in seconds, counted from the start of the process."""
        assert self.max_time is not None
        return seconds_of(self.max_time) if isinstance(self.max_time, str) else self.max_time


class ModelSection(Section):
    """``[model]``: what is trained."""

    path: Annotated[Path, Field(strict=False)]
    """Directory of a Hugging Face checkpoint: config, safetensors and tokenizer."""
    dtype: Dtype = "float32"
    """Number format of the trainer's parameters; bfloat16 keeps float32 main weights in the optimizer."""
    grouped_experts: bool = False
    """Run the experts of a layer as one grouped matrix product instead of one after the other."""


class DataSection(Section):
    """``[data]``: where prompts come from."""

    train: str
    """A ``.jsonl``, ``.json``, ``.parquet``, ``.csv`` or ``.arrow`` file, a folder of them, ``hf:ORG/NAME`` (read by the package ``datasets``), or ``reasoning_gym:<family>`` for endless generated items."""
    eval: str | None = None
    """Held-out prompts, in the same forms as ``train``; nothing is evaluated without it."""
    prompt_column: str = "prompt"
    """Column, or dotted path such as ``extra_info.question``, with the prompt of a file dataset: a string, or a list of chat messages."""
    system_prompt: str | None = None
    """System message put before every chat that has none; needs a tokenizer with a chat template."""
    messages_column: str = "messages"
    """Column, or dotted path, with chat messages of a file dataset; used instead of ``prompt_column`` where a row has it."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names for columns, or for what lies in them: ``answer = "reward_model.ground_truth"`` gives rewards an ``answer``."""
    drop_columns: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Columns of a file dataset that neither prompts nor rewards get."""
    train_split: str = "train"
    """Split of ``train`` where that is a folder or a dataset of the hub."""
    eval_split: str = "test"
    """Split of ``eval`` where that is a folder or a dataset of the hub."""
    hub_config: str | None = None
    """Configuration of a dataset of the hub that has several, such as ``main`` of ``hf:openai/gsm8k``."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the tokenizer's chat template, such as ``enable_thinking = false``; those in a column of this name win."""
    final_assistant_message: Literal["continue", "drop", "error"] = "continue"
    """What is done with a chat that ends with the assistant's message: the model continues it, it is dropped, or the run stops."""
    cache_dir: Annotated[Path, Field(strict=False)] | None = None
    """Folder for what is found out about datasets above 1 MiB, so that one process of a machine works for all; ``~/.cache/moe-replay`` when left out."""
    max_prompt_length: int = Field(default=512, gt=0)
    """Maximum prompt length in tokens, chat template included."""
    truncation: Literal["error", "delete", "left"] = "error"
    """What is done with a longer prompt: stop, leave it out (counted), or drop tokens at its start."""
    shuffle: bool = True
    """Shuffle a file dataset again each epoch, by ``run.seed``."""
    train_seed: int = Field(default=1, ge=0)
    """Seed of the generated training items."""
    eval_seed: int = Field(default=2, ge=0)
    """Seed of the generated held-out items."""
    eval_size: int = Field(default=128, gt=0)
    """Held-out prompts: distinct generated items, or at most the first ones of a file."""
    task: dict[str, Any] = Field(default_factory=dict)
    """Configuration of the reasoning-gym family, such as ``max_terms``."""


class RewardSection(Section):
    """``[[rewards]]``: one reward function."""

    function: str
    """``reasoning_gym``, ``exact_match``, ``math_verify``, ``format``, ``file.py:function``, or ``module:function`` of a module beside the recipe or an installed one."""
    weight: float = 1.0
    """Factor of its score in the reward."""
    name: str = Field(min_length=1)
    """Name in metrics; by default the function's own."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments passed on every call."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Longest time that one call, which scores all that a rank has sampled in a step, or its import may take."""

    @model_validator(mode="before")
    @classmethod
    def _take_name_from_function(cls, table: Any) -> Any:
        if (
            isinstance(table, dict)
            and "name" not in table
            and isinstance(table.get("function"), str)
        ):
            return {**table, "name": table["function"].rpartition(":")[2]}
        return table


class RolloutSection(Section):
    """``[rollout]``: how completions are sampled."""

    engine: Literal["embedded", "vllm", "vllm-server", "sglang-server", "files"] = "embedded"
    """``embedded`` (transformers) or ``vllm`` in the trainer's process, ``vllm-server`` (see ``moe-replay serve``), ``sglang-server``, or ``files`` that were sampled before (see ``moe-replay rollout``)."""
    urls: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Addresses of the servers of ``vllm-server`` or ``sglang-server``, such as ``http://127.0.0.1:8000``."""
    token_file: Annotated[Path, Field(strict=False)] | None = None
    """File with the bearer token of the servers."""
    ca_file: Annotated[Path, Field(strict=False)] | None = None
    """PEM file with the certificates that servers behind ``https://`` are trusted by, instead of the public authorities."""
    weights_dir: Annotated[Path, Field(strict=False)] = Path("/dev/shm")
    """Folder that trainer and servers share, in memory if possible: servers that are not ours read pushed weights there."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Longest silence of a server, in seconds, after which its requests are tried elsewhere. Answers may take any time."""
    path: Annotated[Path, Field(strict=False)] | None = None
    """Folder, or manifest in it, that ``files`` are read from."""
    allow_stale: bool = False
    """Take ``files`` of another policy version than the trainer's."""
    dtype: Dtype = "bfloat16"
    """Number format of the engine's weights; a server that was started with another is refused."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = Field(default=0, ge=0)
    """Most likely tokens kept; 0 keeps all."""
    max_completion_length: int = Field(gt=0)
    """Most tokens sampled per completion, the end token included."""
    stop_token_ids: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = ()
    """Tokens that end a completion, besides those that the checkpoint's configs, tokenizer and chat template name."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)] = ()
    """Texts that end a completion, with the token that completes them: ``["</answer>"]``. What an engine sampled beyond is cut off."""
    num_generations: int = Field(default=8, ge=2)
    """Completions per prompt, compared with each other."""
    max_batch_size: int = Field(default=64, gt=0)
    """Sequences sampled at once; each server's share out among the ranks, a group at least for each."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory of vLLM's key-value cache on each rank, in GiB; left out, vLLM's own choice on a GPU, and 1 on a CPU."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes while it samples, weights included; left out, vLLM's own 0.92."""
    tensor_parallel_size: int = Field(default=1, gt=0)
    """Consecutive ranks of the trainer that hold one vLLM together, each a shard of its weights."""


class ReplaySection(Section):
    """``[replay]``: whose expert choice the trainer uses, and how closely that is watched."""

    router_replay_mode: Annotated[ReplayMode, Field(strict=False)] = ReplayMode.R3
    """``disabled``, ``R2`` (routes of the trainer's old-logprob pass) or ``R3`` (routes of the engine)."""
    min_coverage: float = Field(default=0.95, ge=0, le=1)
    """Least fraction of replayable rows, of completions that train, that must be replayed; the run stops below it."""
    guard: bool = True
    """Compare replayed with live routes of every row in each step, and act when those of a sample are not its own."""
    on_misaligned: Literal["stop", "drop"] = "stop"
    """What to do with a sample whose engine routes are not its own (R3): stop the run, or train without it and count it."""
    max_dropped_frac: float = Field(default=0.05, ge=0, lt=1)
    """With ``on_misaligned = "drop"``: a step that would drop a larger fraction of its samples stops the run."""
    reference_routes: Literal["live", "replay"] = "replay"
    """Routing of the reference model: the policy's replayed routes, or its own live ones."""
    live_gap_every: int = Field(default=0, ge=0)
    """Measure the engine gap with live routing too, every so many steps (R3: by one more pass); 0 never does."""


class BatchSection(Section):
    """``[batch]``: how samples become optimizer updates."""

    global_batch_size: int = Field(gt=0)
    """Samples per optimizer update, over all data-parallel ranks."""
    steps_per_generation: int = Field(default=1, gt=0)
    """Optimizer updates per rollout batch."""
    max_tokens_per_microbatch: int | None = Field(default=None, gt=0)
    """Token budget of a packed microbatch; give this or ``micro_batch_size``."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Samples of a packed microbatch; give this or ``max_tokens_per_microbatch``."""


class GrpoSection(Section):
    """``[grpo]``: advantage and loss."""

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    """How token losses are averaged."""
    epsilon: float = Field(default=0.2, gt=0, lt=1)
    """The importance ratio is clipped below at 1 - epsilon."""
    epsilon_high: float = Field(gt=0)
    """The importance ratio is clipped above at 1 + epsilon_high; equal to ``epsilon`` when left out."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL term towards the reference model; 0 loads no reference model."""
    advantage_estimator: Literal["grpo", "rloo"] = "grpo"
    """What a reward is compared with: the mean of its prompt's completions (``grpo``), or of the others (``rloo``)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation the advantages are divided by."""
    overlong_filter: bool = False
    """Leave completions that were cut off by ``rollout.max_completion_length`` out of the loss."""

    @model_validator(mode="before")
    @classmethod
    def _take_epsilon_high_from_epsilon(cls, table: Any) -> Any:
        if isinstance(table, dict) and "epsilon_high" not in table:
            epsilon = table.get("epsilon", cls.model_fields["epsilon"].default)
            return {**table, "epsilon_high": epsilon}
        return table


class OptimizerSection(Section):
    """``[optimizer]``: AdamW and its schedule, counted in optimizer updates."""

    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of a linear or cosine schedule."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates of linear warm-up: the n-th of w has n / (w + 1) of ``lr``, so that the first one learns too."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""


class MegatronSection(Section):
    """``[megatron]``: layout and recomputation, under Megatron-Core's own names."""

    tensor_model_parallel_size: int = Field(default=1, gt=0)
    """Ranks that share each matrix."""
    pipeline_model_parallel_size: int = Field(default=1, gt=0)
    """Stages of layers."""
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, gt=0)
    """Model chunks per stage."""
    context_parallel_size: int = Field(default=1, gt=0)
    """Ranks that share each sequence."""
    expert_model_parallel_size: int = Field(default=1, gt=0)
    """Ranks that share the experts of a layer."""
    expert_tensor_parallel_size: int | None = Field(default=None, gt=0)
    """Ranks that share each expert's matrices."""
    num_layers_in_first_pipeline_stage: int | None = Field(default=None, gt=0)
    """Layers of the first stage; the others share the rest evenly."""
    num_layers_in_last_pipeline_stage: int | None = Field(default=None, gt=0)
    """Layers of the last stage; the others share the rest evenly."""
    pipeline_model_parallel_layout: str | None = None
    """Megatron's layout string: stages separated by ``|``, ``E`` embedding, ``t`` a layer, ``L`` loss, ``*`` repeats."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to the ranks of their experts."""
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the loss that balances the live experts of a microbatch, padding left out; 0 leaves it out."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers or chosen modules in the backward pass; nothing is recomputed when left out."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With ``full``: how recomputed layers are chosen."""
    recompute_num_layers: int | None = Field(default=None, gt=0)
    """With ``full``: layers per recomputed unit (uniform) or recomputed layers per stage (block)."""
    recompute_modules: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """With ``selective``: names of modules, such as ``moe``."""

    def round_up_microbatches(self, count: int) -> int:
        """Return the least number of microbatches, at least ``count``, that the pipeline schedule takes."""
        if self.virtual_pipeline_model_parallel_size is None:
            return count
        stages = self.pipeline_model_parallel_size
        return -(-count // stages) * stages


class EvalSection(Section):
    """``[eval]``: evaluation on ``data.eval``."""

    every_steps: int = Field(default=0, ge=0)
    """Evaluate every so many steps; 0 only before and after."""
    temperature: float = Field(default=0.0, ge=0)
    """Softmax temperature; 0 takes the most likely token."""
    num_generations: int = Field(default=1, gt=0)
    """Completions per held-out prompt."""


class CheckpointSection(Section):
    """``[checkpoint]``: what is kept for resuming and for use."""

    save_steps: int = Field(default=1, gt=0)
    """Save every so many steps, and after the last."""
    save_total_limit: int = Field(default=2, gt=0)
    """Checkpoints kept."""
    export: bool = True
    """Write a Hugging Face checkpoint at the end."""


class LoggingSection(Section):
    """``[logging]``: sinks besides the console and the files of the run directory."""

    sinks: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(strict=False)
    ] = ()
    """Names of sinks."""
    completions: int = Field(default=1024, ge=0)
    """Completions of each step, and of each evaluation, whose texts are kept: the first ones, prompt after prompt."""
