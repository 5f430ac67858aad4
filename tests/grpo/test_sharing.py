"""What ranks exchange in a step: routes in bounded pieces, texts to rank 0 alone."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from moe_replay.batch import Microbatch, RankPlace, Sample, build_microbatch
from moe_replay.engines.types import Completion, FinishReason
from moe_replay.errors import TraceError
from moe_replay.grpo import kept
from moe_replay.megatron.ranks import sharing
from moe_replay.megatron.ranks.messages import HostGroup, all_ranks
from moe_replay.megatron.ranks.replica import Peer, Replica
from moe_replay.megatron.ranks.sharing import share_completions, share_routes
from moe_replay.recipe.recipe import Recipe
from moe_replay.routing import Origin, RoutingTrace, slice_routes
from moe_replay.testing.policies import lone_replica
from moe_replay.testing.ranks import run_ranks

from .test_loop import _train

pytestmark = pytest.mark.ranks
SEED = 23
NUM_LAYERS, TOPK = 6, 4
# Two stages of three layers, each of two ranks: sequence parallel, or with half of every sequence.
PEERS = {
    "tp2 pp2": [RankPlace(tp_size=2, tp_rank=rank % 2) for rank in range(4)],
    "cp2 pp2": [RankPlace(cp_size=2, cp_rank=rank % 2) for rank in range(4)],
}


def replica_of(name: str) -> Replica:
    peers = [
        Peer(place=place, layers=tuple(range(3)) if rank < 2 else (3, 4, 5))
        for rank, place in enumerate(PEERS[name])
    ]
    return Replica(
        number=0,
        num_replicas=1,
        peers=tuple(peers),
        own=dist.get_rank(),
        computes_loss=True,
        is_last_stage=dist.get_rank() >= 2,
        ranks=all_ranks(),
        siblings=HostGroup(group=None, name="ranks of place 0"),
    )


def batch(num_experts: int = 64) -> tuple[list[Sample], dict[int, RoutingTrace]]:
    """Return 12 samples of 5 to 40 tokens and their traces; a tenth of the rows has no route."""
    rng = np.random.default_rng(SEED)
    samples, traces = [], {}
    for number in range(12):
        length = int(rng.integers(5, 41))
        token_ids = rng.integers(0, 99, length).astype(np.int32)
        ids = rng.random((length, NUM_LAYERS, num_experts)).argsort(axis=2)[..., :TOPK]
        traces[number] = RoutingTrace.record(
            ids,
            token_ids=token_ids,
            valid=rng.random(length) > 0.1,
            layers=range(NUM_LAYERS),
            num_experts=num_experts,
            origin=Origin.single(
                engine="test", engine_version="1", policy_version=0, num_rows=length
            ),
        )
        samples.append(
            Sample(
                sample_id=number,
                token_ids=token_ids,
                prompt_length=2,
                rollout_logprobs=np.zeros(length - 2, dtype=np.float32),
                advantage=1.0,
                trains=True,
                reported_here=True,
            )
        )
    return samples, traces


def packed(samples: list[Sample], place: RankPlace) -> list[Microbatch]:
    """Return microbatches of three samples, not in the order of their numbers."""
    order = [samples[number] for number in (7, 0, 3, 1, 11, 2, 9, 4, 5, 10, 6, 8)]
    return [build_microbatch(key, order[3 * key : 3 * key + 3], place=place) for key in range(4)]


Plant = Callable[[dict[int, RoutingTrace], int], None]
"""Spoils what one rank holds: (its traces, its rank)."""


def _differing(name: str, piece: int, num_experts: int, plant: Plant | None) -> Any:
    """Share routes; return rows that differ from those of all traces, the rest, bytes exchanged."""
    sharing.PIECE_BYTES = piece
    replica = replica_of(name)
    samples, traces = batch(num_experts)
    # Rank 2 samples nothing, rank 3 most.
    held = {n: t for n, t in traces.items() if (n % 4 if n % 4 != 2 else 3) == replica.own}
    if plant is not None:
        plant(held, replica.own)
    microbatches = packed(samples, replica.peers[replica.own].place)
    sizes: list[int] = []
    real = HostGroup.exchange

    def counting(self: HostGroup, outgoing: Any, incoming: Any) -> Any:
        sizes.append(sum(map(len, outgoing)))
        return real(self, outgoing, incoming)

    HostGroup.exchange = counting
    shared = share_routes(replica, microbatches, held)
    differing = {}
    for microbatch in microbatches:
        expected = slice_routes(
            [traces[s.sample_id] for s in microbatch.samples],
            microbatch.router_index,
            layers=replica.layers,
        )
        routes = shared[microbatch.key]
        assert routes.layers == expected.layers
        wrong = (routes.valid != expected.valid) | (
            (routes.expert_ids != expected.expert_ids).any(axis=(0, 2)) & expected.valid
        )
        index = microbatch.router_index
        assert expected.valid.sum() > 0
        owners = microbatch.sample_ids[microbatch.router_rows]
        if wrong.any():
            differing[microbatch.key] = sorted(set(owners[wrong & index.is_token].tolist()))
    total = sum(len(t) for t in traces.values()) * (1 + NUM_LAYERS * TOPK)
    return differing, len(held), sizes, total


@pytest.mark.parametrize("num_experts", [64, 300])
@pytest.mark.parametrize("name", PEERS)
def test_e9_routes_shared_in_pieces_are_those_cut_from_all_traces(
    name: str, num_experts: int
) -> None:
    print("seed", SEED)
    for differing, left, sizes, total in run_ranks(_differing, 4, name, 1, num_experts, None):
        assert differing == {}
        assert left == 0
        assert len(sizes) == 4
        assert max(sizes) < total
    everything = run_ranks(_differing, 4, name, 1 << 30, num_experts, None)
    for differing, left, sizes, _ in everything:
        assert (differing, left, len(sizes)) == ({}, 0, 1)


def one_sample_late(held: dict[int, RoutingTrace], rank: int) -> None:
    """Spoil sample 5 of the twelve: its routes one row late."""
    if 5 in held:
        trace = held[5]
        late = np.roll(trace.expert_ids, 1, axis=0)
        held[5] = RoutingTrace.record(
            late,
            token_ids=batch()[0][5].token_ids,
            valid=trace.valid,
            layers=trace.layers,
            num_experts=trace.num_experts,
            origin=trace.origin,
        )


@pytest.mark.parametrize("name", PEERS)
def test_e9_control_routes_of_one_sample_that_are_late_are_seen_in_it_alone(name: str) -> None:
    found = run_ranks(_differing, 4, name, 1, 64, one_sample_late)
    seen = [differing for differing, *_ in found if differing]
    assert seen
    assert {number for differing in seen for n in differing.values() for number in n} == {5}


def test_e9_one_piece_is_bounded_whatever_the_step() -> None:
    # 25 bytes a token over the six layers; microbatches of 41 to 95 tokens, each below 2,500 bytes.
    for _, _, sizes, total in run_ranks(_differing, 4, "tp2 pp2", 2500, 64, None):
        assert total > 5000
        assert len(sizes) >= 3
        assert max(sizes) <= 2500


def lose_one(held: dict[int, RoutingTrace], rank: int) -> None:
    """Lose the trace of sample 4."""
    held.pop(4, None)


def hold_one_twice(held: dict[int, RoutingTrace], rank: int) -> None:
    """Let rank 2 hold the trace of sample 9 too."""
    if rank == 2:
        held[9] = batch()[1][9]


def hold_a_foreign_one(held: dict[int, RoutingTrace], rank: int) -> None:
    """Let rank 1 hold a trace of a sample that nobody trains on."""
    if rank == 1:
        held[77] = batch()[1][3]


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (lose_one, r"\[4\] have a trace on no rank and \[\] on several"),
        (hold_one_twice, r"\[\] have a trace on no rank and \[9\] on several"),
        (hold_a_foreign_one, r"traces of samples \[77\] that nobody trains on"),
    ],
)
def test_e9_a_trace_that_is_missing_or_there_twice_is_named(plant: Plant, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        run_ranks(_differing, 4, "tp2 pp2", 1, 64, plant)


def test_e9_one_rank_alone_lets_its_traces_go_as_they_are_cut() -> None:
    samples, traces = batch()
    held = dict(traces)
    microbatches = packed(samples, RankPlace())
    shared = share_routes(lone_replica(range(NUM_LAYERS)), microbatches, held)
    assert held == {}
    for microbatch in microbatches:
        assert shared[microbatch.key].valid.sum() == sum(
            traces[s.sample_id].valid.sum() for s in microbatch.samples
        )


def _completions(per_rank: Mapping[int, int]) -> list[tuple[int, int, list[int], float, str]]:
    rank = dist.get_rank()
    own = {
        (4 * number + rank, 0): Completion(
            token_ids=np.arange(rank, rank + number, dtype=np.int32),
            rollout_logprobs=np.full(number, -0.1 * rank, dtype=np.float32),
            trace=None,
            finish_reason=FinishReason.STOP,
            policy_version=0,
            server=f"http://server-{rank}",
        )
        for number in range(per_rank[rank])
    }
    shared = share_completions(replica_of("tp2 pp2"), own)
    assert all(c.token_ids.dtype == np.int32 for c in shared.values())
    return [
        (place, len(c.token_ids), c.token_ids.tolist(), float(c.rollout_logprobs.sum()), c.server)
        for (place, _), c in shared.items()
    ]


def test_completions_of_all_ranks_are_the_same_on_all_in_the_order_of_the_prompts() -> None:
    first, *others = run_ranks(_completions, 4, {0: 3, 1: 2, 2: 0, 3: 1})
    assert [entry[0] for entry in first] == [0, 1, 3, 4, 5, 8]
    assert all(other == first for other in others)
    assert first[4][2:] == ([1], pytest.approx(-0.1), "http://server-1")


def texts_heard(recipe: Recipe, change: Callable[[], None] | None = None) -> tuple[list[str], list]:
    """Train on two ranks; return what was written, and what each rank received from the other."""

    def call() -> tuple[bytes, list[int]]:
        if change is not None:
            change()
        heard: list[bytes] = []
        sizes: list[int] = []
        to_all, to_first = HostGroup.gather, HostGroup.gather_items_to_first

        def gather(self: HostGroup, value: Any) -> list[Any]:
            everyone = to_all(self, value)
            heard.append(pickle.dumps(everyone))
            return everyone

        def gather_to_first(self: HostGroup, items: Any, num_bytes: Any) -> list[Any]:
            everyone = to_first(self, items, num_bytes)
            sizes.append(len(items))
            heard.append(pickle.dumps(everyone))
            return everyone

        HostGroup.gather, HostGroup.gather_items_to_first = gather, gather_to_first
        _train(recipe, 2)
        return b"".join(heard), sizes

    heard = run_ranks(call, 2)
    lines = (recipe.run.output_dir / "completions.jsonl").read_text().splitlines()
    return [json.loads(line)["completion"] for line in lines], heard


def num_heard(texts: list[str], heard: bytes) -> int:
    """Return how many of the texts of some length were received."""
    return sum(text.encode() in heard for text in texts if len(text) >= 6)


@pytest.fixture
def one_step(recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Return a function that loads a recipe of one step without the texts of rewards in errors."""
    return lambda **more: recipe(run__max_steps=1, **more)


