"""Read and write the files of a Hugging Face checkpoint directory.

In: a directory, or a stream of named tensors. Out: tensors one at a time; a complete directory.
Called by: `moe_replay.megatron.weights`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_replay.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


class SafetensorsCheckpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint directory by name; each is read from disk when it is asked for.

    Example:
        >>> with SafetensorsCheckpoint(path) as checkpoint:
        ...     norm = checkpoint["model.norm.weight"]

    Raises:
        CheckpointError: there are no safetensors, or a shard that the index names is not there.
    """

    def __init__(self, directory: str | Path) -> None:
        self._files = contextlib.ExitStack()
        directory = Path(directory)
        index = directory / INDEX_FILE
        if index.is_file():
            file_of = json.loads(index.read_text())["weight_map"]
        elif (directory / SINGLE_FILE).is_file():
            file_of = None
        else:
            raise CheckpointError(
                f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; expected a Hugging Face checkpoint "
                "saved as safetensors"
            )
        paths = [
            directory / name for name in sorted(set(file_of.values()) if file_of else [SINGLE_FILE])
        ]
        if absent := [path.name for path in paths if not path.is_file()]:
            raise CheckpointError(f"{index} names files that are not there: {', '.join(absent)}")
        self._handle_of: dict[str, Any] = {}
        for path in paths:
            handle = self._files.enter_context(safe_open(path, framework="pt"))
            self._handle_of |= dict.fromkeys(handle.keys(), handle)
        if file_of and (absent := sorted(set(file_of) - set(self._handle_of))):
            raise CheckpointError(
                f"{index} names tensors that no file holds: {', '.join(absent[:5])}"
            )

    def __enter__(self) -> SafetensorsCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def __getitem__(self, name: str) -> Tensor:
        return self._handle_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._handle_of)

    def __len__(self) -> int:
        return len(self._handle_of)


def write_checkpoint(
    tensors: Iterable[tuple[str, Tensor]],
    source_dir: str | Path,
    output_dir: str | Path,
    *,
    max_shard_bytes: int,
) -> None:
    """Write tensors as safetensors beside copies of the source checkpoint's other files.

    Holds at most one shard in memory. Works in `<output_dir>.partial` and renames it at the end.

    Raises:
        CheckpointError: `output_dir` exists already.
    """
    output = Path(output_dir)
    if output.exists():
        raise CheckpointError(
            f"{output} exists already; refusing to mix two checkpoints in one directory"
        )
    partial = output.with_name(output.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    file_of: dict[str, str] = {}
    num_bytes, dtypes = 0, set()
    for number, shard in enumerate(_shards(tensors, max_shard_bytes)):
        name = f"shard-{number:05d}"
        save_file(shard, partial / name, metadata={"format": "pt"})
        file_of |= dict.fromkeys(shard, name)
        num_bytes += sum(t.numel() * t.element_size() for t in shard.values())
        dtypes |= {t.dtype for t in shard.values()}
    _name_shards(partial, file_of, num_bytes)
    _copy_other_files(Path(source_dir), partial, dtypes)
    partial.rename(output)


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    used = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and used + size > max_bytes:
            yield shard
            shard, used = {}, 0
        shard[name] = tensor.cpu()
        used += size
    yield shard


def _name_shards(directory: Path, file_of: Mapping[str, str], num_bytes: int) -> None:
    shards = sorted(set(file_of.values()))
    if len(shards) == 1:
        (directory / shards[0]).rename(directory / SINGLE_FILE)
        return
    final = {
        shard: f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number, shard in enumerate(shards, start=1)
    }
    for shard, name in final.items():
        (directory / shard).rename(directory / name)
    index = {
        "metadata": {"total_size": num_bytes},
        "weight_map": {tensor: final[shard] for tensor, shard in file_of.items()},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2))


def _copy_other_files(source: Path, target: Path, dtypes: set[torch.dtype]) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(path, target / path.name)
    config_path = target / "config.json"
    config = json.loads(config_path.read_text())
    if len(dtypes) == 1:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(next(iter(dtypes))).removeprefix("torch.")
        config_path.write_text(json.dumps(config, indent=2) + "\n")
