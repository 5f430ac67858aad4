"""The engines that a recipe may name: the class of an engine's keys chooses its folder.

A new engine is a folder, a section in `recipe.sections.rollout` and a line here. The folder's
``entry.py`` holds the two functions of `EngineEntry`, which take what they need of the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast, runtime_checkable

from moe_replay.engines.types import Engine
from moe_replay.recipe.sections import rollout

if TYPE_CHECKING:
    from moe_replay.checkpoint.facts import ModelFacts

T = TypeVar("T")

_FOLDERS: Mapping[type[rollout.RolloutSection], str] = {
    rollout.EmbeddedEngineSection: "embedded",
    rollout.VllmEngineSection: "vllm",
    rollout.ServersEngineSection: "servers",
    rollout.FilesEngineSection: "files",
}


@runtime_checkable
class Ranks(Protocol):
    """The ranks of the job; each holds an engine, or a part of one."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def rank(self) -> int:
        """Index of this one, from 0."""
        ...

    def gather(self, value: T, /) -> list[T]:
        """Return every rank's value, in rank order; collective."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUse:
    """What a run asks of its engine, beside the engine's own keys."""

    model_dir: Path
    """Directory of the checkpoint."""
    max_context_length: int
    """Maximum number of tokens of prompt and completion together."""
    record_routes: bool
    """Whether completions must come with their routes."""
    keeps_candidates: bool = False
    """Whether they must come with what each token was drawn from."""


@runtime_checkable
class EngineEntry(Protocol):
    """``entry.py`` of an engine's folder, whose ``section`` is of the engine's own class."""

    def open_engine(
        self, section: rollout.RolloutSection, use: EngineUse, *, device: str, ranks: Ranks
    ) -> Engine:
        """Return the engine, started.

        Raises:
            RecipeError: when its library is not installed or an option does not fit it.
            UnsupportedError: when its release cannot keep the contract of an engine.
            EngineError: when it does not start, or cannot return what ``use`` needs.
        """
        ...

    def check_engine(
        self,
        section: rollout.RolloutSection,
        use: EngineUse,
        facts: ModelFacts,
        *,
        rank: int,
        num_ranks: int,
        num_attention_heads: int,
        tries_push: bool,
    ) -> list[str]:
        """Refuse what would keep the engine from starting, and return what is worth knowing.

        Nothing is started. Servers and files are asked; with ``tries_push`` servers also load the
        checkpoint and sample by it, unless another run may be at work on them.

        Raises:
            RecipeError: when an option, a server or a file does not fit the model or the ranks.
            UnsupportedError: when the engine cannot load the checkpoint's layout.
            EngineError: when a server does not answer.
        """
        ...


def engine_entry(section: rollout.RolloutSection) -> EngineEntry:
    """Return what opens the engine of a ``[rollout]`` section; only its own folder is imported."""
    return cast(EngineEntry, import_module(f"moe_replay.engines.{_FOLDERS[type(section)]}.entry"))
