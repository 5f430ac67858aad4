"""Adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_replay.errors import CheckpointError
from moe_replay.megatron.disk import SharedWrite
from moe_replay.megatron.lora.adapters import Adapters
from moe_replay.megatron.ranks.messages import all_ranks
from moe_replay.megatron.ranks.pace import in_step
from moe_replay.recipe.sections.lora import LoraSection

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_EXPERTS = ".mlp.experts."
PEFT_VERSION = "0.21.2"
"""The release of PEFT whose files these are; it reads theirs by this."""
_PLAIN = {"bias": "none"}
"""Key of PEFT's `LoraConfig` -> its value for plain LoRA, where that is not false or empty."""
_WITHOUT_EFFECT = frozenset(
    {
        *("peft_type", "peft_version", "auto_mapping", "task_type", "inference_mode", "revision"),
        *("base_model_name_or_path", "runtime_config", "megatron_core", "qalora_group_size"),
        # What they say shows in the matrices that the files hold, or is compared elsewhere.
        *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform"),
        *("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights"),
    }
)
"""Keys whose value leaves what the matrices compute as it is."""
_PLAIN_STARTS = frozenset({"gaussian", "orthogonal"})
"""Values of ``init_lora_weights`` that leave the frozen weights alone."""
_NOT_READ = (
    "such an adapter is not read: merge it into its model in PEFT (merge_and_unload), where that can "
    "be done, and name that model as model.path"
)


NOT_CONVERTED = frozenset({"mixtral", "qwen2_moe"})
"""Families whose experts transformers 5 fuses, and for which that PEFT does not fuse adapters."""


def save_adapter(adapters: Adapters, lora: LoraSection, base: Path, output: Path) -> None:
    """Write a folder that PEFT and vLLM load; every rank calls it, the first one writes.

    Each expert has matrices of its own, under the names that it had in transformers 4 and has in
    vLLM. The folder appears under its name only when it is complete.

    Raises:
        CheckpointError: it exists already, or cannot be written; raised on every rank.
    """
    write = SharedWrite(output)
    is_first = all_ranks().rank == 0
    refusal = None
    if is_first and output.exists():
        refusal = CheckpointError(f"{output} exists already; refusing to mix two adapters")
    all_ranks().raise_together(refusal)
    held: dict[str, Tensor] = {}
    for name, tensor in in_step(adapters.tensors(), all_ranks()):
        if is_first:
            held[PREFIX + name] = tensor.cpu().contiguous()
    with write.part():
        if is_first:
            partial = output.with_name(f"{output.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(held, partial / WEIGHTS_FILE, metadata={"format": "pt"})
            config = adapter_config(adapters, lora, base)
            (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
            partial.rename(output)
    write.finish()


def adapter_config(adapters: Adapters, lora: LoraSection, base: Path) -> dict[str, Any]:
    """Return what PEFT's `LoraConfig` reads.

    rsLoRA is written as the alpha with the same effect: where PEFT joins gate and up projections of
    experts it doubles rank and alpha, which leaves alpha / rank alone and not alpha / sqrt(rank).
    """
    alpha = lora.scale * lora.rank
    return {
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "target_modules": sorted({_projection(name) for name in adapters.shapes}),
        "target_parameters": _beside_experts(adapters.shapes) or None,
        "bias": "none",
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _projection(name: str) -> str:
    return name.split(".")[-3]


def _beside_experts(names: Iterable[str]) -> list[str]:
    """Return the weights of dense layers and shared experts, if routed experts have adapters too.

    PEFT takes ``gate_proj`` for the fused parameter of all routed experts, wherever it stands, and
    would leave those of other layers out without a word, unless they are named as parameters.

    Example: ``["mlp.shared_expert.gate_proj.weight"]``.
    """
    names = list(names)
    routed = {_projection(name) for name in names if _EXPERTS in name}
    return sorted(
        {
            ".".join([*name.split(".")[3:-2], "weight"])
            for name in names
            if _EXPERTS not in name and _projection(name) in routed
        }
    )


def load_adapter(adapters: Adapters, lora: LoraSection) -> None:
    """Take the adapter of ``lora.adapter``; every rank calls this, and reads the files itself.

    Raises:
        CheckpointError: it is not an adapter that this recipe can go on with: another rank, alpha
            or set of matrices, or a form that only PEFT computes.
    """
    assert lora.adapter is not None
    refusal = None
    try:
        tensors = _read(lora.adapter, lora, adapters.shapes)
        adapters.take_whole(tensors)
    except CheckpointError as error:
        refusal = error
    all_ranks().raise_together(refusal)


def check_adapter(lora: LoraSection) -> None:
    """Compare the configuration of ``lora.adapter`` with the recipe, without reading a matrix.

    Raises:
        CheckpointError: as `load_adapter`.
    """
    assert lora.adapter is not None
    _check_config(lora.adapter, lora)


def _read(
    folder: Path, lora: LoraSection, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    _check_config(folder, lora)
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; lora.adapter names its folder"
        ) from error
    missing, unexpected = sorted(shapes.keys() - tensors), sorted(tensors.keys() - shapes)
    if missing or unexpected:
        what = [
            f"{len(names)} {word}, such as {names[0]}"
            for word, names in (("are missing", missing), ("are not expected", unexpected))
            if names
        ]
        raise CheckpointError(
            f"{path}: of its matrices {' and '.join(what)}. Set lora.target_modules to what the adapter was trained on; one "
            "with fused experts (lora_A of all experts in one matrix) is not read: convert it to one matrix an expert"
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name] or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensor.shape)}, expected {list(shapes[name])} of finite numbers; it "
                "belongs to another model, or is damaged"
            )
    return tensors


def _check_config(folder: Path, lora: LoraSection) -> None:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; lora.adapter names a folder that PEFT has written"
        ) from error
    rank, kind = config.get("r", 8), config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {kind!r}, expected 'LORA'; {_NOT_READ}")
    if rank != lora.rank:
        raise CheckpointError(
            f"{path}: r is {rank!r}, expected {lora.rank}; set lora.rank = {rank}"
        )
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool | None) and start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}, expected true, false, {' or '.join(sorted(_PLAIN_STARTS))}: other starts may "
            f"change the frozen weights too, or what is computed; {_NOT_READ}"
        )
    for key, found in config.items():
        plain = _PLAIN.get(key)
        if key not in _WITHOUT_EFFECT and (found or None) != plain:
            expected = repr(plain) if plain else repr(type(found)())
            raise CheckpointError(f"{path}: {key} is {found!r}, expected {expected}; {_NOT_READ}")
    alpha, by_root = config.get("lora_alpha", 8), bool(config.get("use_rslora"))
    scale = alpha / (lora.rank**0.5 if by_root else lora.rank)
    if not math.isclose(scale, lora.scale, rel_tol=1e-6):
        raise CheckpointError(
            f"{path}: its adapters are multiplied by {scale:g} (lora_alpha = {alpha}, use_rslora = {by_root}), expected "
            f"{lora.scale:g} of lora.alpha = {lora.alpha:g}, lora.rslora = {str(lora.rslora).lower()}; set lora.alpha = {alpha}, "
            f"lora.rslora = {str(by_root).lower()}"
        )
