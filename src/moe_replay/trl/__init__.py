"""R2 and R3 for users of TRL: a `GRPOTrainer` whose update runs the experts of its routes.

In: what ``trl.GRPOTrainer`` takes, and ``router_replay_mode``. Out: `ReplayGRPOTrainer`. TRL is
imported when that name is first used; it is the extra ``moe-replay[trl]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_replay.trl.trainer import ReplayGRPOTrainer

__all__ = ["ReplayGRPOTrainer"]


def __getattr__(name: str) -> Any:
    if name == "ReplayGRPOTrainer":
        from moe_replay.trl.trainer import ReplayGRPOTrainer

        return ReplayGRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
