"""The layouts under test, and one replayed training step in any of them.

In: a checkpoint and a case. Out: what the step computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_replay.batch import Microbatch
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.layout import ParallelLayout
from moe_replay.megatron.ranks.replica import Peer, Replica
from moe_replay.megatron.recorded import gather_traces
from moe_replay.routing import Origin, Routing, RoutingTrace
from moe_replay.testing.policies import (
    gradients,
    mean_loss,
    pack,
    route_form,
    shared,
    start_policy,
)
from moe_replay.testing.samples import RoutedSample, make_samples, with_trace

SEED = 41
NUM_SAMPLES = 8
NUM_EXPERTS, TOPK = 16, 4


def layout(**sizes: Any) -> ParallelLayout:
    """Return a layout from Megatron's names, shortened."""
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "first": "num_layers_in_first_pipeline_stage",
        "last": "num_layers_in_last_pipeline_stage",
        "stages": "pipeline_model_parallel_layout",
    }
    return ParallelLayout(**{names[name]: size for name, size in sizes.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A layout, the ranks it runs on, and further TransformerConfig fields."""

    layout: ParallelLayout
    """Degrees of parallelism."""
    ranks: int
    """Processes."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Further TransformerConfig fields."""


FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
CASES = {
    "dp2": Case(layout=layout(), ranks=2),
    "tp2": Case(layout=layout(tp=2), ranks=2),
    "tp2 etp1": Case(layout=layout(tp=2, etp=1), ranks=2),
    "ep2": Case(layout=layout(ep=2), ranks=2),
    "ep2 allgather": Case(layout=layout(ep=2), ranks=2, overrides=ALLGATHER),
    "ep2 etp2": Case(layout=layout(ep=2, etp=2), ranks=4),
    "tp2 ep2": Case(layout=layout(tp=2, ep=2), ranks=4),
    "tp2 ep2 etp1": Case(layout=layout(tp=2, ep=2, etp=1), ranks=2),
    "tp2 ep2 allgather": Case(layout=layout(tp=2, ep=2), ranks=4, overrides=ALLGATHER),
    "pp2": Case(layout=layout(pp=2), ranks=2),
    "pp2 uneven": Case(layout=layout(pp=2, first=3), ranks=2),
    "pp4": Case(layout=layout(pp=4), ranks=4),
    "pp2 without moe": Case(layout=layout(pp=2, stages="Et|t*7L"), ranks=2),
    "pp2 vpp2": Case(layout=layout(pp=2, vpp=2), ranks=2),
    "pp2 vpp4": Case(layout=layout(pp=2, vpp=4), ranks=2),
    "pp2 vpp2 custom": Case(layout=layout(pp=2, vpp=2, stages="Et|t*3|t*2|t*2L"), ranks=2),
    "cp2": Case(layout=layout(cp=2), ranks=2),
    "cp4": Case(layout=layout(cp=4), ranks=4),
    "tp2 pp2": Case(layout=layout(tp=2, pp=2), ranks=4),
    "tp2 cp2": Case(layout=layout(tp=2, cp=2), ranks=4),
    "cp2 ep2": Case(layout=layout(cp=2, ep=2), ranks=2),
    "pp2 cp2": Case(layout=layout(pp=2, cp=2), ranks=4),
    "pp2 ep2": Case(layout=layout(pp=2, ep=2), ranks=4),
    "pp2 vpp2 ep2": Case(layout=layout(pp=2, vpp=2, ep=2), ranks=4),
    "pp2 vpp2 tp2": Case(layout=layout(pp=2, vpp=2, tp=2), ranks=4),
    "full recompute": Case(layout=layout(), ranks=1, overrides=FULL),
    "pp2 full recompute": Case(layout=layout(pp=2), ranks=2, overrides=FULL),
    "pp2 vpp2 full recompute": Case(layout=layout(pp=2, vpp=2), ranks=2, overrides=FULL),
    "pp2 vpp2 block recompute": Case(layout=layout(pp=2, vpp=2), ranks=2, overrides=BLOCK),
    "pp2 vpp2 moe recompute": Case(layout=layout(pp=2, vpp=2), ranks=2, overrides=MOE),
    "tp2 full recompute": Case(layout=layout(tp=2), ranks=2, overrides=FULL),
    "cp2 moe recompute": Case(layout=layout(cp=2), ranks=2, overrides=MOE),
    "tp2 pp2 vpp2 ep2 moe recompute": Case(
        layout=layout(tp=2, pp=2, vpp=2, ep=2), ranks=8, overrides=MOE
    ),
}


def coded_samples(layers: tuple[int, ...]) -> list[RoutedSample]:
    """Return samples whose routes depend on sample, position and layer, never on the model.

    The last row of each, and every ninth, has no route: it runs live.
    """
    samples = []
    for sample in make_samples(NUM_SAMPLES, seed=SEED):
        length = len(sample.token_ids)
        ids = np.stack(
            [
                [route(sample.sample_id, position, layer) for layer in layers]
                for position in range(length)
            ]
        )
        valid = np.arange(length) % 9 != 8
        valid[-1] = False
        trace = RoutingTrace.record(
            ids,
            token_ids=sample.token_ids,
            valid=valid,
            layers=layers,
            num_experts=NUM_EXPERTS,
            origin=Origin.single(
                engine="coded", engine_version="0", policy_version=0, num_rows=length
            ),
        )
        samples.append(with_trace(sample, trace))
    return samples


def route(sample: int, position: int, layer: int) -> np.ndarray:
    """Return the experts that spell a sample, a position and a layer."""
    return np.random.default_rng([SEED, sample, position, layer]).permutation(NUM_EXPERTS)[:TOPK]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one router saw and chose in the rows of one microbatch."""

    layer: int
    """Global decoder index."""
    hidden: np.ndarray
    """``[rows, hidden]``, its input, from which a token is recognised without any row index."""
    chosen: np.ndarray
    """``[rows, experts]`` bool, the experts that then ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one rank saw of a replayed step."""

    old_logprobs: dict[int, np.ndarray]
    """Sample id -> log-probabilities of the replayed pass; of this rank's replica."""
    loss: float
    """Of all ranks."""
    grad_norm: float
    """Before clipping."""
    gradients: dict[str, torch.Tensor]
    """Of the model, by checkpoint name."""
    seen: list[Seen]
    """Of the replayed pass, on this rank."""
    rows: list[tuple[np.ndarray, np.ndarray]]
    """(sample ids, positions) of the router rows of each microbatch, as this rank believes."""
    recorded: dict[int, RoutingTrace]
    """Sample id -> routes of a live pass, gathered from all ranks of the replica."""


def replica_share(samples: list[RoutedSample], replica: Replica) -> list[RoutedSample]:
    """Return the samples of one replica."""
    part = len(samples) // replica.num_replicas
    return samples[replica.number * part : (replica.number + 1) * part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plant:
    """A misalignment planted on purpose, before routes are shared."""

    samples: Callable[[list[RoutedSample]], list[RoutedSample]] = lambda samples: samples
    """Changes what the engine returned."""
    peer: Callable[[Peer], Peer] = lambda peer: peer
    """Changes the rows or the layers that a rank seems to need; it then gets those routes."""


def planted(
    microbatches: list[Microbatch], samples: list[RoutedSample], replica: Replica, plant: Plant
) -> list[Microbatch]:
    """Share routes under ``plant``; layers keep the labels that the ranks route."""
    wrong = replace(replica, peers=tuple(map(plant.peer, replica.peers)))
    return [
        replace(m, routes=replace(m.routes, layers=replica.layers))
        for m in shared(microbatches, plant.samples(samples), wrong)
        if m.routes is not None
    ]


def replayed_step(
    checkpoint: Path,
    case: Case,
    layers: tuple[int, ...],
    plant: Plant = Plant(),
) -> Step:
    """Share coded routes, score and update under them, through the trainer's own path."""
    # A microbatch has some 20 sampled tokens: several chunks of uneven size.
    actor = start_policy(checkpoint, case.layout, chunk_rows=7, **case.overrides)
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    samples = replica_share(coded_samples(layers), replica)
    # Equally many microbatches everywhere, a multiple of the stages; equally many rows where the
    # dispatcher wants it.
    packed = pack(
        samples,
        scorer=actor,
        routed=False,
        count=min(4, len(samples)),
        row_multiple=64 if case.overrides == ALLGATHER else 1,
    )
    microbatches = planted(packed, samples, replica, plant)
    with _watching(actor) as seen:
        scores = actor.score(microbatches, temperature=0.9, routing=Routing.REPLAY)
    losses: list[float] = []

    def loss(microbatch: Microbatch, new_logprobs: torch.Tensor) -> torch.Tensor:
        part = mean_loss(microbatch, new_logprobs)
        losses.append(float(part.detach()))
        return part

    def norm_only() -> tuple[bool, float, int]:
        actor.optimizer.prepare_grads()
        return True, float(actor.optimizer.get_grad_norm()), 0

    actor.optimizer.step = norm_only
    result = actor.update(microbatches, loss, temperature=0.9, routing=Routing.REPLAY)
    total = torch.tensor([sum(losses) if replica.computes_loss else 0.0], dtype=torch.float64)
    dist.all_reduce(total)
    return Step(
        old_logprobs={i: scored.token_logprobs for i, scored in scores.samples.items()},
        loss=float(total),
        grad_norm=result.norm,
        gradients=gradients(actor),
        seen=seen,
        rows=[(m.sample_ids[m.router_rows], m.positions[m.router_rows]) for m in microbatches],
        recorded=_recorded(actor, microbatches),
    )


def _recorded(actor: MegatronActor, microbatches: list[Microbatch]) -> dict[int, RoutingTrace]:
    routes = actor.score(microbatches, temperature=0.9, routing=Routing.RECORD).routes
    return gather_traces(
        microbatches, routes, route_form(actor), policy_version=0, device=actor.device
    )


@contextmanager
def _watching(actor: MegatronActor) -> Iterator[list[Seen]]:
    seen: list[Seen] = []
    hooks = []
    for layer, router in actor.routers.items():

        def note(module: Any, args: Any, output: Any, layer: int = layer) -> None:
            hidden = args[0].detach().flatten(0, -2).numpy()
            seen.append(Seen(layer=layer, hidden=hidden, chosen=output[1].bool().numpy()))

        hooks.append(router.register_forward_hook(note))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
