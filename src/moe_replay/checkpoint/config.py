"""Read the config of a checkpoint by one set of rules for trainer, engines and doctor.

Code of a checkpoint is never run, and there is no option to allow it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from moe_replay.errors import RecipeError, UnsupportedError

_LAYERS, _TOPK = "num_hidden_layers", ("num_experts_per_tok", "moe_k")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Keys that are integers wherever they occur, and the lowest sensible value.
_MINIMUM: Mapping[str, int] = {
    **dict.fromkeys(
        (
            "decoder_sparse_step",
            "head_dim",
            "hidden_size",
            "intermediate_size",
            "kv_lora_rank",
            "max_position_embeddings",
            "moe_intermediate_size",
            "n_group",
            "num_attention_heads",
            "num_key_value_heads",
            "q_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "shared_expert_intermediate_size",
            "topk_group",
            "v_head_dim",
            "vocab_size",
            _LAYERS,
        ),
        1,
    ),
    **dict.fromkeys(
        (
            "first_k_dense_replace",
            "n_shared_experts",
            "num_nextn_predict_layers",
            *_TOPK,
            *_EXPERTS,
        ),
        0,
    ),
}
# Expert ids have at most 16 bits, and no existing model has more layers either.
_MAXIMUM = {key: 1 << 16 for key in (_LAYERS, *_EXPERTS)}
# Any other size: torch counts elements in 64 bits.
_MAXIMUM_OF_ANY = 1 << 31
_POSITIVE = ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "factor")


def read_config_json(model_dir: str | Path) -> dict[str, Any]:
    """Return the config.json of a checkpoint, after checking every number that decides a size.

    Raises:
        RecipeError: it is missing, is not a JSON object, or holds an impossible value.
    """
    path = Path(model_dir) / "config.json"
    config = read_json_object(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise RecipeError(
            f"{path} has model_type {model_type!r}, expected the name of an architecture, such as 'qwen3_moe'; the file "
            "is likely not a Hugging Face config, or was edited"
        )
    for table in _tables(config):
        _check_numbers(table, path)
    return config


def load_config(model_dir: str | Path) -> Any:
    """Return the transformers config of a checkpoint directory, with defaults for what it omits.

    Raises:
        RecipeError: config.json cannot be read, or transformers refuses it.
        UnsupportedError: its architecture is not one of transformers' own, or its weights are
            quantized.
    """
    from transformers import AutoConfig, __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    path = Path(model_dir)
    raw = read_config_json(path)
    model_type = raw["model_type"]
    if model_type not in CONFIG_MAPPING_NAMES:
        code = (
            " Its auto_map names code that comes with the checkpoint, which is never run."
            if "auto_map" in raw
            else ""
        )
        raise UnsupportedError(
            f"{path / 'config.json'} has model_type {model_type!r}, which transformers {__version__} does not know, so "
            f"no model can be built.{code} Use a checkpoint of an architecture that is part of transformers"
        )
    _refuse_quantized(raw, path)
    with refused_by_library(
        f"{path / 'config.json'} is rejected by transformers",
        "restore the config of the original checkpoint",
    ):
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def load_generation_config(model_dir: str | Path) -> Any:
    """Return the transformers generation config of a checkpoint directory, if it has one.

    Raises:
        RecipeError: generation_config.json cannot be read.
    """
    from transformers import GenerationConfig

    path = Path(model_dir) / "generation_config.json"
    if not path.is_file():
        return None
    read_json_object(path)
    with refused_by_library(
        f"{path} is rejected by transformers", "restore the original file, or remove it"
    ):
        return GenerationConfig.from_pretrained(path.parent, local_files_only=True)


def refuse_nested(config: Mapping[str, Any], path: Path) -> None:
    """Raise `UnsupportedError` for a model whose language model is one part of several."""
    text = config.get("text_config")
    if isinstance(text, dict):
        num_experts = count_experts(text)
        what = f"{num_experts} experts" if num_experts else "no experts"
        raise UnsupportedError(
            f"{path} describes a multimodal model, {config.get('model_type')!r}: its language model is nested in "
            f"text_config (model_type {text.get('model_type')!r}, {what}), beside parts that are not text. Only "
            "checkpoints of a pure language model can be trained: use one of those"
        )


def count_experts(config: Mapping[str, Any]) -> int:
    """Return the routed experts a layer by a config; 0 for a dense model."""
    given = [config.get(key) for key in _EXPERTS]
    return max((number for number in given if isinstance(number, int)), default=0)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        RecipeError: the file is missing, cannot be decoded, holds a non-finite number, or is not an
            object.
    """

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            refuse(text)
        return value

    def refuse(text: str) -> NoReturn:
        raise RecipeError(
            f"{path} holds the number {text}, expected finite numbers only; restore the original file"
        )

    try:
        found = json.loads(
            path.read_text(encoding="utf-8"), parse_float=finite, parse_constant=refuse
        )
    except FileNotFoundError:
        raise RecipeError(
            f"{path.parent} holds no {path.name}: expected a Hugging Face checkpoint directory with config.json, "
            "safetensors and tokenizer"
        ) from None
    except RecipeError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} cannot be read: {error}; restore the original file") from error
    if not isinstance(found, dict):
        raise RecipeError(
            f"{path} holds a {type(found).__name__}, expected an object; restore the original file"
        )
    return found


