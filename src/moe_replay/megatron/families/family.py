"""The words in which a model family is described: rules, shapes, families."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_replay.megatron.replay.expert_groups import ExpertGroups

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Kind(enum.Enum):
    """How the Hugging Face tensors lie in the Megatron parameter, and where it is cut."""

    WHOLE = "one tensor, the same on every tensor-parallel rank"
    COLUMN = "one tensor, cut along dim 0"
    VOCABULARY = "one tensor, a row a word, cut along dim 0 and padded to equal parts"
    ROW = "one tensor, cut along dim 1"
    QKV = "query, key, value interleaved by query group, their rows cut into equal parts"
    GATED = "gate above up projection, each cut along its dim 0"
    SINGLE_ROW = "one tensor with a first dim of size 1, the same on every tensor-parallel rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One line of a family's table."""

    megatron: str
    """Name of a parameter or buffer in a chunk, with this rank's own `{layer}` and `{expert}`."""
    hf: tuple[str, ...]
    """Checkpoint names of the tensors in it; `{layer}` and `{expert}` stand for global numbers."""
    kind: Kind = Kind.WHOLE
    """How they lie in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a Hugging Face config says about the model, in one vocabulary for all families."""

    family: str
    """The `model_type` of the Hugging Face config."""
    num_layers: int
    """Decoder layers, dense ones included."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key and value heads."""
    head_dim: int
    """Width of one head."""
    vocab_size: int
    """Rows of the embedding."""
    max_position_embeddings: int
    """Longest sequence, in tokens."""
    rotary_base: float
    """Base of the rotary frequencies."""
    rotary_frac: float = 1.0
    """Part of each head that is rotated."""
    num_mtp_layers: int = 0
    """Multi-token-prediction layers in the checkpoint, numbered after the decoder layers.

    They are not trained.
    """
    tie_word_embeddings: bool
    """The output layer is the embedding."""
    ffn_size: int
    """Inner width of a dense layer's MLP."""
    num_experts: int
    """Experts of one MoE layer; 0 for a dense model."""
    topk: int
    """Experts that a token goes through."""
    expert_ffn_size: int
    """Inner width of one expert."""
    moe_layers: tuple[int, ...]
    """Global decoder indices of the layers that the config says are MoE layers."""
    expert_groups: ExpertGroups | None = None
    """Groups that Megatron would score differently from the model; None where there are none."""
    biased_softmax: bool = False
    """A bias moves the choice of a softmax router, which Megatron has for sigmoid routers only."""
    megatron_fields: Mapping[str, Any] = field(default_factory=dict)
    """TransformerConfig fields that only this family sets."""
    yarn: Mapping[str, Any] = field(default_factory=dict)
    """YaRN scaling of grouped-query attention: what Megatron's embedding reads from attributes
    ``yarn_<name>`` of its configuration; empty without scaling."""

    @property
    def num_moe_layers(self) -> int:
        """Number of MoE layers; with 0 there is nothing to replay."""
        return len(self.moe_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Everything that is known about one architecture."""

    rules: tuple[Rule, ...]
    """In the order in which tensors are exported."""
    shape: Callable[[PretrainedConfig], ModelShape]
    """Reads the Hugging Face config; refuses what Megatron cannot do exactly (UnsupportedError)."""
    all_heads_qk_norm: bool = False
    """The query and key norms span all heads."""
