"""Find the trace files behind a path: a file, a rollout, or a folder that holds one."""

from __future__ import annotations

from pathlib import Path

from moe_replay.engines.files.format import shard_files
from moe_replay.errors import CodecError
from moe_replay.routing import TraceFile

_WRITERS = "`moe-replay rollout` and `moe-replay record` write trace files"


def open_traces(path: str) -> TraceFile:
    """Open a trace file, the shards of a rollout, or the only trace file in a folder.

    Raises:
        CodecError: there is none, or more than one, or it is damaged.
    """
    return TraceFile(*_files(Path(path)))


def manifest_of(path: Path) -> Path:
    """Return the manifest of a rollout, given it or one of its shards; any other path as it is."""
    beside = path.with_name(path.name.rpartition(".shard-")[0] + ".json")
    return beside if path.suffix in (".traces", ".groups") and beside.is_file() else path


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob("*.traces"))
        if len({_owner(each) for each in found}) == 1:
            return sorted(found, key=lambda each: (len(each.name), each.name))
        if found:
            names = ", ".join(each.name for each in found[:8])
            raise CodecError(f"{path} holds {len(found)} trace files; name one of them: {names}")
        what = "a run directory" if (path / "metrics.jsonl").exists() else "a folder"
        raise CodecError(f"{path} is {what} without trace files (*.traces): {_WRITERS}")
    if path.suffix == ".json" and (shards := shard_files(path, ".traces")):
        return shards
    if path.suffix == ".groups" and path.with_suffix(".traces").is_file():
        return [path.with_suffix(".traces")]
    if path.is_file() and _is_text(path):
        raise CodecError(f"{path} is a text file, but trace files are binary: {_WRITERS}")
    return [path]


def _owner(path: Path) -> str:
    """Return the name of the rollout that a trace file is a shard of, or else its own name."""
    return path.name.rpartition(".shard-")[0] or path.name


def _is_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError:
        return False
    return bool(start) and all(byte >= 32 or byte in b"\t\r\n" for byte in start)
