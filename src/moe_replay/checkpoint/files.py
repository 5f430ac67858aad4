"""Say which file of a checkpoint holds which tensor, by one rule for the trainer and every engine.

Libraries differ in what they read from a folder that says two things: one takes `model.safetensors`, another the index,
a third every safetensors file. Such folders are refused, so that all read the same tensors.

transformers 5 keeps the experts of a layer as two stacked tensors in memory, and can write them so
(`save_original_format=False`). Their parts are offered under the names that the family's checkpoints usually have, one
tensor an expert, and `StoredLayout` puts them back together:

    model.layers.0.mlp.experts.gate_up_proj [experts, 2 x inner, hidden]
        -> model.layers.0.mlp.experts.3.gate_proj.weight  is its [3, :inner]
        -> model.layers.0.mlp.experts.3.up_proj.weight    is its [3, inner:]

In: a checkpoint directory. Out: its tensors by name, each read when it is asked for, with shapes and number formats
known beforehand.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_replay.checkpoint.config import read_config_json, read_json_object
from moe_replay.errors import CheckpointError, UnsupportedError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

NOT_A_WEIGHT = re.compile(r".*rotary_emb\.inv_freq")
"""Names of tensors that are in some checkpoints and never a weight."""

_PLAIN_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Tensors that stand beside the codes of a quantized weight.
_SCALES = re.compile(
    r".*[._](weight_scale(_inv)?|input_scale|scales|qweight|qzeros|g_idx|weight_packed|weight_shape|absmax|scale_inv)"
)
_STACKED = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<half>gate_up_proj|down_proj)")
_LISTED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _ExpertNames:
    """What a family's checkpoints call the parts of an expert, and its MoE block."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    block: str = "mlp"


_NAMES: Mapping[str, _ExpertNames] = {
    "mixtral": _ExpertNames(gate="w1", up="w3", down="w2", block="block_sparse_moe"),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe"),
        _ExpertNames(),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies on disk."""

    file: Path
    """The safetensors file."""
    name: str
    """What the file calls the tensor that holds it."""
    stored_shape: tuple[int, ...]
    """Shape of that tensor."""
    shape: tuple[int, ...]
    """Its own shape."""
    dtype: str
    """Number format, as safetensors spells it, such as ``BF16``."""
    expert: int | None = None
    """Index along dim 0 of a stacked tensor; None for a tensor of its own."""
    rows: slice | None = None
    """Rows of that expert; None for all."""


class SafetensorsCheckpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint directory by name; each is read from disk when it is asked for.

    Example:
        >>> with SafetensorsCheckpoint(path) as checkpoint:
        ...     norm = checkpoint["model.norm.weight"]

    Raises:
        CheckpointError: there are no safetensors, they cannot be read, or libraries would read different tensors.
        UnsupportedError: weights are quantized.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        paths, named = _weight_files(directory)
        with contextlib.ExitStack() as opening:
            self._handles = {path: opening.enter_context(_opened(path)) for path in paths}
            self._places = _places(directory, self._handles)
            if named is not None:
                _check_index(directory / INDEX_FILE, named, self._handles)
            self._files = opening.pop_all()

    def __enter__(self) -> SafetensorsCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        handle = self._handles[place.file]
        if place.expert is None:
            return handle.get_tensor(place.name)
        rows = slice(None) if place.rows is None else place.rows
        return handle.get_slice(place.name)[place.expert, rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def places(self) -> Mapping[str, StoredTensor]:
        """Name -> where it lies, with shape and number format."""
        return self._places

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: place.shape for name, place in self._places.items()}


def in_stored_layout(
    tensors: Iterable[tuple[str, Tensor]], places: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors under the names, and stacked by the rule, of the checkpoint whose ``places`` are given.

    A stacked tensor is yielded when its last part has come, so at most those of one layer wait if the parts come layer
    by layer. Tensors that the checkpoint does not hold pass unchanged.

    Raises:
        CheckpointError: a part of a stacked tensor never came.
    """
    num_parts = Counter((place.file, place.name) for place in places.values())
    waiting: dict[tuple[Path, str], tuple[Tensor, int]] = {}
    for name, tensor in tensors:
        place = places.get(name)
        if place is None or place.expert is None:
            yield name if place is None else place.name, tensor
            continue
        key = (place.file, place.name)
        whole, missing = waiting.get(key) or (
            torch.empty(place.stored_shape, dtype=tensor.dtype),
            num_parts[key],
        )
        whole[place.expert, slice(None) if place.rows is None else place.rows] = tensor.cpu()
        waiting[key] = (whole, missing - 1)
        if missing == 1:
            del waiting[key]
            yield place.name, whole
    if waiting:
        names = some(name for _, name in waiting)
        raise CheckpointError(
            f"parts of {names} were never given, so they cannot be written as the source checkpoint stacks them"
        )


def check_finite(directory: str | Path) -> None:
    """Read every weight of a checkpoint once and refuse values that are not finite.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
    """
    with SafetensorsCheckpoint(directory) as checkpoint:
        for name in checkpoint:
            if not NOT_A_WEIGHT.fullmatch(name):
                refuse_non_finite(name, checkpoint[name])


def refuse_non_finite(name: str, tensor: Tensor) -> None:
    """Raise `CheckpointError` if a weight of a checkpoint holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{name} of the checkpoint holds {count} values of {tensor.numel()} that are not finite; every token would "
            "be sampled from NaN. The run that wrote it likely diverged: take an earlier checkpoint"
        )


def some(names: Iterable[str]) -> str:
    """Return the first names in order, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:_LISTED])
    return shown if len(ordered) <= _LISTED else f"{shown} and {len(ordered) - _LISTED} more"


