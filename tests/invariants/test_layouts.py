"""A replayed step is the same in every layout and schedule, and each route meets its token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moe_replay.batch import RankPlace
from moe_replay.megatron.ranks.replica import Peer
from moe_replay.routing import RowIndex
from moe_replay.testing.layouts import (
    CASES,
    SEED,
    Case,
    Plant,
    Step,
    coded_samples,
    layout,
    replayed_step,
    route,
)
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import shift_layers, shift_tokens, swap_samples

LAYERS = tuple(range(1, 8))
LATENT_LAYERS = (1, 2, 3)
BOUND = 1e-5
"""Relative; float32 reductions in another order."""


@cache
def alone(checkpoint: Path, layers: tuple[int, ...]) -> Step:
    """Return the step of a single process."""
    (step,) = run_ranks(replayed_step, 1, checkpoint, Case(layout=layout(), ranks=1), layers)
    return step


@pytest.fixture(autouse=True)
def seed_is_printed() -> None:
    """Print the seed of the coded routes."""
    print("seed", SEED)


def assert_same_step(steps: list[Step], expected: Step) -> None:
    assert expected.grad_norm > 0
    found: dict[int, np.ndarray] = {}
    for step in steps:
        found |= step.old_logprobs
        assert step.loss == pytest.approx(expected.loss, rel=BOUND)
        assert step.grad_norm == pytest.approx(expected.grad_norm, rel=BOUND)
        assert step.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            error = (step.gradients[name] - gradient).norm() / (gradient.norm() + 1e-12)
            assert error < BOUND, name
    assert found.keys() == expected.old_logprobs.keys()
    for sample_id, values in expected.old_logprobs.items():
        error = np.abs(found[sample_id] - values).max() / np.abs(values).max()
        assert error < BOUND, sample_id


def tokens_of(step: Step) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return layer -> (inputs, sample ids, positions) of all tokens of a single process."""
    found: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    times: dict[int, int] = {}
    for seen in step.seen:
        sample, position = step.rows[times.setdefault(seen.layer, 0)]
        times[seen.layer] += 1
        real = sample >= 0
        found.setdefault(seen.layer, []).append((seen.hidden[real], sample[real], position[real]))
    joined = {}
    for layer, parts in found.items():
        hidden, sample, position = zip(*parts, strict=True)
        joined[layer] = np.concatenate(hidden), np.concatenate(sample), np.concatenate(position)
    return joined


def count_landings(steps: Iterable[Step], expected: Step) -> tuple[int, int]:
    """Return how many (token, layer) pairs ran the experts coded for them, and how many ran others.

    Which token a row holds is told by its hidden state: that of the single process is nearest.
    """
    reference = tokens_of(expected)
    right = wrong = 0
    for step in steps:
        for seen in step.seen:
            known, samples, positions = reference[seen.layer]
            distance = np.linalg.norm(seen.hidden[:, None] - known[None], axis=2)
            nearest = distance.argmin(axis=1)
            for row, token in enumerate(nearest):
                if distance[row, token] > 1e-3 * np.linalg.norm(known[token]):
                    continue
                sample, position = int(samples[token]), int(positions[token])
                coded = np.zeros(seen.chosen.shape[1], dtype=bool)
                coded[route(sample, position, seen.layer)] = True
                if has_route(sample, position):
                    right += int((seen.chosen[row] == coded).all())
                    wrong += int((seen.chosen[row] != coded).any())
    return right, wrong


@cache
def lengths() -> dict[int, int]:
    """Return sample id -> tokens."""
    return {sample.sample_id: len(sample.token_ids) for sample in coded_samples((1,))}


def has_route(sample: int, position: int) -> bool:
    return position % 9 != 8 and position != lengths()[sample] - 1


def num_routes(layers: tuple[int, ...]) -> int:
    return len(layers) * sum(
        has_route(sample, position)
        for sample, length in lengths().items()
        for position in range(length)
    )


