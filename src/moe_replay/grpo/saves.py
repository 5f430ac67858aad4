"""When a checkpoint is due: every so many steps, or as often as saving costs little."""

from __future__ import annotations

CHEAP_S = 1.0
"""A checkpoint that takes at most this long is due after every step, however short steps are."""
PATIENCE = 20.0
"""A longer one is due once so many times what it took has passed: at most 5 % of the time."""


class SavePace:
    """When the checkpoints of a run are due, after the first step and the last in any case."""

    def __init__(self, every_steps: int | None) -> None:
        """Save every so many steps; with None by what the last one took."""
        self._every_steps = every_steps
        self._seconds = 0.0
        self._ended_at = 0.0

    def took(self, seconds: float, *, ended_at: float) -> None:
        """Note how long a checkpoint has held up the run, and when it was done, in seconds."""
        self._seconds, self._ended_at = seconds, ended_at

    def is_due(self, step: int, *, now: float) -> bool:
        """Whether to save after ``step``.

        Example: the last one took 9 s, so the next is due 180 s after it: after every step of 200
        s, after every 60th of 3 s. After one of 1 s the next is due after any step.
        """
        if self._every_steps is not None:
            return step % self._every_steps == 0
        return self._seconds <= CHEAP_S or now - self._ended_at >= PATIENCE * self._seconds