def has_usual_names(model_type: str) -> bool:
    """Tell whether the names that checkpoints of a family usually have are known here."""
    return model_type in _NAMES


def usual_parts(
    name: str, shape: tuple[int, ...], model_type: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of what a tensor of transformers' own layout is on disk, usually."""
    whole = StoredTensor(file=Path(), name=name, stored_shape=shape, shape=shape, dtype="")
    for usual, part in _parts(whole, _NAMES[model_type]):
        yield usual, part.shape


def _weight_files(directory: Path) -> tuple[list[Path], list[str] | None]:
    """Return the files that hold weights, and the tensors that an index names, if there is one."""
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if (directory / "adapter_config.json").is_file():
        raise UnsupportedError(
            f"{directory} holds adapter_config.json: some libraries would add the adapter to the weights and others "
            "would not; merge it into the checkpoint and give the merged one"
        )
    if not index.is_file():
        if not single.is_file():
            found = some(path.name for path in directory.iterdir() if path.is_file()) or "nothing"
            raise CheckpointError(
                f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}, only {found}; expected a Hugging Face "
                "checkpoint saved as safetensors"
            )
        if others := sorted(
            path.name for path in directory.glob("*.safetensors") if path != single
        ):
            raise CheckpointError(
                f"{directory} holds {SINGLE_FILE} and, without an index, {some(others)}: some libraries read the first "
                "and others all of them; move the files that do not belong to the checkpoint"
            )
        return [single], None
    weight_map = _read_index(index)
    names = sorted(set(weight_map.values()))
    if single.is_file() and names != [SINGLE_FILE]:
        raise CheckpointError(
            f"{directory} holds {SINGLE_FILE} and an index of other files ({some(names)}): some libraries read the first "
            "and others the second; remove those that are not the checkpoint's"
        )
    if absent := [name for name in names if not (directory / name).is_file()]:
        raise CheckpointError(
            f"{index} names files that are not there: {some(absent)}; copy the checkpoint again"
        )
    return [directory / name for name in names], list(weight_map)