@pytest.mark.ranks
@pytest.mark.parametrize("name", CASES)
def test_replayed_step_equals_that_of_a_single_process(checkpoint: Path, name: str) -> None:
    case, expected = CASES[name], alone(checkpoint, LAYERS)
    steps = run_ranks(replayed_step, case.ranks, checkpoint, case, LAYERS)
    assert_same_step(steps, expected)
    right, wrong = count_landings(steps, expected)
    assert (right, wrong) == (num_routes(LAYERS), 0)
    recorded = {i: trace for step in steps for i, trace in step.recorded.items()}
    for sample_id, trace in expected.recorded.items():
        flips = np.sort(recorded[sample_id].expert_ids) != np.sort(trace.expert_ids)
        assert recorded[sample_id].layers == trace.layers
        assert flips.any(axis=(1, 2)).sum() == 0, sample_id


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["tp2", "ep2", "pp2", "cp2", "tp2 ep2"])
def test_latent_attention_and_biased_groups_equal_a_single_process(
    latent_checkpoint: Path, name: str
) -> None:
    case, expected = CASES[name], alone(latent_checkpoint, LATENT_LAYERS)
    steps = run_ranks(replayed_step, case.ranks, latent_checkpoint, case, LATENT_LAYERS)
    assert_same_step(steps, expected)
    assert count_landings(steps, expected) == (num_routes(LATENT_LAYERS), 0)


class ContiguousRows(RankPlace):
    """Takes context parallelism for a cut into one stretch a rank."""

    def router_index(self, lengths: Sequence[int], *, row_multiple: int = 1) -> RowIndex:
        return RowIndex.packed(
            lengths, cp_size=self.cp_size, cp_rank=self.cp_rank, cp_partition="contiguous"
        )


class ReversedRows(RankPlace):
    """Takes the rows from the last to the first."""

    def router_index(self, lengths: Sequence[int], *, row_multiple: int = 1) -> RowIndex:
        index = super().router_index(lengths, row_multiple=row_multiple)
        return replace(index, rows=index.rows[::-1].copy())


def taken_for(kind: type[RankPlace]) -> Plant:
    """Plant another idea of which rows a rank holds."""
    return Plant(
        peer=lambda peer: replace(
            peer, place=kind(**{f.name: getattr(peer.place, f.name) for f in fields(RankPlace)})
        )
    )


def first_shard(peer: Peer) -> Peer:
    return replace(peer, place=replace(peer.place, tp_rank=0))


def contiguous_layers(peer: Peer) -> Peer:
    """Return as many layers as the rank has, from its first on, as if its chunks lay together."""
    return replace(peer, layers=tuple(range(peer.layers[0], peer.layers[0] + len(peer.layers))))


def layers_from_the_first(peer: Peer) -> Peer:
    return replace(peer, layers=LAYERS[: len(peer.layers)])


PLANTED = {
    "token +1": ("tp2", Plant(samples=lambda samples: shift_tokens(samples, 1))),
    "token -1": ("cp2", Plant(samples=lambda samples: shift_tokens(samples, -1))),
    "layer +1": ("pp2", Plant(samples=lambda samples: shift_layers(samples, 1))),
    "layer -1": ("pp2 vpp2", Plant(samples=lambda samples: shift_layers(samples, -1))),
    "swapped samples": ("dp2", Plant(samples=swap_samples)),
    "contiguous rows under context parallelism": ("cp2", taken_for(ContiguousRows)),
    "every shard takes the rows of the first": ("tp2", Plant(peer=first_shard)),
    "rows in another order": ("dp2", taken_for(ReversedRows)),
    "interleaved chunks taken as one range of layers": ("pp2 vpp2", Plant(peer=contiguous_layers)),
    "every stage takes the layers of the first": ("pp2", Plant(peer=layers_from_the_first)),
}


@pytest.mark.ranks
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_misalignment_lands_on_the_wrong_tokens(checkpoint: Path, planted: str) -> None:
    name, plant = PLANTED[planted]
    case, expected = CASES[name], alone(checkpoint, LAYERS)
    steps = run_ranks(replayed_step, case.ranks, checkpoint, case, LAYERS, plant)
    _, wrong = count_landings(steps, expected)
    assert wrong > 0.02 * num_routes(LAYERS)
    with pytest.raises(AssertionError):
        assert_same_step(steps, expected)
