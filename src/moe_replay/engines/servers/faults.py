"""How calls to a server fail, by what can be done about it.

In: nothing. Out: exception classes.
"""

from __future__ import annotations

from enum import StrEnum

from moe_replay.errors import EngineError


class Fault(StrEnum):
    """Why a call to a server failed."""

    UNREACHABLE = "unreachable"
    """Connection failed or dropped: the server crashed or was never started."""
    SLOW = "slow"
    """Nothing arrived within the limit on silence."""
    LOADING = "loading"
    """The server is up and still loads its model."""
    FAILED = "failed"
    """The server reports that its engine failed."""
    CUT = "cut"
    """The server ended a completion too early, for lack of room."""
    STALE = "stale"
    """The server holds unexpected weights: it was restarted, or another trainer pushes to it."""
    CORRUPT = "corrupt"
    """The answer is damaged, or its routes do not belong to its tokens."""


class CallError(EngineError):
    """A call that may succeed on another server, or later."""

    def __init__(self, fault: Fault, message: str, incident: int | None = None) -> None:
        super().__init__(message)
        self.fault = fault
        self.incident = incident
        """Index of the silence of its server that ended this call and others; None without one."""

    def __reduce__(self) -> tuple[type[CallError], tuple[Fault, str, int | None]]:
        """Make it picklable, to pass from one process to another."""
        return type(self), (self.fault, str(self), self.incident)


class GivenUpError(EngineError):
    """A call that the caller gave up; its connection is closed, so the server stops it too."""
