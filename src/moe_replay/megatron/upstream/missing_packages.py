"""Replaces optional packages that Megatron-Core needs: Triton, Transformer Engine, Apex.

None of this has to do with CUDA: `pip install moe-replay` on a GPU machine brings neither
Transformer Engine nor Apex, and Megatron then falls back to torch's Adam there as on a CPU. Each
function says what breaks without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from functools import wraps
from typing import Any

import torch
from packaging.version import Version

from moe_replay.megatron.upstream.warnings import quiet_megatron

_MARK = "_moe_replay_keeps_state"


def has_transformer_engine() -> bool:
    """Tell whether Transformer Engine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


def has_fused_adam() -> bool:
    """Whether Megatron found an Adam of Transformer Engine or Apex; it imports them if it can."""
    return bool(_module("optimizer.distrib_optimizer").HAVE_APEX_OR_TE)


def replace_paged_stash() -> None:
    """Provide an empty `paged_stash`: schedules import it from 0.18 on, and it imports Triton."""
    module = types.ModuleType("megatron.core.transformer.moe.paged_stash")
    for name in (
        "check_paged_stash_overflow",
        "get_paged_stash_context",
        "paged_stash_group_commit",
        "paged_stash_group_start",
        "paged_stash_init_chunk_handler",
        "paged_stash_reset",
        "paged_stash_set_last_layer",
    ):
        setattr(module, name, lambda *args, **kwargs: None)
    sys.modules[module.__name__] = module


def replace_transformer_engine() -> None:
    """Let routers, latent attention and selective recomputation run without Transformer Engine.

    0.16 reads `te_general_gemm` in the router's gating and defines it only where Transformer Engine
    is installed. Latent attention takes the stand-ins of missing classes for the real ones, tests
    for them, and accepts one replicated layer by the name `Linear`. Recomputation of layernorm and
    moe_act takes its own default, ``fp8=False``, for "fp8 is on", and then asks a class that is not
    there. And every "at least version X of it" compares a version with None.
    """
    from moe_replay.megatron.upstream.layers import ReplicatedLinear

    _module("utils").get_te_version = lambda: Version("0")
    moe_utils = _module("transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    latent_attention = _module("transformer.multi_latent_attention")
    latent_attention.HAVE_TE = False
    latent_attention.Linear = ReplicatedLinear
    recomputation = _module("tensor_parallel.random").CheckpointWithoutOutput
    recomputation.__init__.__defaults__ = (None,)


def keep_torch_adam_state() -> None:
    """Let the distributed optimizer save and load the state of torch's Adam.

    torch's Adam creates its state at the first step and keeps `step` in it. Megatron expects the
    state to exist when it saves, has no `step` in what it loads, and gives every parameter the
    *same* step tensor, to which Adam then adds one per parameter: after a resume at step 3 the next
    update is step 20 of one parameter, 67 of another, and training goes on silently wrong.
    """
    optimizer_class = _module("optimizer.distrib_optimizer").DistributedOptimizer
    if hasattr(optimizer_class, _MARK):
        return
    state_dict, load_state_dict = optimizer_class.state_dict, optimizer_class.load_state_dict
    set_parameter_state = optimizer_class._set_main_param_and_optimizer_states

    @wraps(state_dict)
    def state_dict_with_state(self: Any) -> Any:
        if not self.optimizer.state:
            # With optimizer_cpu_offload several optimizers share the parameters.
            is_divided = hasattr(self.optimizer, "sub_optimizers")
            for inner in self.optimizer.sub_optimizers if is_divided else [self.optimizer]:
                for parameter in (p for group in inner.param_groups for p in group["params"]):
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
            if is_divided:
                self.optimizer._sync_sub_optimizers_state_to_hdo()
        return state_dict(self) if self.optimizer.state else _state_without_parameters(self)

    @wraps(load_state_dict)
    def load_state_dict_with_own_steps(self: Any, loaded: Any) -> None:
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @wraps(set_parameter_state)
    @torch.no_grad()
    def set_given_parameter_state(
        self: Any, model_param: Any, tensors: dict[str, torch.Tensor]
    ) -> None:
        group, order = self.model_param_group_index_map[model_param]
        parameter = self.optimizer.param_groups[group]["params"][order]
        state = self.optimizer.state[parameter]
        main = state.get("master_param", parameter)
        for name, target in {"param": main, **state}.items():
            if name in tensors:
                target.copy_(tensors[name])

    optimizer_class.state_dict = state_dict_with_state
    optimizer_class.load_state_dict = load_state_dict_with_own_steps
    optimizer_class._set_main_param_and_optimizer_states = set_given_parameter_state
    setattr(optimizer_class, _MARK, True)


def _state_without_parameters(optimizer: Any) -> dict[str, Any]:
    """Return the state of an empty part, such as the experts' part on a stage of dense layers.

    Megatron would ask its parameters for their one step. The step here is a placeholder;
    `checkpoint` puts that of the other parts in its place.
    """
    groups = optimizer.optimizer.state_dict()["param_groups"]
    kept = [{name: value for name, value in g.items() if name != "params"} for g in groups]
    state: dict[str, Any] = {
        "optimizer": {"param_groups": [{**group, "step": 0.0} for group in kept]}
    }
    if optimizer.grad_scaler:
        state["grad_scaler"] = optimizer.grad_scaler.state_dict()
    return state


def _module(name: str) -> Any:
    with quiet_megatron():
        return importlib.import_module(f"megatron.core.{name}")
