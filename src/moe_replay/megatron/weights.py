"""Move weights between a Hugging Face checkpoint and Megatron model chunks, in any parallel layout.

In: model chunks from `build_model`, and a checkpoint. Out: loaded chunks; a stream of tensors under
the names that transformers, vLLM and SGLang read from disk; a checkpoint directory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moe_replay.checkpoint.files import (
    NOT_A_WEIGHT,
    SafetensorsCheckpoint,
    refuse_non_finite,
)
from moe_replay.checkpoint.fit import check_names, is_prediction
from moe_replay.errors import CheckpointError
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.disk import SharedWrite
from moe_replay.megatron.families.cuts import (
    CUT_DIM,
    cut_group,
    local_view,
    merge,
    unmerge,
    whole_shape,
)
from moe_replay.megatron.families.family import ModelShape, Rule
from moe_replay.megatron.families.hf_files import write_checkpoint
from moe_replay.megatron.families.placed import placed_weights
from moe_replay.megatron.families.rules import family_of
from moe_replay.megatron.ranks.messages import all_ranks
from moe_replay.megatron.ranks.pace import in_step


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class _Key:
    """One line of a family's table in one layer, exported together; sorts in export order."""

    section: int
    """0 before the layers, 1 in a layer, 2 after the layers."""
    layer: int
    """Global decoder layer, -1 outside."""
    rule: int
    """Index in the family's table."""
    experts: tuple[int, ...]
    """Global numbers of the experts that one expert-parallel rank holds; (-1,) without experts."""


def load_hf_weights(
    chunks: Sequence[torch.nn.Module], source: str | Path | Mapping[str, Tensor]
) -> None:
    """Copy a Hugging Face checkpoint into the model chunks of this rank, one tensor at a time.

    `source` is a checkpoint directory, or tensors by checkpoint name; multi-token-prediction layers
    are left out. Every rank calls this; each reads only the tensors that it holds a part of, and
    casts them to its parameters' dtype.

    Raises:
        CheckpointError: a tensor is missing or unexpected (nothing was copied yet), has another
            shape, or holds a value that is not finite; raised on every rank.
    """
    if isinstance(source, str | Path):
        with SafetensorsCheckpoint(source) as checkpoint:
            load_hf_weights(chunks, checkpoint)
        return
    shape = _shape_of(chunks)
    rules = family_of(shape.family).rules
    held = _held_parameters(chunks, shape)
    _check_names(source, shape, list(held))
    refusal: CheckpointError | None = None
    try:
        with torch.no_grad():
            for key, parameters in held.items():
                for expert, parameter in zip(key.experts, parameters, strict=True):
                    names = _hf_names(rules[key.rule], key.layer, expert)
                    parameter.copy_(_read_shard(rules[key.rule], names, parameter, source, shape))
    except CheckpointError as error:
        refusal = error
    all_ranks().raise_together(refusal)


