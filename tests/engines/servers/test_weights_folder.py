"""The folder of a run's pushes: gone when the run is, however it ended, and never before."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from moe_replay.engines.servers.push_files import WeightsFolder
from moe_replay.errors import EngineError

PUSHING = """
import sys, time
from pathlib import Path
from moe_replay.engines.servers.push_files import WeightsFolder

folder = WeightsFolder(Path(sys.argv[1]))
print(folder.save("push-1", "model-00000.safetensors", [memoryview(b"half a push")]), flush=True)
time.sleep(3600)
"""


def begun(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """Start a process that pushes; return it in the middle of that, with the file that it wrote."""
    process = subprocess.Popen(
        [sys.executable, "-c", PUSHING, str(parent)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    written = process.stdout.readline().strip()
    assert written, "the process ended before it wrote a file"
    return process, Path(written)


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_e10_what_a_killed_trainer_left_is_swept_when_the_next_one_starts(tmp_path):
    """Of two runs in one folder one is killed in the middle of a push; the other's files stay."""
    (killed, left), (living, kept) = begun(tmp_path), begun(tmp_path)
    try:
        end(killed)
        assert left.read_bytes() == kept.read_bytes() == b"half a push"
        folder = WeightsFolder(tmp_path)
        own = folder.save("push-1", "model-00000.safetensors", [memoryview(b"ours")])
        assert not left.parent.parent.exists()
        assert kept.read_bytes() == b"half a push" and own.read_bytes() == b"ours"
        folder.close()
    finally:
        end(killed), end(living)
    folder = WeightsFolder(tmp_path)
    folder.save("push-1", "model-00000.safetensors", [memoryview(b"next")])
    assert not kept.exists()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_e10_a_folder_of_another_machine_stays(tmp_path):
    process, left = begun(tmp_path)
    end(process)
    (left.parent.parent / "lock").write_text("another-machine")
    folder = WeightsFolder(tmp_path)
    folder.save("push-1", "model-00000.safetensors", [memoryview(b"ours")])
    assert left.exists()
    folder.close()


def test_a_push_is_gone_when_it_is_over_and_the_folder_when_the_run_is(tmp_path):
    folder = WeightsFolder(tmp_path)
    first = folder.save("push-1", "model-00000.safetensors", [memoryview(b"a")])
    folder.remove("push-1")
    assert not first.exists() and first.parent.parent.exists()
    folder.close()
    folder.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parent_mode", "expected"), [(0o700, (0o700, 0o600)), (0o2750, (0o750, 0o640))]
)
def test_files_can_be_read_by_the_group_of_a_folder_with_the_set_group_id_bit(
    tmp_path, parent_mode, expected
):
    parent = tmp_path / "weights"
    parent.mkdir()
    parent.chmod(parent_mode)
    before = os.umask(0o022)
    try:
        folder = WeightsFolder(parent)
        file = folder.save("push-1", "model-00000.safetensors", [memoryview(b"a")])
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) & 0o777 for path in (file.parent, file)]
    assert tuple(modes) == expected
    assert stat.S_IMODE(file.parent.parent.stat().st_mode) & 0o777 == expected[0]
    folder.close()


def test_too_little_room_is_told_before_anything_is_written(tmp_path):
    folder = WeightsFolder(tmp_path)
    with pytest.raises(EngineError, match=r"--shm-size.*rollout\.weights_dir"):
        folder.need_room(1 << 60)
    folder.need_room(1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EngineError, match=r"cannot be used.*shared?"):
        WeightsFolder(tmp_path / "gone").need_room(1)
