"""Stand-ins that let the unmodified Megatron-Core run without CUDA, over gloo.

Each stand-in is one function whose docstring says what breaks without it. Nothing here runs where
CUDA is available; what Megatron needs for any other reason is in `missing_packages`. Where it can,
a stand-in replaces a name inside the Megatron modules that use it and leaves torch alone: wrapping
`torch.tensor` and friends globally would break `with torch.device(...)` and with it transformers'
`from_pretrained`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

from moe_replay.megatron.upstream.warnings import quiet_megatron

_CPU = torch.device("cpu")
_MARK = "_moe_replay_cpu_installed"

# Modules that spell device="cuda" or pin_memory=True as literals.
_MODULES_WITH_CUDA_LITERALS = (
    "dist_checkpointing.exchange_utils",
    "models.common.embeddings.rope_utils",
    "optimizer.clip_grads",
    "optimizer.cpu_offloading.hybrid_optimizer",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.schedules",
    "rerun_state_machine",
    "transformer.moe.moe_utils",
    "transformer.utils",
    "utils",
)
_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "tensor",
    "zeros",
    "zeros_like",
)


def install() -> None:
    """Make Megatron-Core importable and runnable on a machine without CUDA.

    Idempotent. Best before the first import of `megatron.core`: Megatron compiles its fused
    functions while it is imported, which takes seconds and is undone here.
    """
    if getattr(torch.cuda, _MARK, False):
        return
    _name_the_cpu_as_current_device()
    _ignore_streams_and_events()
    _run_megatron_uncompiled()
    _use_cpu_generator_as_cuda_generator()
    _redirect_cuda_literals()
    _keep_tensors_on_cpu()
    _return_numpy_split_sizes()
    _pad_uneven_collectives()
    _order_two_stage_p2p()
    _offload_from_the_cpu()
    setattr(torch.cuda, _MARK, True)


def _name_the_cpu_as_current_device() -> None:
    """Answer `device=torch.cuda.current_device()`, which Megatron often asks, with the CPU."""
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.synchronize = lambda *args, **kwargs: None


class _NoEvent:
    """A CUDA event on a device that runs everything in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _NoEvent) -> float:
        return 0.0


class _NoStream:
    """A CUDA stream on a device that has only one; a class, because annotations name it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NoStream)

    __hash__ = object.__hash__

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def record_event(self, event: _NoEvent | None = None) -> _NoEvent:
        return event or _NoEvent()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _ignore_streams_and_events() -> None:
    """Run side-stream work in line: dispatchers and schedules create streams unconditionally."""
    stream = _NoStream()
    torch.cuda.Event = _NoEvent
    torch.cuda.Stream = _NoStream
    torch.cuda.current_stream = lambda *args, **kwargs: stream
    torch.cuda.default_stream = lambda *args, **kwargs: stream
    torch.cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda self, stream: None


def _use_cpu_generator_as_cuda_generator() -> None:
    """Let Megatron's RNG-state tracker fork the CPU generator, which initialisation draws from."""
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *a, **k: (
        torch.get_rng_state()
    )
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )
    # The tracker warns when a fork moved the CPU generator; here that is the generator it forks.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _run_megatron_uncompiled() -> None:
    """Leave Megatron's fused functions plain Python: on import it passes them to torch.compile.

    Compiling them on a CPU needs a C++ compiler and minutes, and gains nothing. torch.compile is an
    identity only while the import runs; `TORCHDYNAMO_DISABLE` is neither read nor set.
    """
    compile_function = torch.compile
    torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda fn: fn)
    try:
        with quiet_megatron():
            importlib.import_module("megatron.core.models.gpt")
            importlib.import_module("megatron.core.jit").disable_jit_fuser()
            for name in _MODULES_WITH_CUDA_LITERALS:
                importlib.import_module(f"megatron.core.{name}")
    finally:
        torch.compile = compile_function
    modules = [m for name, m in sys.modules.items() if name.startswith("megatron.core")]
    classes = [c for m in modules for c in vars(m).values() if isinstance(c, type)]
    for owner in (*modules, *(c for c in classes if c.__module__.startswith("megatron.core"))):
        for name, function in list(vars(owner).items()):
            original = getattr(function, "_torchdynamo_orig_callable", None)
            if original is not None:
                setattr(owner, name, original)


class _Overlay:
    """A module in which some names are replaced; the others are looked up in the module itself."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.device(kwargs.get("device") or _CPU).type == "cuda":
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _redirect_cuda_literals() -> None:
    """Create on the CPU what some modules create with a literal device="cuda" or pinned memory."""
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    for name in _MODULES_WITH_CUDA_LITERALS:
        sys.modules[f"megatron.core.{name}"].torch = _Overlay(torch, **factories)


def _called_by_megatron() -> bool:
    """Tell whether the caller of the function that asks is a Megatron-Core module."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


