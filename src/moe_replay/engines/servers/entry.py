"""How a recipe opens its servers as one engine, and how they are tried before a start."""

from __future__ import annotations

import secrets
from functools import partial

from moe_replay.checkpoint.facts import ModelFacts, read_facts
from moe_replay.engines.registry import EngineUse, Ranks
from moe_replay.engines.servers.engine import ServerEngine
from moe_replay.engines.servers.sglang import SglangCalls
from moe_replay.engines.servers.vllm import connect_vllm
from moe_replay.recipe.bearer import read_token
from moe_replay.recipe.sections.rollout import ServersEngineSection

_TRIAL = "trial"
"""Stands for a run's name while a push is tried."""


def open_engine(
    section: ServersEngineSection, use: EngineUse, *, ranks: Ranks, **_: object
) -> ServerEngine:
    """Return the servers as one engine, after a push of the checkpoint to each of them.

    So a push is tried before anything is sampled, and no server answers by weights that it
    happened to hold.
    """
    engine = _connect(
        section,
        use,
        read_facts(use.model_dir),
        run=ranks.gather(secrets.token_hex(8))[0],
        ranks=ranks,
        waits_for_loading=True,
        says_waiting=ranks.rank == 0,
    )
    try:
        engine.restore(use.model_dir)
    except BaseException:
        engine.close()
        raise
    return engine


def check_engine(
    section: ServersEngineSection,
    use: EngineUse,
    facts: ModelFacts,
    *,
    rank: int,
    tries_push: bool,
    **_: object,
) -> list[str]:
    """Ask the servers what they are; with ``tries_push`` rank 0 gives idle ones the checkpoint.

    Without, as at a start, servers that still load their model are waited for; with it no rank
    waits, because rank 0 refuses them.
    """
    engine = _connect(
        section,
        use,
        facts,
        run=_TRIAL,
        waits_for_loading=not tries_push,
        says_waiting=rank == 0,
    )
    try:
        busy = engine.busy
        if tries_push and rank == 0 and not busy:
            engine.restore(use.model_dir)
    finally:
        engine.close()
    if not tries_push or rank or not busy:
        return []
    return [
        f"{', '.join(f'{url} holds weights of run {run}' for url, run in busy.items())}: no push "
        "was tried, because that run would stop if it is at work there; a start will push"
    ]


def _connect(
    section: ServersEngineSection,
    use: EngineUse,
    facts: ModelFacts,
    *,
    run: str,
    ranks: Ranks | None = None,
    waits_for_loading: bool,
    says_waiting: bool,
) -> ServerEngine:
    num_ranks = 1 if ranks is None else ranks.size
    protocol = SglangCalls if section.engine == "sglang-server" else connect_vllm
    return ServerEngine(
        section.urls,
        facts=facts,
        connect=partial(protocol, facts=facts, ca_file=section.ca_file),
        weights_dir=section.weights_dir,
        run=run,
        dtype=section.dtype,
        record_routes=use.record_routes,
        keeps_candidates=use.keeps_candidates,
        ranks=ranks,
        token=read_token(section.token_file),
        # Every rank asks every server: of 128 sequences at once on each server, 8 ranks with
        # groups of 4 ask for 4 groups each.
        calls_per_server=max(1, section.max_batch_size // (section.num_generations * num_ranks)),
        timeout_s=section.timeout_s,
        waits_for_loading=waits_for_loading,
        says_waiting=says_waiting,
        bucket_bytes=section.push_bucket_mib << 20,
        weight_transfer=section.weight_transfer,
        crosses_pushes=section.push_in_flight,
    )
