"""Folders that no dead process leaves behind."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from moe_replay.engines.servers.push_files import OwnFolder
from moe_replay.errors import RecipeError

OWNER = """
import sys, time
from pathlib import Path
from moe_replay.engines.servers.push_files import OwnFolder
folder = OwnFolder(Path(sys.argv[1]), "push-")
(folder.path / "weights").write_bytes(b"x" * 1000)
print(folder.path, flush=True)
time.sleep(3600)
"""


def test_e10_the_folder_of_a_killed_owner_is_swept_and_that_of_a_living_one_stays(tmp_path):
    owners = [
        subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        killed, living = (tmp_path / owner.stdout.readline().strip() for owner in owners)
        owners[0].send_signal(signal.SIGKILL)
        owners[0].wait()
        assert (killed / "weights").exists()
        with OwnFolder(tmp_path, "push-") as folder:
            assert not killed.exists()
            assert (living / "weights").exists()
            assert sorted(tmp_path.iterdir()) == sorted([living, folder.path])
        assert list(tmp_path.iterdir()) == [living]
    finally:
        for owner in owners:
            owner.kill()
            owner.wait()
            owner.stdout.close()


def test_folders_of_others_are_left_alone(tmp_path):
    for name in ("push-not-ours", "other-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "other-1" / "lock").touch()
    with OwnFolder(tmp_path, "push-") as folder:
        assert folder.path.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other-1", "push-not-ours"]


def test_a_parent_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="name a folder that exists"):
        OwnFolder(tmp_path / "nowhere", "push-")
