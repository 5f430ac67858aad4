"""A whole file is the new one or the old one, and nothing lies beside it."""

import os
from pathlib import Path

import pytest

from moe_replay.routing.format.whole_file import whole_file


def test_a_file_appears_when_all_of_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"n" * 100_000)
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"n" * 100_000
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_block_that_raises_leaves_what_was_there(tmp_path: Path, is_there: bool) -> None:
    path = tmp_path / "a.json"
    if is_there:
        path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"n" * 100_000)
        raise KeyboardInterrupt
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"old"] * is_there


def test_a_process_that_dies_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        with whole_file(path) as file:
            file.write(b"n" * 100_000)
            file.flush()
            os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert path.read_bytes() == b"old"


def test_a_folder_that_is_not_there_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "no" / "a.json"):
        pass
