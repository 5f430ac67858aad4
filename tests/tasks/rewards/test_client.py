"""User code in the reward process: its failures are named, and do not affect the trainer."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from moe_replay.tasks.rewards.client import Failure, RewardProcess, Scores

WAITS_S = 120.0
"""How long a test waits for what must come soon, on a machine that may be busy."""

BAD = """
import asyncio, os, re, signal, sys, threading, time

def good(completions): return [1.0] * len(completions)
def exits(completions): sys.exit(0)
async def exits_async(completions): sys.exit(0)
def exits_in_a_task(completions):
    async def leave(): sys.exit(3)
    async def f(): await asyncio.create_task(leave())
    return f()
def interrupts(completions): raise KeyboardInterrupt
async def cancels(completions): raise asyncio.CancelledError
def recurses(completions): return recurses(completions)
def no_memory(completions): raise MemoryError
class Rude(Exception):
    def __str__(self): raise ValueError
def unreadable(completions): raise Rude
class Odd:
    def __getattr__(self, name): raise KeyError(name)
    def __len__(self): raise RuntimeError
def odd(completions): return [Odd()] * len(completions)

def leaves(completions): os._exit(0)
def leaves_in_a_thread(completions):
    thread = threading.Thread(target=os._exit, args=(7,))
    thread.start()
    thread.join()
def crashes(completions): os.kill(os.getpid(), signal.SIGSEGV)
def runs_out_of_memory(completions): os.kill(os.getpid(), signal.SIGKILL)
def closes_everything(completions):
    os.closerange(3, 200)
    return [1.0] * len(completions)

def hangs(completions):
    while True: time.sleep(0.01)
def backtracks(completions): re.fullmatch("(a+)+b", "a" * 60)
async def waits(completions): await asyncio.Event().wait()
"""
LINES = {
    found[1]: number
    for number, text in enumerate(BAD.splitlines(), 1)
    if (found := re.match(r"(?:async )?def (\w+)", text))
}

RAISES = {
    "exits": "SystemExit: 0 (it tried to exit the program)",
    "exits_async": "SystemExit: 0 (it tried to exit the program)",
    "exits_in_a_task": "SystemExit: 3 (it tried to exit the program)",
    "interrupts": "KeyboardInterrupt",
    "cancels": "CancelledError",
    "recurses": "RecursionError",
    "no_memory": "MemoryError",
    "unreadable": "Rude: (its message cannot be read)",
    "odd": "KeyError",
}
ENDS = {
    "leaves": "ended its process with exit code 0",
    "leaves_in_a_thread": "ended its process with exit code 7",
    "crashes": "had its process killed by SIGSEGV",
    "runs_out_of_memory": "had its process killed by SIGKILL (often: the machine is out of memory)",
    "closes_everything": "",
}
HANGS = ("hangs", "backtracks", "waits")
EVERY = ("good", *RAISES, *ENDS, *HANGS)

BATCH = {
    "prompts": ["?"],
    "datasets": [""],
    "rows": [{}],
    "prompt_of": [0, 0],
    "completions": ["a", "b"],
    "lengths": [],
    "state": [0, 1],
    "asked": {},
}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardProcess]:
    """Return one process that holds all functions of BAD; those that hang have a short limit."""
    path = tmp_path_factory.mktemp("bad") / "bad.py"
    path.write_text(BAD)
    process = RewardProcess(
        [
            {"function": f"{path}:{n}", "args": {}, "timeout_s": 0.2 if n in HANGS else WAITS_S}
            for n in EVERY
        ]
    )
    yield process
    process.close()


def call(process: RewardProcess, name: str) -> Scores | Failure:
    (outcome,) = process.score(BATCH, b"", [EVERY.index(name)])
    return outcome if isinstance(outcome, Failure) else outcome.scores


def pid_of(process: RewardProcess) -> int:
    assert process._child is not None
    return process._child._process.pid


@pytest.mark.parametrize("name", RAISES)
def test_r1_exception_of_any_kind_is_named_and_survived(process: RewardProcess, name: str) -> None:
    call(process, "good")
    before = pid_of(process)
    failure = call(process, name)
    assert isinstance(failure, Failure)
    assert failure.kind == "raised"
    assert RAISES[name] in failure.text
    assert call(process, "good") == [1.0, 1.0]
    assert pid_of(process) == before


@pytest.mark.parametrize("name", ENDS)
def test_r1_end_of_the_process_is_named_and_it_starts_again(
    process: RewardProcess, name: str
) -> None:
    failure = call(process, name)
    assert isinstance(failure, Failure)
    assert failure.kind == "crashed"
    assert ENDS[name] in failure.text
    assert call(process, "good") == [1.0, 1.0]


def test_r1_native_crash_is_named_with_the_line(process: RewardProcess) -> None:
    failure = call(process, "crashes")
    assert isinstance(failure, Failure)
    assert f"bad.py, line {LINES['crashes']}" in failure.text


@pytest.mark.parametrize("name", HANGS)
def test_d2_function_that_hangs_is_named_with_its_limit_and_line(
    process: RewardProcess, name: str
) -> None:
    failure = call(process, name)
    assert isinstance(failure, Failure)
    assert failure.kind == "late"
    line = LINES[name] + (name == "hangs")
    assert f"was still running after 0.2 s, at {process._functions[0]['function']}"[:-5] in (
        failure.text
    )
    assert f"bad.py, line {line}" in failure.text
    assert call(process, "good") == [1.0, 1.0]


def test_d2_the_late_one_of_several_is_named(process: RewardProcess) -> None:
    outcomes = process.score(BATCH, b"", [EVERY.index(n) for n in ("hangs", "good", "leaves")])
    kinds = [o.kind if isinstance(o, Failure) else "scores" for o in outcomes]
    assert kinds == ["late", "stopped", "stopped"]