class WeightExport:
    """The weights of a model under the names of a Hugging Face checkpoint, as often as asked for.

    Who holds what is agreed on once, by all ranks together. `read` turns a parameter into what is
    exported instead of its values, for example `lambda p: p.main_grad` for gradients.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        *,
        read: Callable[[Tensor], Tensor] = Tensor.detach,
    ) -> None:
        """Plan exports of model chunks from `build_model`; collective."""
        self._chunks, self._read = list(chunks), read
        self._shape = _shape_of(chunks)
        self._rules = family_of(self._shape.family).rules
        mine: dict[_Key, tuple[tuple[int, ...], torch.dtype]] = {}
        with torch.no_grad():
            for key, parameters in _held_parameters(chunks, self._shape).items():
                # A view: a plan must not hold a second copy of the model.
                view = self._view(key, parameters[0])
                size = (len(key.experts), *whole_shape(self._rules[key.rule], view))
                mine[key] = size, view.dtype
        everywhere = all_ranks().gather(mine)
        known = {key: described for held in everywhere for key, described in held.items()}
        self._plan = [
            (key, [rank for rank, held in enumerate(everywhere) if key in held], *known[key])
            for key in sorted(known)
        ]
        """Keys in export order, the ranks that hold them, shape and dtype of the merged tensors of
        their experts."""

    @property
    def num_active(self) -> float:
        """Weights that a token is multiplied by.

        That is without other experts, and without a separate embedding, of which it looks up a row.
        """
        shape, total = self._shape, 0.0
        for key, _, size, _ in self._plan:
            name = self._rules[key.rule].megatron
            if shape.tie_word_embeddings or not name.startswith("embedding."):
                share = shape.topk / shape.num_experts if "{expert}" in name else 1.0
                total += share * math.prod(size)
        return total

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight of the model, on every rank; collective, so iterate to the end.

        Each tensor is a contiguous copy on the parameters' device. At any time one parameter of one
        layer is held, for experts those of one expert-parallel rank, beside the tensor yielded.
        """
        # Looked up every time: Megatron may have put another tensor in a buffer's place.
        held = _held_parameters(self._chunks, self._shape)
        device = next((tensors[0].device for tensors in held.values()), torch.device("cpu"))
        for key, holders, size, dtype in self._plan:
            rule = self._rules[key.rule]
            # Entered again for every key: a generator must not change the grad mode of its
            # consumer.
            with torch.no_grad():
                merged = None
                if key in held:
                    views = [self._view(key, parameter) for parameter in held[key]]
                    merged = _gather_cut(rule, torch.stack(views))
                if len(holders) < all_ranks().size:
                    if merged is None:
                        merged = torch.empty(size, dtype=dtype, device=device)
                    dist.broadcast(merged, src=holders[0])
            assert merged is not None and (merged.shape, merged.dtype) == (size, dtype)
            for expert, tensor in zip(key.experts, merged, strict=True):
                names = _hf_names(rule, key.layer, expert)
                for name, part in zip(names, unmerge(rule, tensor, self._shape), strict=True):
                    # A part would keep the others alive.
                    alone = part.numel() == merged.numel() and part.is_contiguous()
                    yield name, part if alone else part.clone(memory_format=torch.contiguous_format)

    def _view(self, key: _Key, parameter: Tensor) -> Tensor:
        return local_view(self._rules[key.rule], self._read(parameter))


