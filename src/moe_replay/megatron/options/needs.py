"""Packages and devices that options of Megatron need: what is missing is said before a start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from megatron.core.utils import is_te_min_version

from moe_replay.megatron.upstream.compat import transformer_engine_usable
from moe_replay.recipe.options.rows import names
from moe_replay.recipe.sections.training import MegatronSection


class Need(NamedTuple):
    """Options that run only with something that may be missing."""

    table: str
    """``transformer``, ``ddp`` or ``optimizer``."""
    fields: tuple[str, ...]
    """Megatron's names."""
    what: str
    """What they need, and how to get it."""
    is_here: Callable[[], bool]
    """Whether it is there."""


_ENGINE = "Transformer Engine and a GPU (pip install 'transformer-engine[pytorch]')"


def _has_module(name: str) -> Callable[[], bool]:
    return lambda: torch.cuda.is_available() and find_spec(name) is not None


def _has_hybridep() -> bool:
    if not _has_module("deep_ep")():
        return False
    from megatron.core.transformer.moe.fused_a2a import HAVE_HYBRIDEP

    return HAVE_HYBRIDEP


def _has_te(version: str) -> Callable[[], bool]:
    return lambda: transformer_engine_usable() and is_te_min_version(version)


NEEDS = (
    Need(
        "transformer",
        names(
            "fp8 fp4 apply_rope_fusion moe_router_fusion use_te_activation_func use_te_rng_tracker "
            "attention_backend cp_comm_type cpu_offloading disable_parameter_transpose_cache "
            "overlap_moe_expert_parallel_comm delay_wgrad_compute batch_invariant_mode"
        ),
        _ENGINE,
        transformer_engine_usable,
    ),
    Need(
        "transformer",
        ("moe_permute_fusion",),
        f"a release from 2.1 of {_ENGINE}",
        _has_te("2.1.0"),
    ),
    Need(
        "transformer",
        ("fine_grained_activation_offloading",),
        "a GPU: it copies activations to pinned memory on streams of its own",
        torch.cuda.is_available,
    ),
    Need(
        "transformer",
        ("deallocate_pipeline_outputs",),
        "a GPU: over gloo a tensor is still being sent when its memory is freed",
        torch.cuda.is_available,
    ),
    Need(
        "transformer",
        ("gradient_accumulation_fusion",),
        "a GPU and Apex built with --cpp_ext and --cuda_ext, whose fused_weight_gradient_mlp_cuda "
        "the output layer calls",
        _has_module("fused_weight_gradient_mlp_cuda"),
    ),
    Need(
        "transformer",
        ("use_kitchen", "use_kitchen_attention"),
        "a GPU and the package nvidia_kitchen",
        _has_module("nvidia_kitchen"),
    ),
    Need("ddp", ("nccl_ub",), "GPUs and nccl", torch.cuda.is_available),
)
"""Options that are on by any value but false, and what each needs."""


def missing_packages(section: MegatronSection) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, what it needs and does not find here)."""
    for need in NEEDS:
        values: dict[str, Any] = getattr(section, need.table)
        for name in need.fields:
            if values.get(name) not in (None, False) and not need.is_here():
                yield f"megatron.{need.table}.{name}", _sentence(values[name], need.what)
    yield from _dispatcher(section)
    options = section.optimizer
    if (
        options.get("use_precision_aware_optimizer")
        and not options.get("optimizer_cpu_offload")
        and not _has_te("2.1.0")()
    ):
        yield (
            "megatron.optimizer.use_precision_aware_optimizer",
            _sentence(True, f"the FusedAdam of a release from 2.1 of {_ENGINE}")
            + ", or set optimizer_cpu_offload = true as well, whose Adam runs on the host",
        )


def _dispatcher(section: MegatronSection) -> Iterator[tuple[str, str]]:
    if section.moe_token_dispatcher_type != "flex":
        return
    backend = section.transformer.get("moe_flex_dispatcher_backend", "deepep")
    package, is_here = {
        "deepep": ("a GPU and the package deep_ep (DeepEP)", _has_module("deep_ep")),
        "hybridep": ("a GPU and a deep_ep that has HybridEPBuffer", _has_hybridep),
    }.get(backend, ("", lambda: True))
    if not is_here():
        yield (
            "megatron.moe_token_dispatcher_type",
            _sentence("flex", f"{package} for its backend {backend}"),
        )


def _sentence(value: Any, what: str) -> str:
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return (
        f"{shown} needs {what}; that is missing here. Remove the option, or install what it needs"
    )
