"""The section of the rollout: how completions are sampled, and a class for each engine's keys.

``engine`` chooses the class, so a key of another engine is an unknown key. A new engine is a class
here, in `ENGINES`, and a line of `engines.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from moe_replay.recipe.sections.base import Dtype, Key, Section, Several, TomlPath


class RolloutSection(Section):
    """``[rollout]``: how completions are sampled, whatever the engine."""

    engine: str = "embedded"
    """``embedded`` (transformers) or ``vllm`` in the trainer's process, ``vllm-server`` (see
    ``moe-replay serve``), ``sglang-server``, or ``files`` that were sampled before (see
    ``moe-replay rollout``)."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Smallest set of tokens whose probability reaches this; 1 keeps all. Below 1, or with
    ``top_k`` or ``min_p``, what each token was drawn from is recorded, and the trainer's
    probabilities are those among it."""
    top_k: int = Field(default=0, ge=0)
    """Most likely tokens kept, before ``top_p``; 0 keeps all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Tokens kept are at least this many times as likely as the most likely one; 0 keeps all."""
    max_completion_length: Annotated[
        int, Key(also_called=("max_new_tokens", "max_tokens", "max_response_length"))
    ] = Field(gt=0)
    """Maximum number of tokens sampled per completion, the end token included."""
    stop_token_ids: Several[Annotated[int, Field(ge=0)]] = ()
    """Tokens that end a completion, besides those that the checkpoint's configs, tokenizer and
    chat template name."""
    stop: Several[Annotated[str, Field(min_length=1)]] = ()
    """Texts that end a completion, with the token that completes them: ``["</answer>"]``. What an
    engine sampled beyond is cut off."""
    num_generations: Annotated[int, Key(also_called=("n", "group_size"))] = Field(default=8, ge=2)
    """Completions per prompt, compared with each other."""
    max_staleness: Annotated[int, Key(also_called=("max_off_policy_steps", "async_steps"))] = Field(
        default=0, ge=0, le=1
    )
    """Weight pushes that completions may be behind the trainer. 1: those of the next step are
    sampled while this one is learned from, by an engine with resources of its own. 0: one after
    the other."""

    @field_validator("engine")
    @classmethod
    def _is_known(cls, engine: str) -> str:
        if engine not in ENGINES:
            *names, last = map(repr, ENGINES)
            raise ValueError(f"{', '.join(names)} or {last}")
        return engine

    samples_beside: ClassVar[bool] = False
    """Whether the engine has resources of its own and samples while the trainer computes."""
    why_not_beside: ClassVar[str] = "it samples in the trainer's process, on the same devices"
    """Why it has not, for a message."""

    @property
    def truncates(self) -> bool:
        """Whether tokens may be drawn from a part of the vocabulary."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def ranks_per_engine(self) -> int:
        """Consecutive ranks of the trainer that hold one engine together."""
        return 1

    @property
    def shares_device(self) -> bool:
        """Whether the engine samples on the trainer's own device, while the trainer waits."""
        return False

    def describe_engine(self) -> str:
        """Return the engine in words, such as ``vllm, bfloat16``."""
        return self.engine


class SamplingEngineSection(RolloutSection):
    """What every engine that holds a model takes."""

    dtype: Dtype = "bfloat16"
    """Number format of the engine's weights; a server that was started with another is refused."""
    max_batch_size: Annotated[int, Key(may_change=True)] = Field(default=64, gt=0)
    """Sequences sampled at once; those of a server are shared by the ranks, at least one group
    each."""

    def describe_engine(self) -> str:
        """Return the engine in words, such as ``vllm, bfloat16``."""
        return f"{self.engine}, {self.dtype}"


class EmbeddedEngineSection(SamplingEngineSection):
    """transformers, in the trainer's process."""

    engine: Literal["embedded"] = "embedded"

    @property
    def shares_device(self) -> bool:
        """Whether the engine samples on the trainer's own device, while the trainer waits."""
        return True


