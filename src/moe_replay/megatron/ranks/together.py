"""Let all ranks fail together, so that none waits in a collective for one that has stopped.

In: what this rank has to say. Out: the same answer on every rank.
"""

from __future__ import annotations

import torch.distributed as dist

from moe_replay.errors import MoeReplayError


def raise_everywhere(refusal: MoeReplayError | None) -> None:
    """Raise the refusal of any rank on all of them; collective, and without effect where none refuses."""
    refusals = [refusal]
    if dist.is_initialized() and dist.get_world_size() > 1:
        refusals = [None] * dist.get_world_size()
        dist.all_gather_object(refusals, refusal)
    for found in refusals:
        if found is not None:
            raise found
