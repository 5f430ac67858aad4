"""What servers must be before the first call: up, of the recipe's model, and alike.

In: servers, facts of the model. Out: their description.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.lifecycle import other_model
from moe_replay.engines.servers.contract import CANDIDATES_REMEDY, RolloutServer
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.types import EngineDescription
from moe_replay.errors import RecipeError

# Time between two questions to a server that loads its model.
_LOADING_S = 1.0
# Time between two lines about it.
_SAY_S = 60.0
_LOG = logging.getLogger("moe_replay.servers")


def wait_until_loaded(servers: Sequence[RolloutServer], *, says_so: bool) -> None:
    """Return once no server says any more that it loads its model, however long that takes.

    With ``says_so`` a warning is logged at the first wait, and then every minute.

    Raises:
        RecipeError, CallError: as `RolloutServer.status`.
    """
    for server in servers:
        _wait_for(server, says_so=says_so)


def _wait_for(server: RolloutServer, *, says_so: bool) -> None:
    began = time.monotonic()
    next_line = began if says_so else float("inf")
    while True:
        try:
            server.status()
            return
        except CallError as error:
            if error.fault is not Fault.LOADING:
                raise
        now = time.monotonic()
        if now >= next_line:
            _LOG.warning("%s is loading its model, waiting: %.0f s", server.url, now - began)
            next_line = now + _SAY_S
        time.sleep(_LOADING_S)


def agreed_description(
    servers: Sequence[RolloutServer],
    facts: ModelFacts,
    *,
    dtype: str,
    record_routes: bool,
    tries: bool,
    crosses_pushes: bool = False,
    keeps_candidates: bool = False,
) -> EngineDescription:
    """Return what the servers are, once each serves the recipe's model as it is needed.

    With ``tries`` each is tested once, as `RolloutServer.check` does. ``crosses_pushes``: what they
    sample must go on after a push. ``keeps_candidates``: completions must say what each token was
    drawn from.

    Raises:
        RecipeError: when one does not, or they differ.
        CallError: when one does not answer.
    """
    told = {}
    for server in servers:
        url, status = server.url, server.status()
        description = status.description
        if crosses_pushes and not status.crosses_pushes:
            raise RecipeError(
                f"{url} ends what it samples before it takes a push; rollout.push_in_flight needs "
                "servers of `moe-replay serve` with vLLM: start one, or set it to false"
            )
        if keeps_candidates and not server.returns_candidates:
            raise RecipeError(
                f"{url} does not say which ids truncation left for each token, which rollout.top_p, "
                f"top_k and min_p need: {CANDIDATES_REMEDY}"
            )
        if record_routes and not description.records_routes:
            raise RecipeError(
                f"{url} records no routes, which router_replay_mode = 'R3' replays: "
                f"{server.how_to_record}"
            )
        if description.dtype != dtype:
            raise RecipeError(
                f"{url} samples in {description.dtype}, rollout.dtype is {dtype!r}; change that, "
                f"or start the server with --dtype {dtype}"
            )
        if difference := other_model(description, facts):
            raise RecipeError(f"{url} serves {difference}; serve model.path")
        if tries:
            server.check()
        told[url] = description
    different = set(told.values())
    if len(different) > 1:
        raise RecipeError(
            f"the servers differ: {told}; start all of them with the same model, number format and "
            "release"
        )
    return different.pop()
