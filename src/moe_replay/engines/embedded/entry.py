"""How a recipe opens the embedded engine."""

from __future__ import annotations

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.registry import EngineUse
from moe_replay.recipe.sections.rollout import EmbeddedEngineSection


def open_engine(
    section: EmbeddedEngineSection, use: EngineUse, *, device: str, **_: object
) -> EmbeddedEngine:
    """Load the checkpoint with transformers, once a rank."""
    return EmbeddedEngine(
        use.model_dir,
        dtype=section.dtype,
        device=device,
        max_batch_size=section.max_batch_size,
        record_routes=use.record_routes,
    )


def check_engine(*_: object, **__: object) -> list[str]:
    """Return nothing: what transformers cannot load, the trainer has refused before."""
    return []
