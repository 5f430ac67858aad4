"""The whole error tree: one class for each failure that a caller handles differently.

::

    MoeReplayError
    ├── RecipeError (ValueError)         the recipe, a dataset or a path in it is wrong
    │   └── UnsupportedError             a model, layout or option that replay cannot honour exactly
    │       └── MachineError             a package or device that this machine lacks
    ├── TraceError (ValueError)          routes that cannot be what they claim to be
    │   ├── TokenMismatchError           routes that belong to other tokens than these
    │   └── CodecError                   bytes that are not an intact trace
    ├── ReplayScopeError (RuntimeError)  a router was run outside the scope's contract
    ├── CoverageError (RuntimeError)     fewer rows were replayed than the recipe demands
    ├── MisalignmentError (RuntimeError) replayed and live routes disagree too much
    ├── UpdateError (RuntimeError)       an update's gradients are off, or 0 where they cannot be
    ├── EngineError (RuntimeError)       an inference engine failed or broke its contract
    ├── RankError (RuntimeError)         another rank of the job ended, or was silent for too long
    ├── DivergedError (RuntimeError)     weights or gradients are no longer finite numbers
    ├── RewardError (RuntimeError)       a reward function raised or returned no usable number
    ├── CheckpointError (RuntimeError)   a checkpoint could not be written, read or trusted
    └── RunDirectoryError (ValueError)   a folder is not what a run leaves behind

In: nothing. Out: exception classes, and how a message lists names and remarks on a similar one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_MOST_NAMES = 10


class MoeReplayError(Exception):
    """Base of every error that moe-replay raises on purpose."""


class RecipeError(MoeReplayError, ValueError):
    """The recipe, or something that it points to, is wrong; nothing has run yet."""


class UnsupportedError(RecipeError):
    """The model, layout or option is one that cannot be honoured exactly, so it is refused."""


class MachineError(UnsupportedError):
    """The recipe needs a package or a device that this machine lacks; another may have it."""


class TraceError(MoeReplayError, ValueError):
    """Routes have the wrong shape, type, range or structure to be what they claim to be."""


class TokenMismatchError(TraceError):
    """Routes are bound to other tokens than the ones they were offered for."""


class CodecError(TraceError):
    """Bytes are truncated, altered, of another version, or otherwise not an intact trace."""


class ReplayScopeError(MoeReplayError, RuntimeError):
    """A router ran outside the contract of the replay scope that owns it."""


class CoverageError(MoeReplayError, RuntimeError):
    """Fewer rows were replayed than the recipe demands."""


class MisalignmentError(MoeReplayError, RuntimeError):
    """Routes cannot belong to their rows, or the engine's log-probabilities to their tokens."""


class UpdateError(MoeReplayError, RuntimeError):
    """An update cannot learn: gradients are switched off, or exactly 0 where they cannot be.

    No weight has changed.
    """


class EngineError(MoeReplayError, RuntimeError):
    """An inference engine failed or broke its contract."""


class RankError(MoeReplayError, RuntimeError):
    """Another rank of this job has ended, or was silent for longer than anybody waits."""


class DivergedError(MoeReplayError, RuntimeError):
    """Training left the numbers that a model can compute with; what was learned before is kept."""


class RewardError(MoeReplayError, RuntimeError):
    """A reward function raised, or returned something that is not one finite number a sample."""


class CheckpointError(MoeReplayError, RuntimeError):
    """A checkpoint could not be written, read or trusted."""


class RunDirectoryError(MoeReplayError, ValueError):
    """A folder is not what a run leaves behind, or a file in it cannot be read."""


def shortened(names: Sequence[str]) -> str:
    """Return names as a list for a message, cut where it gets long."""
    shown = [name if len(name) <= 80 else f"{name[:77]}..." for name in names[:_MOST_NAMES]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def nearest_of(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like ``name`` as a remark; empty if none is like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (nearest: {close[0]!r})" if close else ""
