"""The tokenizer of a checkpoint, loaded without any network and without running code of the checkpoint.

In: a checkpoint directory. Out: a transformers tokenizer, or the refusal that every caller gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_replay.checkpoint.config import reason
from moe_replay.errors import RecipeError, shortened

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files of which a tokenizer has at least one."""


def load_tokenizer(model_dir: Path) -> Any:
    """Load the tokenizer of a checkpoint directory, without any network and without running code of the checkpoint.

    Raises:
        RecipeError: when the directory or its tokenizer is missing or unreadable.
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

    try:
        return AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    # The tokenizers library raises bare Exception on a damaged file.
    except Exception as error:
        raise RecipeError(
            f"the tokenizer in {model_dir} cannot be loaded: {reason(error)}. Copy the tokenizer files of the original "
            "checkpoint again"
        ) from error


def no_checkpoint(model_dir: Path) -> str:
    """Return what to say where a checkpoint directory is missing; a name of the hub is given back as its download.

    Example:
        >>> no_checkpoint(Path("/recipes/Qwen/Qwen3-30B-A3B")).partition("with `")[2]
        'hf download Qwen/Qwen3-30B-A3B --local-dir Qwen3-30B-A3B`'
    """
    # A recipe's paths are absolute: that a name ORG/NAME was meant shows in a folder ORG that does not exist either.
    is_name = not model_dir.parent.exists()
    name = f"{model_dir.parent.name}/{model_dir.name}" if is_name else "ORG/NAME"
    folder = name.partition("/")[2]
    return (
        f"model.path {model_dir} is not a directory: expected a local Hugging Face checkpoint with config.json, "
        f"safetensors and tokenizer. A model of the Hugging Face hub is downloaded with `hf download {name} --local-dir "
        f"{folder}`"
    )


def find_tokenizer(model_dir: Path) -> Any | None:
    """Return the tokenizer of a checkpoint directory; None when it has none, as a model made for tests."""
    if not any((model_dir / name).is_file() for name in TOKENIZER_FILES):
        return None
    return load_tokenizer(model_dir)


def num_known_ids(tokenizer: Any) -> int:
    """Return the number of token ids up to the last that a tokenizer knows; a model's vocabulary is often padded beyond."""
    return max(tokenizer.get_vocab().values()) + 1