class VllmEngineSection(SamplingEngineSection):
    """vLLM, in the trainer's process."""

    engine: Literal["vllm"]
    kv_cache_gib: Annotated[float | None, Key(may_change=True)] = Field(default=None, gt=0)
    """Memory of vLLM's key-value cache on each rank, in GiB; by default vLLM's own choice on a
    GPU, and 1 on a CPU."""
    gpu_memory_utilization: Annotated[float | None, Key(may_change=True)] = Field(
        default=None, gt=0, le=1
    )
    """Share of a GPU's memory that vLLM takes while it samples, weights included; by default
    vLLM's own 0.92."""
    tensor_parallel_size: Annotated[int, Key(may_change=True)] = Field(default=1, gt=0)
    """Consecutive ranks of the trainer that hold one vLLM together, each a shard of its
    weights."""

    @property
    def ranks_per_engine(self) -> int:
        """Consecutive ranks of the trainer that hold one engine together."""
        return self.tensor_parallel_size

    @property
    def shares_device(self) -> bool:
        """Whether the engine samples on the trainer's own device, while the trainer waits."""
        return True


class ServersEngineSection(SamplingEngineSection):
    """Servers that are asked over HTTP."""

    samples_beside: ClassVar[bool] = True

    engine: Literal["vllm-server", "sglang-server"]
    push_in_flight: bool = False
    """Push weights while the rollout beside the trainer goes on: completions under way continue
    under the new weights, and runs are no longer reproducible. Needs ``max_staleness`` and servers
    of ``moe-replay serve`` with vLLM."""
    urls: Annotated[Several[str], Key(may_change=True, holds_secrets=True)] = ()
    """Addresses of the servers of ``vllm-server`` or ``sglang-server``, such as
    ``http://127.0.0.1:8000``."""
    token_file: Annotated[TomlPath | None, Key(may_change=True)] = None
    """File with the bearer token of the servers."""
    ca_file: Annotated[TomlPath | None, Key(may_change=True)] = None
    """PEM file with the certificates that servers behind ``https://`` are trusted by, instead of
    the public authorities."""
    weights_dir: Annotated[TomlPath, Key(may_change=True)] = Path("/dev/shm")
    """Folder that trainer and servers share, in memory if possible: servers that are not ours read
    pushed weights there."""
    push_bucket_mib: Annotated[int, Key(may_change=True)] = Field(default=512, gt=0)
    """Size of the parts of a push in MiB, unless one tensor is larger. Two of them are in memory:
    one is made while the other is sent."""
    weight_transfer: Annotated[Literal["auto", "gloo", "nccl"], Key(may_change=True)] = "auto"
    """How weights travel. ``auto``: over HTTP to each server of ``moe-replay serve``, as files in
    ``weights_dir`` to others. ``gloo``, ``nccl``: to all servers of ``moe-replay serve`` at once,
    in a process group with them; ``nccl`` needs a GPU on both sides, and plain vLLM servers take
    it too."""
    timeout_s: Annotated[float, Key(may_change=True)] = Field(default=600.0, gt=0)
    """Longest silence of a server, in seconds, after which its requests are tried elsewhere.
    Answers may take any time."""


class FilesEngineSection(RolloutSection):
    """Completions that were sampled before."""

    why_not_beside: ClassVar[str] = "everything it answers was sampled before"

    engine: Literal["files"]
    path: Annotated[TomlPath, Key(may_change=True, default="required by files")]
    """Folder, or manifest in it, that ``files`` are read from: what ``moe-replay rollout RECIPE
    --output FOLDER`` wrote."""
    allow_stale: bool = False
    """Take ``files`` of another policy version than the trainer's."""


def _by_name(*sections: type[RolloutSection]) -> dict[str, type[RolloutSection]]:
    return {
        name: section
        for section in sections
        for name in get_args(section.model_fields["engine"].annotation)
    }


ENGINES: Mapping[str, type[RolloutSection]] = _by_name(
    EmbeddedEngineSection,
    VllmEngineSection,
    ServersEngineSection,
    FilesEngineSection,
)
"""``rollout.engine`` -> the class of its keys."""


def owners(key: str) -> list[str]:
    """Return the engines that have a key; empty for one of all engines and for an unknown one."""
    if key in RolloutSection.model_fields:
        return []
    return [name for name, section in ENGINES.items() if key in section.model_fields]


def engine_class(table: Mapping[str, Any]) -> type[RolloutSection] | None:
    """Return the class of a ``[rollout]`` table's engine; None where there is no such engine."""
    engine = table.get("engine", RolloutSection.model_fields["engine"].default)
    return ENGINES.get(engine) if isinstance(engine, str) else None
