"""Write a Hugging Face checkpoint directory from a stream of named tensors.

In: tensors one at a time, and the checkpoint that the model came from. Out: a complete directory,
with experts stacked as that checkpoint stacks them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_replay.checkpoint.files import (
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsCheckpoint,
    in_stored_layout,
)

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def write_checkpoint(
    tensors: Iterable[tuple[str, Tensor]],
    source_dir: str | Path,
    output_dir: str | Path,
    *,
    max_shard_bytes: int,
) -> None:
    """Write tensors as safetensors, in the layout of the source, beside copies of its other files.

    Holds at most one shard in memory, and the experts of one layer where the source stacks them.
    Works in `<output_dir>.partial` and renames it at the end.
    """
    output = Path(output_dir)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    file_of: dict[str, str] = {}
    num_bytes, dtypes = 0, set()
    with SafetensorsCheckpoint(source_dir) as source:
        layout = source.stored
    for number, shard in enumerate(_shards(in_stored_layout(tensors, layout), max_shard_bytes)):
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
