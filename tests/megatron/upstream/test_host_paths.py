"""Shortcuts around Megatron's slow paths give its values and gradients, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe import moe_utils, token_dispatcher

from moe_replay.megatron.upstream import host_paths

SEED = 12


@pytest.fixture
def generator() -> torch.Generator:
    """Return seeded randomness, and say its seed."""
    print("seed", SEED)
    return torch.Generator().manual_seed(SEED)


class Group:
    """A group of ``count`` ranks, as far as cutting frequencies asks."""

    def __init__(self, count: int, rank: int) -> None:
        self.size = lambda: count
        self.rank = lambda: rank


def both(
    shortcut: Callable[[torch.Tensor], torch.Tensor],
    stock: Callable[[torch.Tensor], torch.Tensor],
    given: torch.Tensor,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return value and gradient of both."""
    found = []
    for function in (shortcut, stock):
        leaf = given.clone().requires_grad_()
        value = function(leaf)
        (value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum().backward()
        assert leaf.grad is not None
        found.append((value.detach(), leaf.grad))
    return found


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("Megatron's own function was asked")


def test_they_stand_where_megatron_looks_once() -> None:
    before = token_dispatcher.unpermute
    assert isinstance(before, partial) and before.args == (moe_utils.unpermute,)
    host_paths.install()
    assert token_dispatcher.unpermute is before


def test_rows_of_a_token_are_summed_as_megatron_sums_them(generator: torch.Generator) -> None:
    rows = torch.randn(40, 8, generator=generator)
    tokens = torch.randint(0, 10, (40,), generator=generator)
    # The last token has no row.
    shape = torch.Size([11, 8])
    (value, gradient), (expected, expected_gradient) = both(
        lambda leaf: host_paths.unpermute(never, leaf, tokens, shape),
        lambda leaf: moe_utils.unpermute(leaf, tokens, shape),
        rows,
    )
    assert torch.equal(value, expected) and torch.equal(gradient, expected_gradient)
    assert value[10].eq(0).all() and value.abs().sum() > 0


def test_chunks_in_order_stay_and_others_are_sorted_by_megatron() -> None:
    rows, probs, sizes = torch.arange(6.0)[:, None], torch.arange(6.0), torch.tensor([1, 2, 3])
    kept = host_paths.sort_chunks_by_idxs(never, rows, sizes, torch.arange(3), probs=probs)
    assert kept[0] is rows and kept[1] is probs
    found = token_dispatcher.sort_chunks_by_idxs(rows, sizes, torch.tensor([2, 0, 1]), probs=probs)
    assert found[0][:, 0].tolist() == found[1].tolist() == [3, 4, 5, 0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "rank"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("lengths", [[8, 4, 12], [12]], ids=["several", "one"])
def test_rows_are_rotated_as_megatron_rotates_them(
    lengths: list[int], count: int, rank: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    freqs = torch.outer(torch.arange(12.0), torch.tensor([1.0, 0.1, 1.0, 0.1]))[:, None, None]
    given = torch.randn(sum(lengths) // count, 3, 4, generator=generator).to(dtype)
    stock = rope_utils._apply_rotary_pos_emb_thd.args[0]
    group = Group(count, rank)
    (value, gradient), (expected, expected_gradient) = both(
        lambda leaf: host_paths.apply_rotary_pos_emb_thd(never, leaf, ends, freqs, cp_group=group),
        lambda leaf: stock(leaf, ends, freqs, cp_group=group),
        given,
    )
    assert torch.equal(value, expected) and torch.equal(gradient, expected_gradient)
    assert not torch.equal(value, given)


def test_a_pack_is_never_rotated_by_the_angles_of_another() -> None:
    # As many as rows would be one for each row of the pack.
    freqs = torch.outer(torch.arange(9.0), torch.ones(4))[:, None, None]
    rows = torch.ones(8, 1, 4)
    group = Group(1, 0)

    def rotated(ends: list[int]) -> torch.Tensor:
        given = torch.tensor(ends, dtype=torch.int32)
        return host_paths.apply_rotary_pos_emb_thd(never, rows, given, freqs, cp_group=group)

    one, two = rotated([0, 8]), rotated([0, 4, 8])
    assert torch.equal(one[:4], two[:4])
    # Positions of the second sequence begin again.
    assert torch.equal(two[4:], two[:4]) and not torch.equal(one[4:], two[4:])


def test_what_has_no_shortcut_is_left_to_megatron() -> None:
    asked = []

    def stock(*args: Any, **options: Any) -> str:
        asked.append(options)
        return "stock"

    rows, ends, freqs = torch.ones(4, 1, 8), torch.tensor([0, 4]), torch.ones(4, 1, 1, 4)
    for options in ({}, {"multi_latent_attention": True}, {"rotary_interleaved": True}):
        assert (
            host_paths.apply_rotary_pos_emb_thd(
                stock, rows, ends, freqs, cp_group=Group(1, 0), **options
            )
            == "stock"
        )
    probs = torch.ones(4, 2)
    tokens, shape = torch.arange(4), torch.Size([4, 8])
    assert host_paths.unpermute(stock, rows[:, 0], tokens, shape, probs=probs) == "stock"
    assert host_paths.unpermute(stock, rows[:, 0], tokens, shape, drop_and_pad=True) == "stock"
    assert len(asked) == 5
