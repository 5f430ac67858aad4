"""Options of Megatron that are not honoured, with replay or without.

What no replay can be exact with is in `moe_replay.megatron.replay.refusals`.
"""

from __future__ import annotations

from typing import Any

from moe_replay.recipe.options.rows import Refused, names

_BALANCING = frozenset(
    names("none aux_loss seq_aux_loss global_aux_loss sinkhorn quantile_balancing")
)


def _kinds(value: Any) -> set[Any]:
    return set(value) if isinstance(value, list) else {value}


_FSDP = "weights are held by DistributedDataParallel; Megatron's FSDP is not supported"
_LOOP = "Megatron's own training loop reads it, which is not used"
_INFERENCE = "it belongs to Megatron's inference, which is not used; an engine samples"

REFUSED = (
    Refused(
        "transformer",
        ("hidden_dropout", "attention_dropout"),
        "log-probabilities before the update are computed without dropout, so every importance "
        "ratio would be noise",
    ),
    Refused(
        "transformer",
        ("moe_enable_routing_replay",),
        "Megatron's process-global replay would compete with the replay scope",
    ),
    Refused(
        "transformer",
        ("moe_router_load_balancing_type",),
        "megatron.moe_aux_loss_coeff decides between the two, above 0 for aux_loss",
        lambda value: _kinds(value) <= {"none", "aux_loss"},
        "none, aux_loss",
    ),
    Refused(
        "transformer",
        ("moe_router_load_balancing_type",),
        "over a packed microbatch its loss depends on which samples lie together and in which "
        "order, so it would not be the same in every layout; set megatron.moe_aux_loss_coeff",
        lambda value: bool(_kinds(value) & {"seq_aux_loss", "global_aux_loss"}),
        "seq_aux_loss, global_aux_loss",
    ),
    Refused(
        "transformer",
        ("moe_router_load_balancing_type",),
        "Megatron-Core has no such balancing, and would balance nothing without a word",
        lambda value: bool(_kinds(value) - _BALANCING),
        "unknown ones",
    ),
    Refused(
        "transformer",
        ("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph"),
        "a captured graph has one shape, and packed microbatches have many",
        lambda value: value not in (False, "none"),
        "all but none",
    ),
    Refused(
        "transformer",
        ("tp_comm_overlap",),
        "its buffers are registered for one number of rows, and packed microbatches have many",
    ),
    Refused(
        "transformer",
        ("hybrid_context_parallel", "hierarchical_context_parallel_sizes"),
        "rows are divided in zigzag order over one group of context-parallel ranks",
    ),
    Refused(
        "transformer",
        ("mtp_num_layers", "mtp_standalone"),
        "prediction layers are not trained; an export copies them",
    ),
    Refused(
        "transformer",
        ("defer_embedding_wgrad_compute",),
        "log-probabilities are computed inside the output layer, which this calls again later",
    ),
    Refused(
        "transformer",
        ("cross_entropy_loss_fusion",),
        "log-probabilities are computed in chunks (batch.logprob_chunk_size), so no logits exist "
        "that it could take",
    ),
    Refused(
        "transformer",
        ("masked_softmax_fusion", "apply_query_key_layer_scaling"),
        "attention is Transformer Engine's or PyTorch's, which scale and mask inside their kernels",
    ),
    Refused(
        "transformer",
        ("persist_layer_norm", "memory_efficient_layer_norm"),
        "norms are Transformer Engine's or PyTorch's RMSNorm, which do not know it",
    ),
    Refused(
        "transformer",
        ("fp8_param", "fp4_param"),
        "weights are loaded, exported and pushed in model.dtype; fp8 and fp4 serve the products",
    ),
    Refused(
        "transformer",
        ("num_microbatches_with_partial_activation_checkpoints",),
        "forward steps here do not take a flag for recomputation by microbatch; use "
        "megatron.recompute_num_layers",
    ),
    Refused(
        "transformer",
        ("distribute_saved_activations",),
        "it excludes sequence parallelism, which is on wherever tensors are cut",
    ),
    Refused(
        "transformer",
        ("use_ring_exchange_p2p", "pipeline_model_parallel_comm_backend"),
        "pipeline stages talk over torch's own process groups",
    ),
    Refused(
        "transformer",
        names("qk_clip log_max_attention_logit moe_per_layer_logging barrier_with_L1_time timers"),
        _LOOP,
    ),
    Refused(
        "transformer",
        names(
            "flash_decode cache_mla_latents inference_rng_tracker use_inference_optimized_layers "
            "inference_fuse_tp_communication symmetric_ar_type"
        ),
        _INFERENCE,
    ),
    Refused(
        "transformer",
        ("moe_token_dropping",),
        "Megatron-Core declares it and does not implement it",
    ),
    Refused("transformer", ("test_mode",), "it serves Megatron's own tests"),
    Refused(
        "ddp",
        ("average_in_collective",),
        "gradients are sums that are divided once by the number of tokens of all ranks, and "
        "Megatron-Core refuses to average those",
    ),
    Refused(
        "ddp",
        ("num_distributed_optimizer_instances",),
        "optimizer state is shared by all replicas, never kept in several copies",
        lambda value: value != 1,
        "above 1",
    ),
    Refused(
        "ddp",
        ("check_for_nan_in_grad", "check_for_large_grads"),
        "Megatron would end one rank while the others wait for it; every gradient is checked "
        "already, on all ranks, and the error names the sample",
    ),
    Refused(
        "ddp",
        ("use_megatron_fsdp", "use_custom_fsdp"),
        _FSDP,
    ),
    Refused(
        "ddp",
        names(
            "data_parallel_sharding_strategy outer_dp_sharding_strategy "
            "suggested_communication_unit_size keep_fp8_transpose_cache fsdp_double_buffer "
            "fsdp_manual_registration"
        ),
        _FSDP,
        lambda value: value not in (False, "no_shard"),
        "all but no_shard and false",
    ),
    Refused(
        "ddp",
        ("fp8_param_gather", "reuse_grad_buf_for_mxfp8_param_ag"),
        "weights are loaded, exported and pushed in model.dtype, so they are gathered in it",
    ),
    Refused(
        "ddp",
        ("delay_wgrad_compute",),
        "weight gradients then come between the layers of other microbatches, where Megatron runs "
        "routers that belong to no forward step",
    ),
    Refused(
        "optimizer",
        ("optimizer",),
        "[optimizer] is AdamW",
        lambda value: value != "adam",
        "all but adam",
    ),
    Refused(
        "optimizer",
        ("decoupled_lr", "decoupled_min_lr"),
        "one schedule of [optimizer] drives all parameters",
        lambda value: True,
        "any value",
    ),
    Refused(
        "optimizer",
        names("loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis"),
        "only fp16 scales its loss, and models are trained in float32 or bfloat16",
        lambda value: True,
        "any value",
    ),
    Refused(
        "optimizer",
        ("overlap_param_gather_with_optimizer_step",),
        "the optimizer then has parts by model chunk, where checkpoints have a dense part and one "
        "of the experts",
    ),
    Refused("optimizer", ("log_num_zeros_in_grad", "barrier_with_L1_time", "timers"), _LOOP),
    Refused(
        "optimizer",
        ("optimizer_offload_fraction",),
        "that offloads nothing; Megatron's own default is 0.0, here it is 1.0 with "
        "optimizer_cpu_offload = true",
        lambda value: value == 0,
        "0",
    ),
)
