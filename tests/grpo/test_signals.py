"""Commands that schedulers and people stop: exit codes, messages, and the next start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moe_replay.recipe.load import load_recipe

from .test_interruptions import metrics_of
from .test_loop import run

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
TRAIN = ("-m", "moe_replay.cli.main", "train")
STEPS = 3
REWARD = """
import os
import time
from pathlib import Path

HERE = Path(__file__).parent
calls = 0


def likes_digits(completions, **columns):
    global calls
    calls += 1
    if calls == 2 and (HERE / "hang").exists() and os.environ.get("RANK", "0") == "0":
        (HERE / "reached").open("w").close()
        while (HERE / "hang").exists():
            time.sleep(0.01)
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]
"""


class Home:
    """A folder with a recipe, in which rewards hang from the second on while ``hang`` exists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "reward.py").write_text(REWARD)
        os.mkfifo(folder / "reached")

    def settings(self, output: str) -> dict[str, Any]:
        return {
            "run.output_dir": self.folder / output,
            "run.max_steps": STEPS,
            "checkpoint.save_steps": 10,
            "checkpoint.export": "false",
        }

    def command(self, output: str, *more: str, launcher: tuple[str, ...] = ()) -> list[str]:
        given = [
            p for key, value in self.settings(output).items() for p in (f"--{key}", str(value))
        ]
        return [sys.executable, *launcher, *TRAIN, str(self.folder / "recipe.toml"), *given, *more]

    @contextmanager
    def hanging(
        self, output: str, *more: str, launcher: tuple[str, ...] = ()
    ) -> Iterator[subprocess.Popen[str]]:
        """Start a run, and wait until its second reward hangs."""
        (self.folder / "hang").touch()
        with subprocess.Popen(
            self.command(output, *more, launcher=launcher),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
        ) as process:
            try:
                # Returns when the reward has opened it too.
                (self.folder / "reached").open().close()
                yield process
            finally:
                (self.folder / "hang").unlink(missing_ok=True)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def finish(self, output: str) -> None:
        """Train to the end, without a command of its own."""
        (self.folder / "hang").unlink(missing_ok=True)
        given = {key: str(value) for key, value in self.settings(output).items()}
        run(load_recipe(self.folder / "recipe.toml", list(given.items())))

    def ended(self, output: str) -> dict[str, Any]:
        return json.loads((self.folder / output / "ended.json").read_text())


@pytest.fixture
def home(workspace: Path, tmp_path: Path) -> Home:
    shutil.copytree(workspace, tmp_path / "home")
    return Home(tmp_path / "home")


@pytest.mark.timeout(900)
def test_r8_a_run_that_is_stopped_again_and_again_ends_as_the_uninterrupted_one(
    home: Home,
) -> None:
    for finished, (number, code) in enumerate(
        [(signal.SIGTERM, 75), (signal.SIGINT, 130)], start=1
    ):
        with home.hanging("stopped") as process:
            process.send_signal(number)
            said, _ = process.communicate()
        assert process.returncode == code, said
        told = f"stopped by {number.name} after step {finished} of {STEPS}, which is saved"
        assert told in " ".join(said.split())
        saved = sorted(path.name for path in (home.folder / "stopped" / "checkpoints").iterdir())
        assert saved[-1] == f"step-{finished:06d}"
        assert home.ended("stopped")["step"] == finished
    home.finish("stopped")
    assert home.ended("stopped") == {"step": STEPS, "max_steps": STEPS, "stopped_by": None}
    whole = {"run.output_dir": home.folder / "whole", "run.max_steps": STEPS}
    run(load_recipe(home.folder / "recipe.toml", [(k, str(v)) for k, v in whole.items()]))
    folders = home.folder / "stopped", home.folder / "whole"
    assert metrics_of(folders[0]) == metrics_of(folders[1])
    lines = [(folder / "completions.jsonl").read_text() for folder in folders]
    assert lines[0] == lines[1]


@pytest.mark.timeout(900)
def test_r8_a_signal_to_one_of_two_ranks_stops_both(home: Home) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    with home.hanging("two", launcher=launcher) as process:
        holder = json.loads((home.folder / "two" / "run.lock").read_text())
        os.kill(holder["pid"], signal.SIGTERM)
        said, _ = process.communicate()
    # torchrun has a code of its own for whatever its workers end with.
    assert process.returncode != 0
    assert home.ended("two") == {"step": 1, "max_steps": STEPS, "stopped_by": "SIGTERM"}, said
    assert "exitcode  : 75" in said
    saved = [path.name for path in (home.folder / "two" / "checkpoints").iterdir()]
    assert saved == ["step-000001"]


@pytest.mark.timeout(600)
def test_r8_a_run_whose_time_is_over_says_so_and_asks_for_another_start(home: Home) -> None:
    # Over before the first step, however fast the machine is.
    done = subprocess.run(
        home.command("late", "--run.max_time", "1s"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 75, done.stderr
    assert "stopped by run.max_time = 1s before the" in done.stderr
