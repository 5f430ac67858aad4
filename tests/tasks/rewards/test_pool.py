"""A reward function in several processes: order, failures of one of them, and their end."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_replay.errors import RecipeError, RewardError
from moe_replay.recipe.sections.run import RewardSection
from moe_replay.tasks.encoding import Prompt
from moe_replay.tasks.rewards.batch import Batch
from moe_replay.tasks.rewards.rewards import RewardSet, ScoredBatch

WAITS_S = 300.0
CODE = """
import os, time
from pathlib import Path

HERE = Path(__file__).parent

def meet(completions, log_metric, folder, count):
    # Returns once as many processes are here at the same time.
    (HERE / folder).mkdir(exist_ok=True)
    (HERE / folder / str(os.getpid())).touch()
    until = time.monotonic() + 300
    while len(list((HERE / folder).iterdir())) < count:
        assert time.monotonic() < until, "nobody came"
        os.sched_yield()
    log_metric("size", len(completions))
    return [float(ord(text)) for text in completions]

def ends_on_b(completions):
    if "b" in completions: os._exit(4)
    return [1.0] * len(completions)

def hangs_on_b(completions):
    while "b" in completions: os.sched_yield()
    return [2.0] * len(completions)

def hangs(completions):
    (HERE / f"pid{os.getpid()}").touch()
    while True: os.sched_yield()

def raises_on_b(completions):
    if "b" in completions: raise ValueError("no b")
    while True: os.sched_yield()

def meets_or_stays_on_b(completions, log_metric):
    if "b" not in completions: return meet(completions, log_metric, "all", 2)
    (HERE / "stays").touch()
    while True: os.sched_yield()

def size(completions, trainer_state, dataset):
    return [100.0 * trainer_state.global_step + len(completions) + 0.1 * len(dataset[0])] * len(completions)

