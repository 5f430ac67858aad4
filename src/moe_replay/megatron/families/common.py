"""What all Hugging Face configs say alike, and the options of them that Megatron cannot match.

In: a config, and what a family adds. Out: `common_shape`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.families.family import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ROPE_KEYS = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    }
)


def refuse_others(hf: PretrainedConfig, **accepted: tuple[Any, ...]) -> None:
    """Raise `UnsupportedError` where a field has a value that is not accepted; None always is."""
    for name, values in accepted.items():
        got = getattr(hf, name, None)
        if got is not None and got not in values:
            raise UnsupportedError(
                f"{hf.model_type} config has {name} = {got!r}; supported: "
                f"{' or '.join(map(repr, values)) or 'leaving it unset'}"
            )


def common_shape(
    hf: PretrainedConfig,
    *,
    rope_types: tuple[str, ...] = ("default",),
    partial_rotary: bool = False,
    has_windows: bool = False,
    **fields: Any,
) -> ModelShape:
    """Return the shape of a config, with ``fields`` in place of what all families have alike.

    Raises:
        UnsupportedError: an option has no exact counterpart in Megatron.
    """
    refuse_others(hf, hidden_act=("silu",), attention_dropout=(0.0, 0), clip_qkv=())
    windows = _windows(hf, are_read=has_windows)
    latent = fields.get("megatron_fields", {}).get("multi_latent_attention", False)
    _check_rotary(hf, rope_types=rope_types, partial=partial_rotary, latent=latent)
    rope = hf.rope_parameters
    is_scaled = rope.get("rope_type", "default") == "yarn" and not latent
    shape: dict[str, Any] = {
        "family": hf.model_type,
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "vocab_size": hf.vocab_size,
        "max_position_embeddings": hf.max_position_embeddings,
        "rotary_base": rope["rope_theta"],
        "rotary_frac": rope.get("partial_rotary_factor") or 1.0,
        "yarn": _yarn(hf) if is_scaled else {},
        "tie_word_embeddings": bool(hf.tie_word_embeddings),
        "ffn_size": hf.intermediate_size,
        "moe_layers": tuple(range(hf.num_hidden_layers)),
    }
    fields["megatron_fields"] = {
        "layernorm_epsilon": hf.rms_norm_eps,
        **windows,
        **fields.get("megatron_fields", {}),
    }
    return ModelShape(**(shape | fields))


def _check_rotary(
    hf: PretrainedConfig, *, rope_types: tuple[str, ...], partial: bool, latent: bool
) -> None:
    rope = hf.rope_parameters
    if unknown := sorted(k for k, v in rope.items() if v is not None and k not in _ROPE_KEYS):
        raise UnsupportedError(
            f"{hf.model_type} config has {', '.join(unknown)} in rope_parameters, which would change the positions; "
            f"supported: {', '.join(sorted(_ROPE_KEYS))}"
        )
    kind = rope.get("rope_type", "default")
    if kind not in rope_types:
        raise UnsupportedError(
            f"{hf.model_type} config has rope_parameters {dict(rope)}; supported: rope_type "
            f"{' or '.join(map(repr, rope_types))}"
        )
    part = rope.get("partial_rotary_factor") or 1.0
    if part != 1.0 and not partial:
        raise UnsupportedError(
            f"{hf.model_type} config has partial_rotary_factor = {part}, which this architecture does not read in "
            "transformers: engines would rotate other parts of a head than the trainer; supported: 1.0, or leaving it unset"
        )
    if part != 1.0 and kind == "yarn" and not latent:
        raise UnsupportedError(
            f"{hf.model_type} config has YaRN with partial_rotary_factor = {part}; supported: YaRN over complete heads"
        )


def _yarn(hf: PretrainedConfig) -> dict[str, Any]:
    """Return the YaRN scaling of grouped-query attention, with transformers' defaults."""
    rope = hf.rope_parameters
    original = rope.get("original_max_position_embeddings") or hf.max_position_embeddings
    both = bool(rope.get("mscale") and rope.get("mscale_all_dim"))
    return {
        "rotary_scaling_factor": float(rope.get("factor") or hf.max_position_embeddings / original),
        "original_max_position_embeddings": original,
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        # Without both of them attention is scaled by 0.1 ln(factor) + 1.
        "mscale": rope["mscale"] if both else None,
        "mscale_all_dim": rope["mscale_all_dim"] if both else None,
        "correction_range_round_to_int": rope.get("truncate", True),
    }


def _windows(hf: PretrainedConfig, *, are_read: bool) -> dict[str, Any]:
    """Return the sliding windows of the layers that have one, in Megatron's fields.

    A window of W in transformers is the row itself and W - 1 before it, which Megatron counts.
    """
    kinds = getattr(hf, "layer_types", None) or ()
    known = ["full_attention", *(["sliding_attention"] if are_read else [])]
    if unknown := sorted(set(kinds) - set(known)):
        raise UnsupportedError(
            f"{hf.model_type} config has layer_types {', '.join(unknown)}; supported: {' and '.join(known)}"
        )
    if "sliding_attention" not in kinds:
        return {}
    return {
        "window_size": (hf.sliding_window - 1, 0),
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in kinds],
    }
