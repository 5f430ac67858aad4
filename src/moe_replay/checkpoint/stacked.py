"""The name of each expert's tensors, in checkpoints that hold one tensor an expert or stack them.

transformers 5 stacks the experts of a layer into two tensors in memory, and can write them like
that (`save_original_format=False`); gpt-oss is released like that, with gate and up in turns. Here
each expert has a name of its own:

    model.layers.0.mlp.experts.gate_up_proj [experts, 2 x inner, hidden]
        -> model.layers.0.mlp.experts.3.gate_proj.weight  is its [3, :inner]
        -> model.layers.0.mlp.experts.3.up_proj.weight    is its [3, inner:]

    of gpt-oss [experts, hidden, 2 x inner]
        -> model.layers.0.mlp.experts.3.gate_proj.weight  is its [3, :, 0::2], transposed
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

_STACKED = re.compile(
    r"(?P<experts>.*\.mlp\.experts)\.(?P<half>gate_up_proj|down_proj)(?P<bias>_bias)?"
)
_EVERY = slice(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ExpertNames:
    """Names of the parts of an expert, and of the MoE block, in a family's checkpoints."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    block: str = "mlp"
    others: tuple[tuple[str, str], ...] = ()
    """Other names: a part of transformers' own, and the usual one."""
    in_turns: bool = False
    """Whether stacked matrices are transposed, with a column of the gate before each of up."""


_NAMES: Mapping[str, _ExpertNames] = {
    "mixtral": _ExpertNames(gate="w1", up="w3", down="w2", block="block_sparse_moe"),
    "minimax_m2": _ExpertNames(
        gate="w1",
        up="w3",
        down="w2",
        block="block_sparse_moe",
        others=((".mlp.e_score_correction_bias", ".block_sparse_moe.e_score_correction_bias"),),
    ),
    "ernie4_5_moe": _ExpertNames(others=((".mlp.gate.moe_statics.", ".mlp.moe_statics."),)),
    "gpt_oss": _ExpertNames(in_turns=True),
    **dict.fromkeys(
        (
            *("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"),
            *("glm4_moe", "glm4_moe_lite", "dots1"),
        ),
        _ExpertNames(),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """The location of a tensor on disk."""

    file: Path
    """The safetensors file."""
    name: str
    """Name in the file of the tensor that contains it."""
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
    columns: slice | None = None
    """Entries along its last dim; None for all."""
    is_transposed: bool = False
    """Whether it lies there transposed."""

    def part_of(self, stacked: Any) -> Tensor:
        """Return this part of a stacked tensor, or of its slice of a file; a view of a tensor."""
        part = stacked[self.expert, self.rows or _EVERY][..., self.columns or _EVERY]
        return part.T if self.is_transposed else part


def has_usual_names(model_type: str) -> bool:
    """Return whether the usual tensor names of a family are known here."""
    return model_type in _NAMES


def is_stacked(name: str) -> bool:
    """Return whether a name is that of the experts of a layer in one tensor."""
    return _STACKED.fullmatch(name) is not None


def usual_parts(
    name: str, shape: tuple[int, ...], model_type: str
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the usual name of each part of a tensor in transformers' layout, and where it lies."""
    whole = StoredTensor(file=Path(), name=name, stored_shape=shape, shape=shape, dtype="")
    yield from parts_of(whole, model_type)


def parts_of(whole: StoredTensor, model_type: str | None) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the parts of a stored tensor under the usual names of a family, where it is known."""
    names = _NAMES.get(model_type or "")
    if names is None:
        yield whole.name, whole
        return
    match = _STACKED.fullmatch(whole.name)
    if match is None or len(whole.stored_shape) != (2 if match["bias"] else 3):
        usual = whole.name
        for own, other in (*names.others, (".mlp.gate.", f".{names.block}.gate.")):
            usual = usual.replace(own, other)
        yield usual, whole
        return
    experts = match["experts"].removesuffix("mlp.experts") + f"{names.block}.experts"
    kind = "bias" if match["bias"] else "weight"
    for expert in range(whole.stored_shape[0]):
        for part, cut in _cuts(names, whole.stored_shape[1:], match["half"]):
            yield f"{experts}.{expert}.{part}.{kind}", replace(whole, expert=expert, **cut)


def _cuts(
    names: _ExpertNames, shape: tuple[int, ...], half: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each part of one expert's matrix or bias, and how it is cut out."""
    size = shape[-1] if names.in_turns else shape[0]
    pieces = [(names.down, _EVERY)]
    if half == "gate_up_proj":
        gate, up = slice(0, size // 2), slice(size // 2, None)
        if names.in_turns:
            gate, up = slice(0, None, 2), slice(1, None, 2)
        pieces = [(names.gate, gate), (names.up, up)]
    for part, cut in pieces:
        count = len(range(*cut.indices(size)))
        if names.in_turns:
            turned = len(shape) == 2
            yield part, {"columns": cut, "is_transposed": turned, "shape": (count, *shape[:-1])}
        else:
            yield part, {"rows": cut, "shape": (count, *shape[1:])}
