"""The tokenizer of a checkpoint, loaded without network access and without running its code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_replay.checkpoint.config import refused_by_library
from moe_replay.errors import RecipeError, shortened

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""A tokenizer has at least one of these files."""


def load_tokenizer(model_dir: Path) -> Any:
    """Load the tokenizer of a checkpoint directory, without network and without running its code.

    Raises:
        RecipeError: the directory or its tokenizer is missing or unreadable.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise RecipeError(no_checkpoint(model_dir))
    if not any((model_dir / name).is_file() for name in TOKENIZER_FILES):
        found = shortened(sorted(file.name for file in model_dir.iterdir())) or "nothing"
        raise RecipeError(
            f"no tokenizer in {model_dir}: expected tokenizer.json (with tokenizer_config.json), found {found}. Copy "
            "the tokenizer files of the original checkpoint into it"
        )
    from transformers import AutoTokenizer

    with refused_by_library(
        f"the tokenizer in {model_dir} cannot be loaded",
        "copy the tokenizer files of the original checkpoint again",
    ):
        return AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )


def no_checkpoint(model_dir: Path) -> str:
    """Return the message for a missing checkpoint directory, with the command to download it.

    Examples:
        >>> no_checkpoint(Path("/recipes/Qwen/Qwen3-30B-A3B")).partition("with `")[2]
        'hf download Qwen/Qwen3-30B-A3B --local-dir Qwen3-30B-A3B`'
    """
    # Paths of a recipe are absolute; if the parent folder is missing too, a hub name ORG/NAME was
    # meant.
    is_name = not model_dir.parent.exists()
    name = f"{model_dir.parent.name}/{model_dir.name}" if is_name else "ORG/NAME"
    folder = name.partition("/")[2]
    return (
        f"model.path {model_dir} is not a directory: expected a local Hugging Face checkpoint with config.json, "
        f"safetensors and tokenizer. Download a model of the Hugging Face hub with `hf download {name} --local-dir "
        f"{folder}`"
    )


def find_tokenizer(model_dir: Path) -> Any | None:
    """Return the tokenizer of a checkpoint directory, or None, as for models made for tests."""
    if not any((model_dir / name).is_file() for name in TOKENIZER_FILES):
        return None
    return load_tokenizer(model_dir)


def num_known_ids(tokenizer: Any) -> int:
    """Return the highest known token id plus 1; vocabularies are often padded beyond it."""
    return max(tokenizer.get_vocab().values()) + 1
