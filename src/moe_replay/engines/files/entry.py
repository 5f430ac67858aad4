"""How a recipe opens completions that were sampled before."""

from __future__ import annotations

from moe_replay.checkpoint.facts import ModelFacts, read_facts
from moe_replay.engines.files.engine import FilesEngine
from moe_replay.engines.registry import EngineUse
from moe_replay.recipe.sections.rollout import FilesEngineSection


def open_engine(section: FilesEngineSection, use: EngineUse, **_: object) -> FilesEngine:
    """Open the files."""
    return _open(section, use, read_facts(use.model_dir))


def check_engine(
    section: FilesEngineSection, use: EngineUse, facts: ModelFacts, **_: object
) -> list[str]:
    """Open the files and close them."""
    _open(section, use, facts).close()
    return []


def _open(section: FilesEngineSection, use: EngineUse, facts: ModelFacts) -> FilesEngine:
    return FilesEngine(
        section.path,
        facts=facts,
        record_routes=use.record_routes,
        allow_stale=section.allow_stale,
    )
