"""Joins the recorded routes of all ranks into traces, in global layer and token order.

Training never needs this: routes are replayed where they were recorded. Export, comparison and
tests do.

In: RouteSlice of every rank of a replica. Out: traces of complete samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Integer
from megatron.core import parallel_state

from moe_replay.batch import Microbatch
from moe_replay.errors import ReplayScopeError
from moe_replay.megatron.upstream.compat import VERSION
from moe_replay.routing import Origin, RouteForm, RouteSlice, RoutingTrace, expert_dtype


def gather_traces(
    microbatches: Sequence[Microbatch],
    routes: Mapping[int, RouteSlice],
    form: RouteForm,
    *,
    policy_version: int,
    device: torch.device,
) -> dict[int, RoutingTrace]:
    """Return sample id -> its trace, on every rank of the replica; collective over it.

    ``form`` names the layers of the model. Each rank brings its ``routes`` (microbatch key ->
    routes); a stage without routers brings none.

    Raises:
        ReplayScopeError: when no rank brings the routes of some row and layer, or two ranks do.
    """
    traces: dict[int, RoutingTrace] = {}
    for microbatch in microbatches:
        ids = _all_ids(microbatch, routes.get(microbatch.key), form, device)
        start = 0
        for sample in microbatch.samples:
            stop = start + len(sample.token_ids)
            traces[sample.sample_id] = RoutingTrace.record(
                ids[start:stop],
                token_ids=sample.token_ids,
                valid=np.ones(stop - start, dtype=bool),
                layers=form.layers,
                num_experts=form.num_experts,
                origin=Origin.single(
                    engine="trainer",
                    engine_version=f"megatron-core {VERSION[0]}.{VERSION[1]}",
                    policy_version=policy_version,
                    num_rows=stop - start,
                ),
            )
            start = stop
    return traces


def _all_ids(
    microbatch: Microbatch, held: RouteSlice | None, form: RouteForm, device: torch.device
) -> Integer[np.ndarray, "rows layers topk"]:
    """Add up what every rank holds, and check that every row and layer came from exactly one.

    Worked example, 2 CP ranks, one layer, top-1: rank 0 recorded row 0 with expert 5, rank 1 row 1
    with expert 0. Ids ``[5 0]`` and ``[0 0]`` add up to ``[5 0]``; the counts ``[1 0]`` and
    ``[0 1]`` to ``[1 1]``, which says that the 0 was recorded, and is not a missing row.
    """
    shape = (microbatch.index.num_rows, len(form.layers), form.topk)
    mine = np.zeros((2, *shape[:2], form.topk), dtype=np.int32)
    if held is not None:
        index = microbatch.router_index
        rows = index.rows[index.is_token]
        for number, layer in enumerate(held.layers):
            entry = form.layers.index(layer)
            mine[0, rows, entry] = held.expert_ids[number][index.is_token]
            mine[1, rows, entry] = 1
    total = torch.from_numpy(mine).to(device)
    for group in (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_context_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    ):
        if group.size() > 1:
            dist.all_reduce(total, group=group)
    ids, times = total.cpu().numpy()
    if not (times == 1).all():
        row, entry, _ = np.argwhere(times != 1)[0]
        raise ReplayScopeError(
            f"microbatch {microbatch.key}: row {row}, layer {form.layers[entry]} was recorded by "
            f"{times[row, entry, 0]} ranks, expected one; the ranks packed different microbatches, or a pipeline stage "
            "is missing"
        )
    return ids.astype(expert_dtype(form.num_experts))