def export_hf_weights(
    chunks: Sequence[torch.nn.Module], *, read: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of the model as `WeightExport` does, once; collective."""
    return WeightExport(chunks, read=read).tensors()


def save_hf_checkpoint(
    chunks: Sequence[torch.nn.Module],
    source_dir: str | Path,
    output_dir: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    read: Callable[[Tensor], Tensor] = Tensor.detach,
) -> None:
    """Write the model as a Hugging Face checkpoint; every rank calls it, the first one writes.

    Everything but trained weights (config, tokenizer, generation config, and the tensors of
    multi-token-prediction layers) is copied from `source_dir`. The directory appears under its name
    only when it is complete. `read` is that of `WeightExport`.

    Raises:
        CheckpointError: `output_dir` exists already, or cannot be written; raised on every rank.
    """
    shape, write = _shape_of(chunks), SharedWrite(Path(output_dir))
    refusal = None
    is_first = all_ranks().rank == 0
    if is_first and Path(output_dir).exists():
        refusal = CheckpointError(
            f"{output_dir} exists already; refusing to mix two checkpoints in one directory"
        )
    all_ranks().raise_together(refusal)
    tensors = in_step(export_hf_weights(chunks, read=read), all_ranks())
    if is_first:
        if shape.num_mtp_layers:
            tensors = chain(tensors, _untrained(source_dir, shape))
        with write.part():
            write_checkpoint(tensors, source_dir, output_dir, max_shard_bytes=max_shard_bytes)
    sum(0 for _ in tensors)  # After a failure too: gathering is collective.
    write.finish()


def _shape_of(chunks: Sequence[torch.nn.Module]) -> ModelShape:
    return unwrap(chunks[0]).model_shape


def _held_parameters(
    chunks: Sequence[torch.nn.Module], shape: ModelShape
) -> dict[_Key, list[Tensor]]:
    """Return this rank's weights by key; one for each of the key's experts."""
    rules = family_of(shape.family).rules
    first_in_layer = next(i for i, rule in enumerate(rules) if "{layer}" in rule.megatron)
    embedding = next(i for i, rule in enumerate(rules) if rule.megatron.startswith("embedding."))
    found: dict[tuple[int, int, int], dict[int, Tensor]] = {}
    for chunk in map(unwrap, chunks):
        for placed in placed_weights(chunk):
            rule = placed.rule
            if shape.tie_word_embeddings and placed.name == "output_layer.weight":
                # The last stage keeps a copy of the embedding, which the checkpoint holds once.
                rule = embedding
            section = 1 if placed.layer >= 0 else 0 if rule < first_in_layer else 2
            found.setdefault((section, placed.layer, rule), {})[placed.expert] = placed.weight
    return {
        _Key(section=section, layer=layer, rule=rule, experts=tuple(sorted(parameters))): [
            parameters[expert] for expert in sorted(parameters)
        ]
        for (section, layer, rule), parameters in found.items()
    }


def _hf_names(rule: Rule, layer: int, expert: int) -> tuple[str, ...]:
    return tuple(name.format(layer=layer, expert=expert) for name in rule.hf)


def _check_names(source: Mapping[str, Tensor], shape: ModelShape, keys: list[_Key]) -> None:
    """Compare the names in the source with those that all ranks together need."""
    rules = family_of(shape.family).rules
    needed = {
        name
        for key in chain.from_iterable(all_ranks().gather(keys))
        for expert in key.experts
        for name in _hf_names(rules[key.rule], key.layer, expert)
    }
    got = {
        name
        for name in source
        if not (
            NOT_A_WEIGHT.fullmatch(name)
            or is_prediction(name, shape.num_layers, shape.num_mtp_layers)
        )
    }
    if shape.tie_word_embeddings:
        got.discard("lm_head.weight")
    check_names(
        needed,
        got,
        f"a {shape.family} model with {shape.num_layers} layers and {shape.num_experts} experts",
    )


def _untrained(source_dir: str | Path, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint that no parameter holds."""
    with SafetensorsCheckpoint(source_dir) as checkpoint:
        for name in checkpoint:
            if is_prediction(name, shape.num_layers, shape.num_mtp_layers):
                yield name, checkpoint[name]


def _read_shard(
    rule: Rule,
    names: tuple[str, ...],
    parameter: Tensor,
    source: Mapping[str, Tensor],
    shape: ModelShape,
) -> Tensor:
    """Read the tensors behind a parameter and return this rank's part, in the parameter's shape."""
    whole = torch.empty(whole_shape(rule, local_view(rule, parameter)), device="meta")
    tensors = []
    for name, expected in zip(names, unmerge(rule, whole, shape), strict=True):
        tensor = source[name]
        if tensor.shape != expected.shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensor.shape)}, expected {list(expected.shape)} from the "
                "config.json that the model was built from; the two likely belong to different checkpoints"
            )
        refuse_non_finite(name, tensor)
        tensors.append(tensor)
    merged = merge(rule, tensors, shape)
    if rule.kind in CUT_DIM:
        group = cut_group(rule)
        merged = merged.chunk(group.size(), dim=CUT_DIM[rule.kind])[group.rank()]
    return merged.reshape(parameter.shape)


def _gather_cut(rule: Rule, local: Tensor) -> Tensor:
    """Join the tensor-parallel parts of stacked merged tensors; collective over their group."""
    group = cut_group(rule)
    if rule.kind not in CUT_DIM or group.size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local, group=group)
    return torch.cat(parts, dim=1 + CUT_DIM[rule.kind])