async def waits(completions): return [0.0] * len(completions)
"""


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., RewardSet]]:
    """Return a function that opens functions by name, with keys of their tables."""
    (tmp_path / "pooled.py").write_text(CODE)
    opened: list[RewardSet] = []

    def load(**functions: dict[str, Any]) -> RewardSet:
        opened.append(
            RewardSet.load(
                [
                    RewardSection(
                        function=f"{tmp_path}/pooled.py:{name}", **{"num_workers": 2} | keys
                    )
                    for name, keys in functions.items()
                ]
            )
        )
        return opened[-1]

    yield load
    for each in opened:
        each.close()


def prompts_of(texts: str, *, each: int = 1, names: str = "") -> list[Prompt]:
    """Return the prompt of each completion, ``each`` of them for one."""
    ids = np.array([1], dtype=np.int32)
    every = [
        Prompt(index=n, text="p", prompt_ids=ids, columns={}, dataset=names[n : n + 1])
        for n in range(len(texts) // each)
    ]
    return [every[n // each] for n in range(len(texts))]


def score(rewards: RewardSet, texts: str, *, each: int = 1, **keys: Any) -> ScoredBatch:
    """Score one completion a letter."""
    names = keys.pop("names", "")
    asked = prompts_of(texts, each=each, names=names)
    return rewards.score(asked, list(texts), [[1]] * len(texts), **keys)


def test_parts_hold_whole_prompts_and_all_completions_once_and_in_order() -> None:
    for num_prompts in range(1, 9):
        for count in range(1, 12):
            texts = "x" * (3 * num_prompts)
            batch = Batch(
                prompts=prompts_of(texts, each=3),
                completions=texts,
                completion_ids=[[1]] * len(texts),
                state=(0, 0),
            )
            parts = batch.parts(batch.rows, count)
            assert [row for part in parts for row in part] == list(range(3 * num_prompts))
            assert len(parts) == min(count, num_prompts)
            sizes = {len(part) for part in parts}
            assert all(size % 3 == 0 for size in sizes) and max(sizes) - min(sizes) <= 3


def test_processes_work_at_once_and_scores_stay_in_order(load: Callable[..., RewardSet]) -> None:
    rewards = load(meet={"args": {"folder": "a", "count": 2}})
    # One process alone would wait for another that never comes.
    found = score(rewards, "aaaabbbbccccdddd", each=4)
    assert found.total.tolist() == [float(ord(each)) for each in "aaaabbbbccccdddd"]
    # Each call had one prompt.
    assert found.logged == {"size": (16.0, 4)}
    alone = load(meet={"args": {"folder": "b", "count": 1}, "num_workers": 1})
    assert score(alone, "aaaabbbbccccdddd", each=4).logged == {"size": (16.0, 1)}


def test_state_and_dataset_reach_every_process(load: Callable[..., RewardSet]) -> None:
    found = score(load(size={}), "abcd", state=(3, 9), names="xyxy")
    assert found.total.tolist() == [301.1] * 4


def test_a_process_that_ends_or_hangs_is_replaced_and_loses_its_part_alone(
    load: Callable[..., RewardSet],
) -> None:
    ends = load(ends_on_b={"on_failure": "drop"})
    hangs = load(hangs_on_b={"on_failure": "zero", "timeout_s": 5.0})
    for _ in range(2):
        found = score(ends, "abca")
        assert found.failed["ends_on_b"].tolist() == [False, True, False, False]
        np.testing.assert_array_equal(found.total, [1, np.nan, 1, 1])
        assert "exit code 4" in found.notes[0] and len(found.notes) == 1
        found = score(hangs, "abca")
        assert found.failed["hangs_on_b"].tolist() == [False, True, False, False]
        assert found.total.tolist() == [2, 0, 2, 2]
        assert "still running after 5 s" in found.notes[0]
    # The control: one call on all of them loses all.
    shared = load(hangs_on_b={"on_failure": "zero", "timeout_s": 5.0, "num_workers": 1})
    assert score(shared, "abca").failed["hangs_on_b"].all()


def test_a_failure_that_is_not_tolerated_stops_and_names_the_completion(
    load: Callable[..., RewardSet],
) -> None:
    rewards = load(ends_on_b={})
    with pytest.raises(RewardError, match=r"ends_on_b .* exit code 4.*; on sample 2 .*'b'"):
        score(rewards, "aaba", each=2)
    assert score(rewards, "aaca", each=2).total.tolist() == [1.0] * 4


def test_an_interrupt_ends_all_processes_and_the_next_batch_starts_new_ones(
    load: Callable[..., RewardSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = load(hangs={}, size={"num_workers": 1})

    def interrupted(*_: object) -> None:
        until = time.monotonic() + WAITS_S
        while len(list(tmp_path.glob("pid*"))) < 2:
            assert time.monotonic() < until
            os.sched_yield()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rewards._process, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(rewards, "abcd")
    pids = [int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*")]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_interrupt_ends_processes_that_were_idle_and_the_next_batch_starts_new_ones(
    load: Callable[..., RewardSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = load(meets_or_stays_on_b={}, size={"num_workers": 1})
    score(rewards, "acac", names="xxxx")

    def interrupted(*_: object) -> None:
        until = time.monotonic() + WAITS_S
        while not (tmp_path / "stays").exists():
            assert time.monotonic() < until
            os.sched_yield()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rewards._process, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(rewards, "b")
    assert score(rewards, "acac", names="xxxx").scores["meets_or_stays_on_b"].tolist() == [
        97.0,
        99.0,
        97.0,
        99.0,
    ]


def test_a_failure_that_stops_the_run_waits_for_no_other_part(
    load: Callable[..., RewardSet],
) -> None:
    # Seven parts would each take all of their time.
    rewards = load(raises_on_b={"timeout_s": 100.0})
    with pytest.raises(RewardError, match=r"raises_on_b .* raised ValueError: no b.*on sample 0"):
        score(rewards, "baaaaaaa")
    # Nor does that of a function beside the pool.
    rewards = load(hangs={"timeout_s": 100.0}, ends_on_b={"num_workers": 1})
    with pytest.raises(RewardError, match=r"ends_on_b .* exit code 4.*on sample 2"):
        score(rewards, "aab")


def test_async_functions_stay_on_the_one_loop(load: Callable[..., RewardSet]) -> None:
    with pytest.raises(RecipeError, match="num_workers = 2 with an async function"):
        load(waits={})
    assert score(load(waits={"num_workers": 1}), "ab").total.tolist() == [0.0, 0.0]


def test_a_function_scores_the_completions_of_its_datasets_alone(
    load: Callable[..., RewardSet],
) -> None:
    only = {"datasets": ("x",), "args": {"folder": "c", "count": 1}}
    for workers in (1, 2):
        rewards = load(meet=only | {"num_workers": workers}, size={"num_workers": 1})
        found = score(rewards, "abcd", names="xyyx")
        nan = np.nan
        np.testing.assert_array_equal(found.scores["meet"], [97, nan, nan, 100])
        assert found.scores["size"].tolist() == [4.1] * 4
        # Nobody is asked about a batch without any.
        assert np.isnan(score(rewards, "ab", names="yy").scores["meet"]).all()
    failing = load(ends_on_b={"datasets": ("y",), "num_workers": 1})
    with pytest.raises(RewardError, match=r"on sample 3 .*'b'"):
        score(failing, "abcbab", names="xxyyyx")
