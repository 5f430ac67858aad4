"""What user code changes, and what it leaves behind, stays in the reward process."""

from __future__ import annotations

import locale
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.errors import RecipeError, RewardError
from moe_replay.recipe.sections.run import RewardSection
from moe_replay.tasks.encoding import Prompt
from moe_replay.tasks.rewards.client import RewardProcess
from moe_replay.tasks.rewards.rewards import RewardSet

WAITS_S = 120.0
"""How long a test waits for what must come soon, on a machine that may be busy."""


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., RewardSet]]:
    """Return a function that loads functions of a file with the given code."""
    opened: list[RewardSet] = []

    def load(code: str, *names: str, **options: Any) -> RewardSet:
        path = tmp_path / "reward.py"
        path.write_text(code)
        specs = [RewardSection(function=f"{path}:{n}", name=n, **options) for n in names or ("f",)]
        opened.append(RewardSet.load(specs))
        return opened[-1]

    yield load
    for rewards in opened:
        rewards.close()


def ask(count: int, **columns: Any) -> list[Prompt]:
    ids = np.array([1], dtype=np.int32)
    return [Prompt(index=n, prompt_ids=ids, text="?", columns=columns) for n in range(count)]


def score(rewards: RewardSet, completions: list[str], **columns: Any) -> list[float]:
    asked = ask(len(completions), **columns)
    return rewards.score(asked, completions, [[1]] * len(completions)).total.tolist()


def test_r1_sample_that_ends_the_process_is_found(load: Callable[..., RewardSet]) -> None:
    code = "import os\ndef f(completions):\n    return [os._exit(1) if c == 'x' else 0 for c in completions]\n"
    with pytest.raises(
        RewardError,
        match=r"reward f .*ended its process with exit code 1.* on sample 2 .*must|raises",
    ):
        score(load(code), ["a", "b", "x", "d"])


def test_r1_end_of_the_process_at_import_is_a_recipe_error(load: Callable[..., RewardSet]) -> None:
    with pytest.raises(RecipeError, match=r"its import ended its process with exit code 0"):
        load("import os\nos._exit(0)\ndef f(completions): ...\n")


def test_r1_exit_at_import_is_a_recipe_error(load: Callable[..., RewardSet]) -> None:
    with pytest.raises(RecipeError, match=r"cannot be imported: SystemExit: 0 .*reward.py, line 2"):
        load("import sys\nsys.exit(0)\ndef f(completions): ...\n")


def test_d2_import_that_hangs_is_a_recipe_error(load: Callable[..., RewardSet]) -> None:
    code = "import time\nwhile True: time.sleep(0.01)\n"
    with pytest.raises(RecipeError, match=r"its import was still running after 0.2 s.*line 2"):
        load(code, timeout_s=0.2)


def test_d2_none_means_no_opinion(load: Callable[..., RewardSet]) -> None:
    code = "def one(completions): return [None, 1.0, None]\ndef two(completions): return [2.0, 2.0, None]\n"
    rewards = load(code, "one", "two", weight=0.5)
    batch = rewards.score(ask(3), ["a", "b", "c"], [[1]] * 3)
    np.testing.assert_array_equal(batch.scores["one"], [np.nan, 1.0, np.nan])
    np.testing.assert_array_equal(batch.total, [1.0, 1.5, np.nan])


def test_d1_async_functions_share_one_loop_for_the_life_of_the_run(
    load: Callable[..., RewardSet],
) -> None:
    # A lock that someone waits for belongs to the loop of that day; the task goes on while no batch
    # is scored.
    code = """
import asyncio, threading
lock, passed, tasks = asyncio.Lock(), threading.Event(), set()
async def hold():
    async with lock: await asyncio.sleep(0)
async def f(completions):
    await asyncio.gather(*[hold() for _ in range(3)])
    async def later():
        await asyncio.sleep(0)
        passed.set()
    tasks.add(asyncio.create_task(later()))
    return [1.0] * len(completions)
def g(completions):
    passed.wait()
    return [1.0] * len(completions)
"""
    rewards = load(code, "g", "f")
    assert score(rewards, ["a"]) == [2.0]
    assert score(rewards, ["a"]) == [2.0]


