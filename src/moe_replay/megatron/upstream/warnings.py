"""The warnings that Megatron-Core and torch raise about each other, and that no user can act on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_KNOWN = (
    # While Megatron is imported: optional packages are absent, and what it does about it.
    "Apex (is|are) not installed",
    "The following imports from `dynamic_context.py`",
    "`torch.jit.script",
    # Megatron's imports, constructors and layers use its own deprecated parts.
    "'megatron.core.transformer.custom_layers.transformer_engine'",
    "MLP requires ffn_hidden_size, but it was not provided",
    # It builds the linear layers of experts that are not cut with the dense layers' configuration.
    "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
    "Warning: tp_group is None, using default tp group",
    # The default of its own cuda_graph_scope.
    "full scope is deprecated",
    # DistributedOptimizer.zero_grad looks at .grad of parameter views.
    "The .grad attribute of a Tensor that is not a leaf Tensor",
    # It calls collectives by their former names.
    r"`torch\.distributed\.\w+` is deprecated\. Please use `torch\.distributed",
    # Its own attention registers the output projection first and runs it last.
    "The next bucket's parameter all-gather operation has already been dispatched",
    # The planner of distributed checkpoints uses torch's former sharded tensors.
    "Please use DTensor instead",
    "`load_state_dict` is deprecated",
    "TypedStorage is deprecated",
    # It calls torch's loader by its former argument order, which torch puts right.
    "The argument order of load has been changed",
    # From 0.17 on each rank reads the part of a checkpoint that all share by itself.
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load",
    # From 0.18 on the optimizer imports a model that nobody here builds.
    "MimoModelConfig is experimental",
    # From 0.19 on a module that nobody here uses prefers another logger.
    "absl.logging is not installed",
)
# Advice about a GPU.
_KNOWN_WITHOUT_CUDA = ("CUDA_DEVICE_MAX_CONNECTIONS",)


def ignore_upstream_warnings() -> None:
    """Hide the known upstream warnings from now on."""
    for message in _KNOWN if torch.cuda.is_available() else _KNOWN + _KNOWN_WITHOUT_CUDA:
        # (?s): some messages begin with a line break.
        warnings.filterwarnings("ignore", message=f"(?s).*{message}")


@contextmanager
def quiet_megatron() -> Iterator[None]:
    """Hide the known upstream warnings for the time of the block."""
    with warnings.catch_warnings():
        ignore_upstream_warnings()
        yield
