"""Samples dealt by their work to other replicas than the one that sampled them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moe_replay.engines.types import Completion, FinishReason
from moe_replay.errors import MisalignmentError, TokenMismatchError
from moe_replay.grpo import loop
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.ranks import dealing
from moe_replay.megatron.ranks.dealing import hand_over
from moe_replay.megatron.ranks.messages import HostGroup, all_ranks
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.recipe import Recipe
from moe_replay.routing import Origin, RoutingTrace
from moe_replay.routing.candidates import Candidates
from moe_replay.testing.misrouting import one_row_late
from moe_replay.testing.policies import gradients, lone_replica
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from .guard.test_judging import LONG, wrong
from .test_loop import _train, metrics_of, run

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]
SEED = 29


def uneven(folder: Path) -> Path:
    """Write prompts of 3 to 30 words, of which every mini-batch of four has long and short ones."""
    path = folder / "uneven.jsonl"
    words = [30, 22, 4, 3, 5, 28, 3, 17, 3, 3, 25, 24, 26, 4, 6, 3]
    lines = [{"prompt": " ".join(str(n * k % 10) for k in range(n // 2))} for n in words]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---- whole steps -----------------------------------------------------------------------------


def stepped(recipe: Recipe, world_size: int) -> list[Any]:
    """Take one step; return for each rank its replica, samples by mini-batch, and gradients."""

    def call() -> Any:
        seen: list[Any] = []
        found: list[dict[str, torch.Tensor]] = []
        make, step = loop.make_batch, MegatronActor.step

        def making(run_: Any, rollout: Any, scored: Any) -> Any:
            per = run_.recipe.rollout.num_generations
            sampled = {at * per + n for at in rollout.own for n in range(per)}
            batch = make(run_, rollout, scored)
            work = [
                {
                    batch.origins[s.sample_id].index: len(s.token_ids)
                    for m in part
                    for s in m.samples
                }
                for part in batch.minibatches
            ]
            counts = [len(part) for part in batch.minibatches]
            reported = {batch.origins[s.sample_id].index for s in batch.samples if s.reported_here}
            seen.append((run_.replica.number, sampled, work, counts, reported))
            return batch

        def stepping(actor: MegatronActor) -> None:
            found.append(gradients(actor))
            step(actor)

        loop.make_batch, MegatronActor.step = making, stepping
        _train(recipe, world_size)
        return (*seen[0], found)

    return run_ranks(call, world_size)


@pytest.mark.parametrize(
    ("mode", "ranks", "layout"),
    [
        ("disabled", 2, {}),
        ("R2", 2, {"expert_model_parallel_size": 2}),
        ("R3", 4, {"expert_model_parallel_size": 2}),
        ("R3", 4, {"context_parallel_size": 2}),
    ],
)
def test_a_dealt_mini_batch_has_the_gradient_of_the_undealt_one(
    mode: str, ranks: int, layout: dict[str, int], recipe: Recipes, tmp_path: Path
) -> None:
    settings = {
        "data__train": uneven(tmp_path),
        "data__shuffle": "false",
        "replay__router_replay_mode": mode,
        "rollout__dtype": "float32",
        "batch__steps_per_generation": 2,
        "batch__max_tokens_per_microbatch": 96,
        "run__max_steps": 1,
        **{f"megatron__{key}": value for key, value in layout.items()},
    }
    results = {}
    metrics = {}
    for balance in ("false", "true"):
        made = recipe(batch__balance=balance, run__output_dir=tmp_path / balance, **settings)
        results[balance] = stepped(made, ranks)
        (metrics[balance],) = metrics_of(made)
    num_replicas = len({replica for replica, *_ in results["true"]})
    moved, unbalanced = 0, []
    for balance, of_ranks in results.items():
        by_replica = {replica: work for replica, _, work, *_ in of_ranks}
        for update in range(2):
            indices = sorted(i for work in by_replica.values() for i in work[update])
            assert indices == list(range(16 * update, 16 * update + 16))
            loads = [sum(work[update].values()) for work in by_replica.values()]
            unbalanced.append((balance, max(loads) / (sum(loads) / num_replicas)))
        # Every sample is reported once, and every rank runs as many microbatches.
        assert sorted(i for *_, reported, _ in of_ranks for i in reported) == list(range(32))
        assert len({tuple(counts) for _, _, _, counts, *_ in of_ranks}) == 1
        if balance == "true":
            moved = sum(
                len({i for work in by_replica[r] for i in work} & own) < len(own)
                for r, own, *_ in of_ranks
            )
    assert moved == ranks
    assert max(ratio for balance, ratio in unbalanced if balance == "true") < 1.1
    assert max(ratio for balance, ratio in unbalanced if balance == "false") > 1.2
    assert metrics["true"].keys() == metrics["false"].keys()
    for key in ("reward", "completions/mean_length", "update/num_skipped"):
        assert metrics["true"][key] == metrics["false"][key], key
    if mode != "disabled":
        assert metrics["true"]["replay/agreement"] == metrics["true"]["replay/coverage"] == 1.0
    for dealt, kept in zip(results["true"], results["false"], strict=True):
        first, second = dealt[-1][0], kept[-1][0]
        assert first.keys() == second.keys() and len(first) > 20
        scale = max(float(value.abs().max()) for value in second.values())
        assert scale > 0
        for name, value in second.items():
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5 * scale)


def test_a_dealt_run_that_is_resumed_is_the_one_that_was_not_stopped(
    recipe: Recipes, tmp_path: Path
) -> None:
    settings = {
        "data__train": uneven(tmp_path),
        "optimizer__lr_scheduler": "constant",
        "checkpoint__export": "false",
    }
    whole = recipe(run__max_steps=2, run__output_dir=tmp_path / "whole", **settings)
    run(whole, world_size=2)
    for steps in (1, 2):
        parts = recipe(run__max_steps=steps, run__output_dir=tmp_path / "parts", **settings)
        run(parts, world_size=2)
    assert metrics_of(parts) == metrics_of(whole)
    tensors = load_file(whole.model.path / "model.safetensors").values()
    # Trained in float32, and exported as such to the engine in the process.
    sizes = {record["sync/bytes"] for record in metrics_of(whole)}
    assert sizes == {4.0 * sum(tensor.numel() for tensor in tensors)}


def test_e1_a_wrong_route_of_a_dealt_sample_is_found_and_named_by_its_prompt(
    recipe: Recipes, tmp_path: Path
) -> None:
    # The last sample of the step is the second rank's. Prompts of 3 and 30 words beside it.
    made = recipe(data__train=uneven(tmp_path), data__shuffle="false", **LONG)
    last = lambda prompt, number: (prompt, number) == (7, 3)  # noqa: E731
    with pytest.raises(
        MisalignmentError,
        match=r"sample 31 \(prompt 7, server engine of rank 1, policy version 0\)",
    ):
        run(made, world_size=2, make_engine=wrong(one_row_late, last))
    (healthy,) = run(made, world_size=2)
    assert healthy["replay/dropped_samples"] == healthy["replay/suspects"] == 0.0


# ---- hand_over ------------------------------------------------------------------------------


def some_sets(rng: np.random.Generator, count: int) -> Candidates:
    sets = [np.flatnonzero(rng.random(9) > 0.5) for _ in range(count)]
    return Candidates.of_sets(sets, rng.random(count).astype(np.float32))


def sampled(rank: int, lengths: list[int]) -> Iterator[tuple[Any, Completion, RoutingTrace]]:
    rng = np.random.default_rng([SEED, rank])
    for number, length in enumerate(lengths):
        ids = rng.integers(0, 99, length).astype(np.int32)
        routes = rng.random((length + 2, 3, 300)).argsort(axis=2)[..., :4]
        origin = Origin.single(
            engine="test", engine_version="1", policy_version=rank, num_rows=length + 2
        )
        trace = RoutingTrace.record(
            routes,
            token_ids=np.concatenate([[1, 2], ids]),
            valid=rng.random(length + 2) > 0.2,
            layers=(1, 2, 5),
            num_experts=300,
            origin=origin,
        )
        # Of several turns, with tokens of an environment between them, where it is long.
        mask = np.arange(length) % 3 != 1 if length > 5 else None
        num_sampled = length if mask is None else int(mask.sum())
        completion = Completion(
            token_ids=ids,
            rollout_logprobs=rng.random(num_sampled).astype(np.float32),
            trace=None,
            finish_reason=FinishReason.STOP,
            policy_version=rank,
            server=f"http://s{rank}",
            turn_mask=mask,
            # Of a rank that samples whole distributions there are none.
            candidates=some_sets(rng, num_sampled) if rank == 0 else None,
        )
        yield (rank, number), completion, trace


LENGTHS = [[5, 0, 40, 3], [7], []]
TO = {(0, 0): 1, (0, 1): 2, (0, 2): 2, (0, 3): 0, (1, 0): 2}


def _handed(piece: int, routed: bool, spoil: bool) -> Any:
    dealing.PIECE_BYTES = piece
    rank = all_ranks().rank
    replica = lone_replica((1, 2, 5))
    object.__setattr__(replica, "number", rank)
    object.__setattr__(replica, "siblings", all_ranks())
    sizes: list[int] = []
    exchange = HostGroup.exchange

    def counting(self: HostGroup, outgoing: Any, incoming: Any) -> Any:
        sizes.append(sum(map(len, outgoing)))
        received = exchange(self, outgoing, incoming)
        if spoil and rank == 2:
            received = [part.copy() for part in received]
            for part in received:
                part[:1] ^= 1
        return received

    HostGroup.exchange = counting
    mine = list(sampled(rank, LENGTHS[rank]))
    own = {key: completion for key, completion, _ in mine}
    traces = {key: trace for key, _, trace in mine} if routed else {}
    kept, held = hand_over(replica, own, traces, TO)
    assert not traces
    everything = {key: (c, t) for r in range(3) for key, c, t in sampled(r, LENGTHS[r])}
    wrong = []
    for key, completion in kept.items():
        expected, trace = everything[key]
        if routed:
            try:
                held[key].check_tokens(np.concatenate([[1, 2], completion.token_ids]), where="here")
            except TokenMismatchError:
                wrong.append(key)
            assert held[key].form == trace.form and held[key].origin == trace.origin
            if not np.array_equal(held[key].expert_ids, trace.expert_ids):
                wrong.append(key)
            np.testing.assert_array_equal(held[key].valid, trace.valid)
        if not np.array_equal(completion.token_ids, expected.token_ids):
            wrong.append(key)
        np.testing.assert_array_equal(completion.rollout_logprobs, expected.rollout_logprobs)
        assert (completion.candidates is None) == (expected.candidates is None)
        if completion.candidates is not None and expected.candidates is not None:
            for name in ("counts", "ids", "kept_mass"):
                ours, theirs = (getattr(c.candidates, name) for c in (completion, expected))
                np.testing.assert_array_equal(ours, theirs)
        if expected.turn_mask is None:
            assert completion.turn_mask is None
        else:
            np.testing.assert_array_equal(completion.turn_mask, expected.turn_mask)
        assert (completion.server, completion.policy_version) == (
            expected.server,
            expected.policy_version,
        )
    return sorted(kept), sorted(held), wrong, sizes


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_completions_and_traces_arrive_whole_where_they_are_trained(
    piece: int, routed: bool
) -> None:
    print("seed", SEED)
    results = run_ranks(_handed, 3, piece, routed, False)
    assert [kept for kept, *_ in results] == [[(0, 3)], [(0, 0)], [(0, 1), (0, 2), (1, 0)]]
    for kept, held, wrong_, sizes in results:
        assert held == (kept if routed else [])
        assert wrong_ == []
        # Four completions move, one at a time or all at once.
        assert len(sizes) == (4 if piece == 1 else 1)


def test_control_a_byte_that_changed_on_the_way_is_seen() -> None:
    results = run_ranks(_handed, 3, 1 << 20, True, True)
    # The first byte from rank 0 is a route, as its completion is empty; that from rank 1 a token.
    assert [set(wrong_) for _, _, wrong_, _ in results] == [set(), set(), {(0, 1), (1, 0)}]


# ---- more microbatches than samples ------------------------------------------------------------


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_ranks_with_one_long_sample_run_along_with_those_of_several_short_ones(
    dispatcher: str, workspace: Path, tmp_path: Path
) -> None:
    text = (workspace / "recipe.toml").read_text()
    micro = workspace / "micro.toml"
    micro.write_text(text.replace("max_tokens_per_microbatch = 160", "micro_batch_size = 1"))
    words = [30, 3, 3, 3]
    lines = [{"prompt": " ".join(str(n * k % 10) for k in range(n // 2))} for n in words]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {
        "data__train": path,
        "data__shuffle": "false",
        "rollout__dtype": "float32",
        "rollout__num_generations": 2,
        "batch__global_batch_size": 8,
        "run__max_steps": 1,
        "megatron__expert_model_parallel_size": 2,
        "megatron__moe_token_dispatcher_type": dispatcher,
    }
    found, counted = {}, {}
    for balance in ("false", "true"):
        keys = {**settings, "batch__balance": balance, "run__output_dir": tmp_path / balance}
        made = load_recipe(micro, [(k.replace("__", "."), str(v)) for k, v in keys.items()])
        results = stepped(made, 4)
        found[balance] = results[0][-1][0]
        counted[balance] = [(len(work[0]), counts[0]) for _, _, work, counts, *_ in results]
        (record,) = metrics_of(made)
        assert record["replay/agreement"] == record["replay/coverage"] == 1.0
    # Samples and microbatches of each rank: two long ones, and six that are shared by the others.
    assert counted == {"false": [(2, 2)] * 4, "true": [(1, 3), (1, 3), (3, 3), (3, 3)]}
    scale = max(float(value.abs().max()) for value in found["false"].values())
    assert scale > 0
    for name, value in found["false"].items():
        torch.testing.assert_close(found["true"][name], value, rtol=1e-4, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of four layers, the first dense."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("four"), mlp_only_layers=[0])


@pytest.mark.parametrize(("mode", "coeff"), [("R3", 0.0), ("R2", 0.5)])
@pytest.mark.parametrize("samples", [3, 5])
def test_t10_a_pipeline_that_needs_more_microbatches_than_samples_runs_some_of_padding(
    samples: int,
    mode: str,
    coeff: float,
    recipe: Recipes,
    four_layers: Path,
    workspace: Path,
    tmp_path: Path,
) -> None:
    settings = {
        "model__path": four_layers,
        "replay__router_replay_mode": mode,
        "rollout__dtype": "float32",
        "rollout__num_generations": samples,
        "batch__global_batch_size": samples,
        # One completion each: 3 make 4, 5 make 6.
        "batch__max_tokens_per_microbatch": 42,
        "megatron__moe_aux_loss_coeff": coeff,
        "run__max_steps": 1,
        "grpo__scale_rewards": "none",
        "rewards": f"[{{function = '{workspace}/reward.py:likes_low_ids'}}]",
    }
    interleaved = {
        "megatron__pipeline_model_parallel_size": 2,
        "megatron__virtual_pipeline_model_parallel_size": 2,
    }
    one = recipe(run__output_dir=tmp_path / "one", **settings)
    two = recipe(run__output_dir=tmp_path / "two", **settings, **interleaved)
    ((*_, (alone,)),), staged = stepped(one, 1), stepped(two, 2)
    assert [counts for _, _, _, counts, *_ in staged] == [[samples + 1]] * 2
    scale = max(float(value.abs().max()) for value in alone.values())
    assert scale > 0
    for *_, (found,) in staged:
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * scale)
    (expected,), (record,) = metrics_of(one), metrics_of(two)
    assert record.keys() == expected.keys()
    # The loss of equal weights is the mean advantage, which is 0 but for rounding.
    assert abs(record["loss"] - expected["loss"]) < 1e-5
    for key in ("grad_norm", "entropy/mean", "replay/coverage"):
        assert record[key] == pytest.approx(expected[key], rel=1e-4), key
    if coeff:
        name = "load_balancing_loss"
        assert record[name] == pytest.approx(expected[name], rel=1e-4)
