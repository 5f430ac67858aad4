"""A recipe with all its files, and an environment that is restored after each test."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from moe_replay.checkpoint.config import load_config
from moe_replay.checkpoint.files import SINGLE_FILE
from moe_replay.checkpoint.stacked import has_usual_names, usual_parts
from moe_replay.testing.tiny_models import character_tokenizer

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Put back what the command sets for torch."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def write_zero_weights(path: Path) -> None:
    """Write zeros for every tensor that the config.json in `path` calls for."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = load_config(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    zeros = {
        name: torch.zeros(part.shape, dtype=torch.bfloat16)
        for stored, tensor in model.state_dict().items()
        for name, part in usual_parts(stored, tuple(tensor.shape), config.model_type)
    }
    save_file(zeros, path / SINGLE_FILE, metadata={"format": "pt"})


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a recipe, its dataset and a checkpoint of zeros."""

    def write(*, config: dict[str, Any] | None = None, **sections: Any) -> Path:
        model = tmp_path / "model"
        character_tokenizer().save_pretrained(model)
        (model / "config.json").write_text(json.dumps(CONFIG if config is None else config))
        if has_usual_names((config or CONFIG)["model_type"]):
            write_zero_weights(model)
        rows = [{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(8)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        table: dict[str, Any] = {
            "run": {"output_dir": "out", "max_steps": 2},
            "model": {"path": "model"},
            "data": {"train": "train.jsonl", "max_prompt_length": 16},
            "rewards": [{"function": "exact_match"}],
            "rollout": {"max_completion_length": 8, "num_generations": 4},
            "batch": {"global_batch_size": 8, "max_tokens_per_microbatch": 128},
        }
        for name, keys in sections.items():
            table[name] = {**table.get(name, {}), **keys} if isinstance(keys, dict) else keys
        path = tmp_path / "recipe.toml"
        path.write_text(tomlkit.dumps(table))
        return path

    return write