def _switches() -> dict[str, Any]:
    return {
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "SIGTERM": signal.getsignal(signal.SIGTERM),
        "SIGALRM": signal.getsignal(signal.SIGALRM),
        "recursion": sys.getrecursionlimit(),
        "locale": locale.setlocale(locale.LC_ALL),
        "numpy": np.random.get_state()[1].tolist(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "seed": torch.initial_seed(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "modules": "reward" in sys.modules,
        "path": list(sys.path),
    }


SWITCHES = """
import locale, os, random, signal, sys
import numpy as np
import torch
def switch():
    os.chdir("/")
    os.environ["HOME"] = "/nowhere"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    sys.setrecursionlimit(500)
    locale.setlocale(locale.LC_ALL, "C")
    random.seed(1)
    np.random.seed(1)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    torch.manual_seed(5)
    torch.use_deterministic_algorithms(True)
    sys.path.append("/nowhere")
switch()
def f(completions):
    switch()
    sys.stdout.close()
    sys.stderr.close()
    return torch.tensor([2.5] * len(completions)).requires_grad_(False)
"""


def test_r2_switches_that_an_import_or_a_call_changes_stay_in_its_process(
    load: Callable[..., RewardSet],
) -> None:
    before = _switches()
    rewards = load(SWITCHES)
    assert score(rewards, ["a"]) == [2.5]
    # The streams that it closed are there again.
    assert score(rewards, ["a"]) == [2.5]
    after = _switches()
    for name, value in before.items():
        assert after[name] == value, name


def test_r11_function_that_closes_its_streams_is_called_again(
    load: Callable[..., RewardSet], capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import sys\ndef f(completions):\n    print('said', flush=True)\n    sys.stdout.close()\n    return [1.0]\n"
    rewards = load(code)
    assert score(rewards, ["a"]) + score(rewards, ["a"]) == [1.0, 1.0]
    rewards.close()
    assert capfd.readouterr().out.splitlines() == ["said", "said"]


def test_r13_changed_columns_stay_in_the_call(load: Callable[..., RewardSet]) -> None:
    code = """
def f(completions, metadata, answer, scale):
    seen = [m.get("seen", 0) + len(a) + len(scale) for m, a in zip(metadata, answer)]
    for m in metadata: m["seen"] = 100
    for a in answer: a.append("!")
    completions.clear(); scale.append(1)
    return seen
def g(completions, metadata): return [m.get("seen", 0) + 10 * len(completions) for m in metadata]
"""
    path = "scale"
    rewards = load(code, "f", args={path: [0]})
    asked = ask(1, metadata={"a": (1, 2)}, answer=["x"])
    for _ in range(2):
        batch = rewards.score(asked * 3, ["a"] * 3, [[1]] * 3)
        assert batch.total.tolist() == [2.0, 2.0, 2.0]
    assert asked[0].columns == {"metadata": {"a": (1, 2)}, "answer": ["x"]}
    both = load(
        code.replace(", scale", "").replace("len(scale)", "1").replace("; scale.append(1)", ""),
        "f",
        "g",
    )
    assert both.score(asked * 2, ["a"] * 2, [[1]] * 2).scores["g"].tolist() == [20.0, 20.0]


def test_column_that_no_process_can_be_given_is_named(load: Callable[..., RewardSet]) -> None:
    rewards = load("def f(completions, answer): return [0.0]\n")
    with pytest.raises(RewardError, match=r"column answer of prompt '\?' holds a builtins.object"):
        score(rewards, ["a"], answer=[object()])


def test_prints_are_passed_on(
    load: Callable[..., RewardSet], capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import os, sys\ndef f(completions):\n    print('héllo', end='')\n    print('x', file=sys.stderr)\n"
        "    os.write(1, b'raw')\n    return [0.0]\n"
    )
    rewards = load(code)
    score(rewards, ["a"])
    rewards.close()
    said = capsys.readouterr()
    assert sorted(said.out) == sorted("hélloraw")
    assert said.err == "x\n"


def test_exit_handlers_of_a_function_run_when_the_set_is_closed(
    load: Callable[..., RewardSet], capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import atexit\natexit.register(print, 'closed')\ndef f(completions): return [1.0]\n"
    load(code).close()
    assert capfd.readouterr().out == "closed\n"


def test_copy_of_the_process_does_not_answer(load: Callable[..., RewardSet]) -> None:
    # An answer of the copy would be taken for that of the next call.
    code = """
import os
calls = []
def f(completions):
    calls.append(1)
    os.fork()
    return [float(len(calls))]
"""
    rewards = load(code)
    assert [score(rewards, ["a"]) for _ in range(3)] == [[1.0], [2.0], [3.0]]


def test_stop_that_a_scheduler_sends_to_every_process_is_left_to_the_trainer(
    load: Callable[..., RewardSet],
) -> None:
    code = """
import os, signal, subprocess, sys
def f(completions):
    for name in ('TERM', 'INT', 'HUP', 'USR1', 'USR2'):
        os.kill(os.getpid(), getattr(signal, 'SIG' + name))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    child.terminate()
    return [child.wait()]
"""
    assert score(load(code), ["a"]) == [-signal.SIGTERM]


def load_files(folder: Path, *functions: str, **files: str) -> RewardSet:
    for name, code in files.items():
        path = folder / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    return RewardSet.load(
        [RewardSection(function=f"{folder}/{f}:f", name=f"r{n}") for n, f in enumerate(functions)]
    )


def test_d7_reward_file_imports_its_neighbour(tmp_path: Path) -> None:
    files = {
        "mine": "from near import value\ndef f(completions): return [value]\n",
        "near": "import mine\nvalue = 2.0\nassert mine.__name__ == 'mine'\n",
    }
    with load_files(tmp_path, "mine.py", **files) as rewards:
        assert score(rewards, ["a"]) == [2.0]


def test_d7_reward_file_in_a_package_imports_relatively(tmp_path: Path) -> None:
    files = {
        "pack__in____init__": "",
        "pack__in__mine": "from .near import value\ndef f(completions): return [value]\n",
        "pack__in__near": "value = 2.0\n",
    }
    with load_files(tmp_path, "pack/mine.py", **files) as rewards:
        assert score(rewards, ["a"]) == [2.0]


def test_d7_two_files_of_one_name_and_one_named_like_a_library(tmp_path: Path) -> None:
    files = {
        "one__in__mine": "def f(completions): return [1.0]\n",
        "two__in__mine": "def f(completions): return [2.0]\n",
        "two__in__json": "def f(completions): return [4.0]\n",
    }
    names = ("one/mine.py", "two/mine.py", "two/json.py")
    with load_files(tmp_path, *names, **files) as rewards:
        assert score(rewards, ["a"]) == [7.0]


def test_d7_working_directory_can_be_imported_from(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(completions): return [3.0]\n")
    spec = RewardSection(function="mine:f", name="f")
    with RewardSet.load([spec], folders=[str(tmp_path)]) as rewards:
        assert score(rewards, ["a"]) == [3.0]


def test_processes_that_a_function_starts_find_it_by_name(tmp_path: Path) -> None:
    code = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
def length(text): return float(len(text))
def f(completions):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(length, completions))
"""
    with load_files(tmp_path, "mine.py", mine=code) as rewards:
        assert score(rewards, ["a", "bcd"]) == [1.0, 3.0]


@contextmanager
def watched(pid: int) -> Iterator[Callable[[], bool]]:
    """Give a function that waits for the end of a process and returns whether it came."""
    fd = os.pidfd_open(pid)
    ready = select.poll()
    ready.register(fd, select.POLLIN)
    try:
        yield lambda: bool(ready.poll(WAITS_S * 1000))
    finally:
        os.close(fd)


def test_process_and_what_it_started_end_with_the_set(load: Callable[..., RewardSet]) -> None:
    code = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
def f(completions): return [os.getpid(), child.pid]
"""
    rewards = load(code)
    own, child = (int(pid) for pid in score(rewards, ["a", "b"]))
    with watched(own) as has_ended, watched(child) as child_has_ended:
        rewards.close()
        assert has_ended()
        assert child_has_ended()


TRAINER = """
import sys
from moe_replay.recipe.sections.run import RewardSection
from moe_replay.tasks.rewards.rewards import RewardSet
from moe_replay.tasks.encoding import Prompt
import numpy as np
rewards = RewardSet.load([RewardSection(function=sys.argv[1], name="f")])
asked = [Prompt(index=0, prompt_ids=np.array([1], dtype=np.int32), text="?", columns={})]
rewards.score(asked, ["a"], [[1]])
"""


def test_process_ends_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    # The function never lets go of the interpreter, so that no thread of its process can act.
    (tmp_path / "reward.py").write_text(
        "import os, re\n"
        "def f(completions):\n"
        "    print(os.getpid(), flush=True)\n"
        "    re.fullmatch('(a+)+b', 'a' * 100)\n"
    )
    command = [sys.executable, "-c", TRAINER, f"{tmp_path}/reward.py:f"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        try:
            with watched(int(trainer.stdout.readline())) as has_ended:
                trainer.kill()
                assert has_ended()
        finally:
            trainer.kill()


def test_set_that_nobody_closes_ends_its_process() -> None:
    process = RewardProcess([{"function": "exact_match", "args": {}, "timeout_s": WAITS_S}])
    process.load()
    assert process._child is not None
    with watched(process._child._process.pid) as has_ended:
        del process
        assert has_ended()
