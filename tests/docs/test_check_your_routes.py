"""The examples of the page for other trainers run, those for Megatron-Core on the real one."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_replay.routing.guard import check_routes

from .test_library import blocks, run

PAGE = Path(__file__).parents[2] / "docs" / "check-your-routes.md"
FRAMEWORKS = ("verl", "Megatron-SWIFT", "slime", "NeMo-RL", "prime-rl")
NUM_SAMPLES, LENGTH, LATE = 32, 24, 5


def test_examples_of_the_call_and_of_row_numbers_run(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(PAGE.read_text(), None, {})
    assert {"check_routes", "RouteWatch", "row_numbers"} <= names.keys()
    assert "sample 17" in capsys.readouterr().out


def test_lines_for_frameworks_are_python_and_each_names_what_was_read() -> None:
    text = PAGE.read_text()
    unrun = re.findall(r"```py\n(.*?)```\n", text, re.DOTALL)
    for code in unrun:
        ast.parse(code)
    needs = (None, "Megatron-Core")
    assert sum(len(blocks(text, need)) for need in needs) + len(unrun) == text.count("```") // 2
    for name in FRAMEWORKS:
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert re.match(r"\nRead at `[0-9a-f]{8}` \(", section), name
        assert "```py\n" in section


def test_row_numbers_shared_out_over_ranks_hold_every_row_with_a_route_once() -> None:
    names = run(PAGE.read_text(), None, {})
    lengths = [7, 2, 12]
    padded = [-(-n // 8) * 8 for n in lengths]
    seen = []
    for cp_rank in range(2):
        for tp_rank in range(2):
            sample, position = names["row_numbers"](
                lengths,
                padded,
                first=4,
                tail=6,
                cp_size=2,
                cp_rank=cp_rank,
                tp_size=2,
                tp_rank=tp_rank,
            )
            assert len(sample) == len(position) == 9  # 16 local rows, padded to 18
            seen += [(int(s), int(p)) for s, p in zip(sample, position, strict=True) if s >= 0]
    assert sorted(seen) == [(4 + i, p) for i, n in enumerate(lengths) for p in range(n - 1)]


def _watched(checkpoint: Path) -> tuple[list[int], list[int]]:
    """Replay by Megatron-Core's RouterReplay; return samples named clean, and with one late."""
    import torch
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    from moe_replay.megatron.scorer import packed_rows
    from moe_replay.testing.policies import start_policy

    names = run(PAGE.read_text(), None, {})
    names = run(PAGE.read_text(), "Megatron-Core", names)
    watch, row_numbers = names["watch"], names["row_numbers"]
    actor = start_policy(checkpoint)
    seats: list[Any] = []
    for router in actor.routers.values():
        # What `moe_enable_routing_replay` does; our own model refuses that flag, because a scope
        # replays in it.
        seats.append(RouterReplay())
        router.router_replay = seats[-1]
    tokens = torch.from_numpy(np.random.default_rng(3).integers(4, 99, (NUM_SAMPLES, LENGTH)))

    def forward(number: int) -> None:
        with torch.no_grad():
            actor.chunks[0](
                tokens[number][None],
                torch.arange(LENGTH)[None],
                None,
                packed_seq_params=packed_rows([LENGTH]),
            )

    recorded: list[list[Any]] = []
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    for number in range(NUM_SAMPLES):
        forward(number)
        recorded.append([seat.get_recorded_indices().clone() for seat in seats])
    assert watch.calls == {}
    numbers = [row_numbers([LENGTH], [LENGTH], first=number) for number in range(NUM_SAMPLES)]
    sample, position = (np.concatenate([each[which] for each in numbers]) for which in (0, 1))

    def named(late: int | None) -> list[int]:
        for number in range(NUM_SAMPLES):
            for seat, ids in zip(seats, recorded[number], strict=True):
                seat.set_target_indices(ids.roll(int(number == late), dims=0))
            RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            forward(number)
        replayed, live = watch.take()
        assert replayed.shape == live.shape == (NUM_SAMPLES * LENGTH, len(seats), 4)
        report = check_routes(replayed, live, sample, position=position, num_experts=16)
        return sorted(finding.sample for finding in report.misaligned)

    assert len(seats) > 1
    return named(None), named(LATE)


@pytest.mark.ranks
def test_watch_around_megatrons_own_replay_names_the_one_sample_that_is_late(
    tmp_path: Path,
) -> None:
    import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports
    from moe_replay.testing.ranks import run_ranks
    from moe_replay.testing.tiny_models import write_tiny_checkpoint

    (clean, late) = run_ranks(_watched, 1, write_tiny_checkpoint(tmp_path))[0]
    assert clean == []
    assert late == [LATE]
