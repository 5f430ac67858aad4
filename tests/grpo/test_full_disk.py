"""Runs on a disk that is really full: a small file system of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_replay.errors import CheckpointError
from moe_replay.recipe.recipe import Recipe

from .test_loop import run

pytestmark = pytest.mark.ranks
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, *, free: int) -> Path:
    """Write a file that leaves so many bytes."""
    filler = disk / "filler"
    with filler.open("wb") as out:
        stats = subprocess.run(
            ["df", "--output=avail", "-B1", str(disk)], capture_output=True, text=True, check=True
        )
        out.write(bytes(int(stats.stdout.split()[1]) - free))
    return filler


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("world_size", "room"),
    # Half of what is needed is seen before anything is written, nearly all of it is not.
    [(1, 0.5), (2, 0.95)],
)
def test_r5_a_full_disk_costs_no_checkpoint_and_the_run_goes_on_with_room(
    world_size: int, room: float, recipe: Callable[..., Recipe], disk: Path
) -> None:
    def steps(count: int) -> Recipe:
        where = {"run__output_dir": disk / "out", "checkpoint__export": "false"}
        return recipe(run__max_steps=count, **where)

    run(steps(1), world_size=world_size)
    folder = disk / "out" / "checkpoints"
    whole = size_of(folder / "step-000001")
    assert 2 * whole < 24 * MIB
    filler = fill(disk, free=int(room * whole))
    for _ in range(2):
        # The second time nothing may be left of the first.
        with pytest.raises(CheckpointError) as caught:
            run(steps(2), world_size=world_size)
        assert "the disk is full" in str(caught.value)
        assert "step 1 is the newest whole checkpoint" in str(caught.value)
        assert [path.name for path in folder.iterdir()] == ["step-000001"]
    filler.unlink()
    records = run(steps(2), world_size=world_size)
    assert [record["step"] for record in records] == [1, 2]


def test_r5_an_export_that_finds_no_room_leaves_the_one_before(
    recipe: Callable[..., Recipe], disk: Path
) -> None:
    output = disk / "out"
    settings = {"run__output_dir": output, "checkpoint__save_total_limit": 1}
    run(recipe(run__max_steps=1, **settings))
    exported = (output / "export" / "model.safetensors").read_bytes()
    run(recipe(run__max_steps=2, checkpoint__export="false", **settings))
    filler = fill(disk, free=len(exported) // 2)
    with pytest.raises(
        CheckpointError, match=r"export\.new failed.*the disk is full.*step 2 is complete"
    ):
        run(recipe(run__max_steps=2, **settings))
    assert (output / "export" / "model.safetensors").read_bytes() == exported
    assert not list(output.glob("export.new*"))
    filler.unlink()
    run(recipe(run__max_steps=2, **settings))
    assert (output / "export" / "model.safetensors").read_bytes() != exported