def _tables(config: dict[str, Any]) -> list[dict[str, Any]]:
    nested = [config.get(name) for name in ("text_config", "rope_parameters", "rope_scaling")]
    return [config, *(table for table in nested if isinstance(table, dict))]


def _check_numbers(config: Mapping[str, Any], path: Path) -> None:
    for key, lowest in _MINIMUM.items():
        value = config.get(key)
        # A list has one value a layer, in families that only transformers runs.
        if value is None or isinstance(value, list):
            continue
        highest = _MAXIMUM.get(key, _MAXIMUM_OF_ANY)
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise RecipeError(
                f"{path} has {key} = {value!r} ({type(value).__name__}), expected an integer from {lowest} to "
                f"{highest}; the file was likely edited or damaged: restore the original"
            )
    for key in _POSITIVE:
        value = config.get(key)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or value <= 0
        ):
            raise RecipeError(
                f"{path} has {key} = {value!r}, expected a number above 0; restore the original file"
            )
    named = {key: config[key] for key in _EXPERTS if isinstance(config.get(key), int)}
    if len(set(named.values())) > 1:
        raise RecipeError(
            f"{path} has {' and '.join(f'{key} = {value}' for key, value in named.items())}, which are names of the "
            "same number: libraries would read different ones; remove the wrong one"
        )
    num_experts = count_experts(config)
    for key in _TOPK:
        topk = config.get(key)
        if not num_experts or not isinstance(topk, int) or 1 <= topk <= num_experts:
            continue
        raise RecipeError(
            f"{path} has {key} = {topk} with {num_experts} experts, expected from 1 to {num_experts}: the experts of a "
            "token are distinct; restore the original file"
        )
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise RecipeError(
            f"{path} has num_attention_heads = {heads} and num_key_value_heads = {groups}, expected a multiple; restore "
            "the original file"
        )


def _refuse_quantized(config: Mapping[str, Any], path: Path) -> None:
    for table in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            found = table.get(key) if isinstance(table, dict) else None
            if found:
                method = found.get("quant_method") if isinstance(found, dict) else None
                raise UnsupportedError(
                    f"{path} is a quantized checkpoint ({key}, quant_method {method!r}): its weights are codes with scales, "
                    "but training needs plain ones; use the bfloat16 checkpoint of the model, or dequantize "
                    "this one first"
                )


@contextlib.contextmanager
def refused_by_library(what: str, advice: str) -> Iterator[None]:
    """Turn whatever a library raises about a checkpoint into a `RecipeError` of one line.

    Values that pass our own checks can still raise anything in transformers, and the tokenizers
    library raises bare `Exception`. Advice to run code of the checkpoint is not repeated.
    """
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            text = "it needs code that comes with the checkpoint, which is never run"
        text = text if len(text) <= 300 else f"{text[:297]}..."
        raise RecipeError(f"{what}: {type(error).__name__}: {text}; {advice}") from error