def _read_index(index: Path) -> dict[str, str]:
    found = read_json_object(index)
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} has no weight_map, expected a table of tensor names and their files; copy the checkpoint again"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file:
            raise CheckpointError(
                f"{index} says that {name} is in {file!r}, expected the name of a file beside it: nothing outside the "
                "checkpoint is read"
            )
    if not isinstance(found.get("metadata"), dict):
        raise CheckpointError(
            f"{index} has no metadata table, without which transformers does not load it; add "
            '"metadata": {} to the file'
        )
    return weight_map


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}); it is cut short or of another format: copy it again"
        ) from error
    with file:
        yield file


def _check_index(index: Path, named: Iterable[str], handles: Mapping[Path, Any]) -> None:
    held = {name for handle in handles.values() for name in list(handle.keys())}
    if absent := sorted(set(named) - held):
        raise CheckpointError(
            f"{index} names tensors that no file holds: {some(absent)}; copy the checkpoint again"
        )


def _places(directory: Path, handles: Mapping[Path, Any]) -> dict[str, StoredTensor]:
    file_of: dict[str, Path] = {}
    places: dict[str, StoredTensor] = {}
    names: _ExpertNames | None = None
    stored = {path: list(handle.keys()) for path, handle in handles.items()}
    if any(_STACKED.fullmatch(name) for held in stored.values() for name in held):
        names = _NAMES.get(read_config_json(directory)["model_type"])
    for path, held in stored.items():
        for name in held:
            if name in file_of:
                raise CheckpointError(
                    f"{file_of[name].name} and {path.name} of {directory} both hold {name}: which one counts differs "
                    "between libraries; remove the one that does not belong to the checkpoint"
                )
            file_of[name] = path
            view = handles[path].get_slice(name)
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
            _check_plain(directory, name, dtype)
            whole = StoredTensor(file=path, name=name, stored_shape=shape, shape=shape, dtype=dtype)
            for usual, part in _parts(whole, names):
                if usual in places:
                    raise CheckpointError(
                        f"{directory} holds {usual} twice, once as a part of {name} or of "
                        f"{places[usual].name}; remove one of the two"
                    )
                places[usual] = part
    return places


def _check_plain(directory: Path, name: str, dtype: str) -> None:
    if NOT_A_WEIGHT.fullmatch(name):
        return
    if _SCALES.fullmatch(name) or dtype not in _PLAIN_DTYPES:
        raise UnsupportedError(
            f"{directory} holds {name} as {dtype}: its weights are quantized, or not weights at all, and training starts "
            f"from {', '.join(_PLAIN_DTYPES)}; give the bfloat16 checkpoint of the model, or dequantize this one first"
        )


def _parts(whole: StoredTensor, names: _ExpertNames | None) -> Iterator[tuple[str, StoredTensor]]:
    """Yield what is in a stored tensor by the names that the family's checkpoints usually have."""
    if names is None:
        yield whole.name, whole
        return
    match = _STACKED.fullmatch(whole.name)
    if match is None or len(whole.stored_shape) != 3:
        yield whole.name.replace(".mlp.gate.", f".{names.block}.gate."), whole
        return
    experts = match["experts"].removesuffix("mlp.experts") + f"{names.block}.experts"
    num_experts, rows, width = whole.stored_shape
    halves: list[tuple[str, slice | None]] = [(names.down, None)]
    if match["half"] == "gate_up_proj":
        half = rows // 2
        halves = [(names.gate, slice(0, half)), (names.up, slice(half, rows))]
    for expert in range(num_experts):
        for part, cut in halves:
            num_rows = rows if cut is None else cut.stop - cut.start
            yield (
                f"{experts}.{expert}.{part}.weight",
                StoredTensor(
                    file=whole.file,
                    name=whole.name,
                    stored_shape=whole.stored_shape,
                    shape=(num_rows, width),
                    dtype=whole.dtype,
                    expert=expert,
                    rows=cut,
                ),
            )