def test_e9_texts_go_to_rank_0_alone(one_step: Callable[..., Recipe]) -> None:
    texts, ((first, _), (second, sent)) = texts_heard(one_step(logging__num_with_tokens=0))
    assert len(texts) == 16
    assert num_heard(texts, first) == sum(len(text) >= 6 for text in texts) > 8
    assert num_heard(texts, second) == 0
    # Its half of the completions in one piece.
    assert sent == [8]


def test_e9_only_what_is_kept_travels(one_step: Callable[..., Recipe]) -> None:
    kept_alone = {"logging__completions": 10, "logging__num_with_tokens": 0}
    texts, (_, (_, sent)) = texts_heard(one_step(**kept_alone))
    # Rank 1 sampled the third and fourth prompt of four completions: of the first ten, it has two.
    assert len(texts) == 10
    assert sent == [2]


def test_e9_control_one_text_sent_to_all_is_heard(one_step: Callable[..., Recipe]) -> None:
    def tell_all() -> None:
        real = kept.kept_completions

        def telling(run: Any, *args: Any, texts: Any, **more: Any) -> Any:
            run.ranks.gather(max(texts, key=len) if run.process.rank == 0 else "")
            return real(run, *args, texts=texts, **more)

        from moe_replay.grpo import record

        record.kept_completions = telling

    texts, (_, (second, _)) = texts_heard(one_step(), tell_all)
    assert num_heard(texts, second) >= 1
