"""Hollow checkpoints: the headers of every tensor of a real model, without its numbers.

In: a config.json. Out: a directory that passes every check before weights are read. A model of any
size takes some megabytes: the files are sparse, and reading a tensor gives zeros.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from moe_replay.checkpoint.config import load_config
from moe_replay.checkpoint.files import INDEX_FILE
from moe_replay.checkpoint.stacked import usual_parts
from moe_replay.testing.tiny_models import character_tokenizer

# As released checkpoints; a reader maps a shard at a time, which must stay below the memory here.
_SHARD_BYTES = 4 * 10**9
_BYTES = {"BF16": 2, "F32": 4}
_EXPERT_BIAS = "e_score_correction_bias"


def write_hollow_checkpoint(path: str | Path, config: str | Path) -> Path:
    """Write a hollow checkpoint for a config.json, with a tokenizer of one token a character.

    Weights are bfloat16, expert biases float32. Prediction layers are omitted, as checkpoints may.

    Examples:
        >>> write_hollow_checkpoint(tmp_path, "recipes/qwen3-30b-a3b/model/config.json")
    """
    from transformers import AutoModelForCausalLM

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    character_tokenizer().save_pretrained(path)
    shutil.copy(config, path / "config.json")
    loaded = load_config(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded, trust_remote_code=False)
    shapes = {
        name: part.shape
        for stored, tensor in model.state_dict().items()
        for name, part in usual_parts(stored, tuple(tensor.shape), loaded.model_type)
    }
    if loaded.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    end = total = 0
    for name, shape in shapes.items():
        size = prod(shape) * _BYTES[_dtype(name)]
        if end + size > _SHARD_BYTES and shards[-1]:
            shards.append({})
            end = 0
        shards[-1][name] = shape
        end, total = end + size, total + size
    index: dict[str, str] = {}
    for number, part in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(path / file, part)
        index |= dict.fromkeys(part, file)
    (path / INDEX_FILE).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return path


def _dtype(name: str) -> str:
    return "F32" if name.endswith(_EXPERT_BIAS) else "BF16"


def _write_shard(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * _BYTES[_dtype(name)]
        header[name] = {"dtype": _dtype(name), "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        # A hole: it takes no space on disk.
        out.truncate(8 + len(text) + end)
