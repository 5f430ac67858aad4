"""What engines share beside sampling: their description, their state and the policy version.

An engine is ready, broken (a push failed, so its weights belong to two policies) or closed. Only a
push that succeeds makes a broken engine ready again::

    new --start--> ready --push begins--> broken --push succeeds--> ready --close--> closed
"""

from __future__ import annotations

from typing import Literal

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.types import EngineDescription
from moe_replay.errors import EngineError

State = Literal["new", "ready", "broken", "closed"]


def describe(
    facts: ModelFacts,
    *,
    name: str,
    version: str,
    dtype: str,
    record_routes: bool,
    max_context_length: int,
) -> EngineDescription:
    """Return the description of an engine that runs the model of ``facts``."""
    routed = facts.routed
    return EngineDescription(
        name=name,
        version=version,
        dtype=dtype,
        records_routes=record_routes and routed is not None,
        moe_layers=routed.moe_layers if routed else (),
        num_experts=routed.num_experts if routed else 0,
        topk=routed.topk if routed else 0,
        max_context_length=max_context_length,
    )


def other_model(description: EngineDescription, facts: ModelFacts) -> str | None:
    """Return how an engine's model differs from the recipe's in its routes, for a message."""
    routed = facts.routed
    theirs = (description.moe_layers, description.num_experts, description.topk)
    ours = (routed.moe_layers, routed.num_experts, routed.topk) if routed else ((), 0, 0)
    if theirs == ours:
        return None
    return f"a model with (MoE layers, experts, top-k) {theirs}, the recipe's has {ours}"


class Lifecycle:
    """The description and the state of an engine."""

    def __init__(self, description: EngineDescription, *, state: State = "ready") -> None:
        self._description = description
        self._state: State = state

    @property
    def description(self) -> EngineDescription:
        """What this engine is and can return."""
        return self._description

    def _check_state(self, *allowed: State) -> None:
        """Raise `EngineError` unless the engine is in one of these states."""
        if self._state in allowed:
            return
        name = self._description.name
        raise EngineError(
            {
                "new": f"the {name} engine has not been started",
                "ready": f"the {name} engine is running already",
                "broken": f"the last weight push failed half-way, so the {name} engine holds "
                "weights of two policies; push again",
                "closed": f"the {name} engine is closed; make a new one",
            }[self._state]
        )


class VersionedEngine(Lifecycle):
    """An engine of this process, which counts the pushes that it receives."""

    def __init__(self, description: EngineDescription) -> None:
        super().__init__(description)
        self._policy_version = 0

    @property
    def policy_version(self) -> int:
        """Weight pushes received so far."""
        return self._policy_version

    def _check_push(self, policy_version: int) -> None:
        """Raise `EngineError` when the engine is closed, or holds newer weights than this push."""
        self._check_state("ready", "broken")
        if policy_version < self._policy_version:
            raise EngineError(
                f"policy_version {policy_version} was pushed after {self._policy_version}; versions "
                "count pushes, so a stale trainer is pushing"
            )

    def close(self) -> None:
        """Refuse further work. Calling it twice is allowed."""
        self._state = "closed"
