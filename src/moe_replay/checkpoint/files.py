"""Which file of a checkpoint holds which tensor, by one rule for the trainer and every engine.

Libraries read different tensors from an ambiguous folder: one reads `model.safetensors`, another
the index, a third every safetensors file. Such folders are refused, so that all read the same
tensors.

Each expert has a name of its own here, also where a checkpoint stacks them (`stacked.py`);
`in_stored_layout` stacks them again.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_replay.checkpoint.config import read_config_json, read_json_object
from moe_replay.checkpoint.stacked import StoredTensor, is_stacked, parts_of
from moe_replay.errors import CheckpointError, UnsupportedError, shortened

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

NOT_A_WEIGHT = re.compile(r".*rotary_emb\.inv_freq")
"""Names of tensors in some checkpoints that are never weights."""

_PLAIN_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Tensors that accompany the codes of a quantized weight.
_SCALES = re.compile(
    r".*[._](weight_scale(_inv)?|input_scale|scales|qweight|qzeros|g_idx|weight_packed|weight_shape|absmax|scale_inv)"
)


class SafetensorsCheckpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint directory by name, each read from disk on access.

    Examples:
        >>> with SafetensorsCheckpoint(path) as checkpoint:
        ...     norm = checkpoint["model.norm.weight"]

    Raises:
        CheckpointError: there are no safetensors, they cannot be read, or libraries would read
            different tensors.
        UnsupportedError: weights are quantized.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        paths, named = _weight_files(directory)
        with contextlib.ExitStack() as opening:
            self._handles = {path: opening.enter_context(_opened(path)) for path in paths}
            self._stored = _stored_tensors(directory, self._handles)
            if named is not None:
                _check_index(directory / INDEX_FILE, named, self._handles)
            self._files = opening.pop_all()

    def __enter__(self) -> SafetensorsCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        handle = self._handles[stored.file]
        if stored.expert is None:
            return handle.get_tensor(stored.name)
        return stored.part_of(handle.get_slice(stored.name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Name -> location, shape and number format."""
        return self._stored

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: stored.shape for name, stored in self._stored.items()}


def in_stored_layout(
    tensors: Iterable[tuple[str, Tensor]], layout: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors with the names and stacking of a checkpoint, given its `stored` tensors.

    A stacked tensor is yielded with its last part, so if parts come layer by layer, at most one
    layer waits. Tensors that the checkpoint does not hold pass unchanged.

    Raises:
        CheckpointError: a part of a stacked tensor is missing.
    """
    num_parts = Counter((stored.file, stored.name) for stored in layout.values())
    waiting: dict[tuple[Path, str], tuple[Tensor, int]] = {}
    for name, tensor in tensors:
        stored = layout.get(name)
        if stored is None or stored.expert is None:
            yield name if stored is None else stored.name, tensor
            continue
        key = (stored.file, stored.name)
        stack, missing = waiting.get(key) or (
            torch.empty(stored.stored_shape, dtype=tensor.dtype),
            num_parts[key],
        )
        stored.part_of(stack).copy_(tensor)
        waiting[key] = (stack, missing - 1)
        if missing == 1:
            del waiting[key]
            yield stored.name, stack
    if waiting:
        names = shortened(sorted(name for _, name in waiting))
        raise CheckpointError(
            f"parts of {names} are missing, so they cannot be stacked like those of the source checkpoint"
        )


def check_finite(directory: str | Path) -> None:
    """Read every weight of a checkpoint once and refuse non-finite values.

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
            "be sampled from NaN. The run that wrote it likely diverged: use an earlier checkpoint"
        )


def _weight_files(directory: Path) -> tuple[list[Path], list[str] | None]:
    """Return the files that hold weights, and the tensors that an index names, if there is one."""
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if (directory / "adapter_config.json").is_file():
        raise UnsupportedError(
            f"{directory} holds adapter_config.json: some libraries would add the adapter to the weights and others "
            "would not; merge it into the checkpoint and use the merged one"
        )
    if not index.is_file():
        if not single.is_file():
            found = (
                shortened(sorted(path.name for path in directory.iterdir() if path.is_file()))
                or "nothing"
            )
            raise CheckpointError(
                f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}, only {found}; expected a Hugging Face "
                "checkpoint saved as safetensors"
            )
        if others := sorted(
            path.name for path in directory.glob("*.safetensors") if path != single
        ):
            raise CheckpointError(
                f"{directory} holds {SINGLE_FILE} and, without an index, {shortened(others)}: some libraries read the first "
                "and others all of them; remove the files that do not belong to the checkpoint"
            )
        return [single], None
    weight_map = _read_index(index)
    names = sorted(set(weight_map.values()))
    if single.is_file() and names != [SINGLE_FILE]:
        raise CheckpointError(
            f"{directory} holds {SINGLE_FILE} and an index of other files ({shortened(names)}): some libraries read the first "
            "and others the second; remove the files that do not belong to the checkpoint"
        )
    if absent := [name for name in names if not (directory / name).is_file()]:
        raise CheckpointError(
            f"{index} names missing files: {shortened(absent)}; copy the checkpoint again"
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
            f"{path} cannot be read as safetensors ({error}); it is truncated or of another format: copy it again"
        ) from error
    with file:
        yield file


def _check_index(index: Path, named: Iterable[str], handles: Mapping[Path, Any]) -> None:
    held = {name for handle in handles.values() for name in list(handle.keys())}
    if absent := sorted(set(named) - held):
        raise CheckpointError(
            f"{index} names tensors that no file contains: {shortened(absent)}; copy the checkpoint again"
        )


def _stored_tensors(directory: Path, handles: Mapping[Path, Any]) -> dict[str, StoredTensor]:
    file_of: dict[str, Path] = {}
    found: dict[str, StoredTensor] = {}
    family: str | None = None
    stored = {path: list(handle.keys()) for path, handle in handles.items()}
    if any(is_stacked(name) for held in stored.values() for name in held):
        family = read_config_json(directory)["model_type"]
    for path, held in stored.items():
        for name in held:
            if name in file_of:
                raise CheckpointError(
                    f"{file_of[name].name} and {path.name} of {directory} both hold {name}: libraries differ in "
                    "which one they read; remove the file that does not belong to the checkpoint"
                )
            file_of[name] = path
            view = handles[path].get_slice(name)
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
            _check_plain(directory, name, dtype)
            whole = StoredTensor(file=path, name=name, stored_shape=shape, shape=shape, dtype=dtype)
            for usual, part in parts_of(whole, family):
                if usual in found:
                    raise CheckpointError(
                        f"{directory} holds {usual} twice, once as a part of {name} or of "
                        f"{found[usual].name}; remove one of the two"
                    )
                found[usual] = part
    return found


def _check_plain(directory: Path, name: str, dtype: str) -> None:
    if NOT_A_WEIGHT.fullmatch(name):
        return
    if _SCALES.fullmatch(name) or dtype not in _PLAIN_DTYPES:
        raise UnsupportedError(
            f"{directory} holds {name} as {dtype}: it is quantized, or not a weight at all, but training needs "
            f"{', '.join(_PLAIN_DTYPES)}; use the bfloat16 checkpoint of the model, or dequantize this one first"
        )