def _keep_tensors_on_cpu() -> None:
    """Give Megatron `tensor.cuda()` as identity and `tensor.type()` under its CUDA name.

    The optimizers compare the type name with 'torch.cuda.FloatTensor' and refuse anything else.
    Callers outside Megatron get what torch answers.
    """
    move, name_type = torch.Tensor.cuda, torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_by_megatron() else move(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = name_type(self, *args, **kwargs)
        if args or kwargs or not _called_by_megatron() or result.startswith("torch.cuda."):
            return result
        return result.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.cuda, torch.Tensor.type = cuda, type_


def _return_numpy_split_sizes() -> None:
    """Pass split sizes to all-to-all as numpy: Megatron converts only tensors from a GPU."""
    utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    original = utils.maybe_move_tensor_to_cpu

    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        if torch.is_tensor(tensor) and as_numpy:
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _pad_uneven_collectives() -> None:
    """Gather and scatter tensors of unequal sizes, which gloo lacks and experts need."""
    from moe_replay.megatron.upstream import uneven

    distributed = _Overlay(
        torch.distributed, all_gather=uneven.all_gather, reduce_scatter=uneven.reduce_scatter
    )
    for name in ("tensor_parallel.mappings", "dist_checkpointing.exchange_utils"):
        module = importlib.import_module(f"megatron.core.{name}")
        module.torch = _Overlay(module.torch, distributed=distributed)


def _order_two_stage_p2p() -> None:
    """Pair sends with receives: gloo matches strictly in order and sends only once it is received.

    Both ranks post (previous, next), so with two stages the second rank's order has to be reversed:
    nccl groups the batch and does not care, gloo would swap activations silently. And these are the
    shapes of what follows: a rank that waits for its own to be received before it takes the tensor
    of the other one waits for ever where that one has no more to send (interleaving, one microbatch
    a stage). Sends are therefore waited for at the next exchange, when the tensor behind each of
    them has been received.
    """
    communication = importlib.import_module("megatron.core.pipeline_parallel.p2p_communication")
    post = torch.distributed.batch_isend_irecv
    sent: list[Any] = []

    def batch_isend_irecv(ops: list[Any]) -> list[Any]:
        while sent:
            sent.pop().wait()
        group = ops[0].group or torch.distributed.group.WORLD
        sends = [op for op in ops if op.op is torch.distributed.isend]
        receives = [op for op in ops if op.op is torch.distributed.irecv]
        if len(ops) > 2 and group.size() == 2 and group.rank() == 1:
            sends, receives = sends[::-1], receives[::-1]
        sent.extend(post(sends) if sends else ())
        return post(receives) if receives else []

    distributed = _Overlay(torch.distributed, batch_isend_irecv=batch_isend_irecv)
    communication.torch = _Overlay(torch, distributed=distributed)


def _offload_from_the_cpu() -> None:
    """Let `HybridDeviceOptimizer` divide parameters that are not on a GPU.

    It takes those of the CPU for copies that it made itself, and looks in vain for their originals.
    """
    module = importlib.import_module("megatron.core.optimizer.cpu_offloading.hybrid_optimizer")
    module.HybridDeviceOptimizer._get_sub_optimizer_param_groups = _divided
    module.HybridDeviceOptimizer._move_new_state_to_right_device = lambda self: None


def _divided(optimizer: Any, offload_fraction: float) -> tuple[Any, ...]:
    """Return what `_get_sub_optimizer_param_groups` does, with a copy for each offloaded parameter.

    Groups of the copies, groups of the rest, parameter -> copy, copy -> parameter, and parameter ->
    its float32 stand-in where it has another format.
    """
    groups: tuple[list[Any], list[Any]] = [], []
    copies: dict[torch.Tensor, torch.Tensor] = {}
    wide: dict[torch.Tensor, torch.Tensor] = {}
    total = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    offloaded = 0
    for group in optimizer.param_groups:
        parts: tuple[list[Any], list[Any]] = [], []
        for parameter in group["params"]:
            is_offloaded, inner = offloaded < offload_fraction * total, parameter
            if is_offloaded:
                inner = parameter.detach().clone()
                offloaded += inner.numel()
            if optimizer.param_update_in_fp32 and inner.dtype != torch.float32:
                inner = wide[parameter] = inner.detach().clone().float()
            if is_offloaded:
                copies[parameter] = inner
            parts[not is_offloaded].append(inner)
        for kept, part in zip(groups, parts, strict=True):
            if part:
                kept.append({**group, "params": part})
    return *groups, copies, {copy: original for original, copy in copies.items()}, wide
