"""Options of Megatron that do nothing without another one, and those a resumed run may change."""

from __future__ import annotations

from moe_replay.recipe.options.rows import Switch, names

SWITCHES = (
    Switch(
        "transformer",
        ("moe_flex_dispatcher_backend", "moe_deepep_num_sms", "moe_hybridep_num_sms"),
        "moe_token_dispatcher_type",
        "flex",
    ),
    Switch(
        "transformer",
        ("offload_modules", "min_offloaded_tensor_size"),
        "transformer.fine_grained_activation_offloading",
    ),
    Switch(
        "transformer",
        (
            "cpu_offloading_num_layers",
            "cpu_offloading_activations",
            "cpu_offloading_weights",
            "cpu_offloading_double_buffering",
        ),
        "transformer.cpu_offloading",
    ),
    Switch("transformer", ("fused_single_qkv_rope",), "transformer.apply_rope_fusion"),
    Switch(
        "transformer",
        ("overlap_p2p_comm_warmup_flush",),
        "transformer.overlap_p2p_comm",
    ),
    Switch(
        "transformer",
        ("delay_wgrad_compute", "ep_overlap_early_attn_memory_release"),
        "transformer.overlap_moe_expert_parallel_comm",
    ),
    Switch(
        "transformer",
        ("moe_pad_expert_input_to_capacity", "moe_token_drop_policy"),
        "transformer.moe_expert_capacity_factor",
        None,
    ),
    Switch(
        "transformer",
        names(
            "fp8_recipe fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo "
            "fp8_wgrad fp8_dot_product_attention fp8_multi_head_attention fp8_quantizer_factory "
            "tp_only_amax_red first_last_layers_bf16 num_layers_at_start_in_bf16 "
            "num_layers_at_end_in_bf16"
        ),
        "transformer.fp8",
        None,
    ),
    Switch("transformer", ("fp4_recipe", "fp4_quantizer_factory"), "transformer.fp4", None),
    Switch(
        "transformer",
        names(
            "tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs "
            "tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs "
            "tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 "
            "tp_comm_bootstrap_backend"
        ),
        "transformer.tp_comm_overlap",
    ),
    Switch("ddp", ("bucket_size", "overlap_param_gather"), "ddp.overlap_grad_reduce"),
    Switch("ddp", ("align_param_gather",), "ddp.overlap_param_gather"),
    Switch("ddp", ("disable_symmetric_registration",), "ddp.nccl_ub"),
    Switch(
        "optimizer",
        names(
            "main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype "
            "store_param_remainders"
        ),
        "optimizer.use_precision_aware_optimizer",
    ),
    Switch(
        "optimizer",
        names(
            "optimizer_offload_fraction overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params "
            "use_torch_optimizer_for_cpu_offload"
        ),
        "optimizer.optimizer_cpu_offload",
    ),
)

MAY_CHANGE_ON_RESUME = frozenset(
    {
        "overlap_p2p_comm",
        "overlap_p2p_comm_warmup_flush",
        "deallocate_pipeline_outputs",
        "moe_flex_dispatcher_backend",
        "moe_deepep_num_sms",
        "moe_hybridep_num_sms",
        "moe_permute_fusion",
        "moe_permute_fusion_into_hybridep",
        "moe_shared_expert_overlap",
        "apply_rope_fusion",
        "fused_single_qkv_rope",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "gradient_accumulation_fusion",
        "attention_backend",
        "cp_comm_type",
        "use_te_activation_func",
        "use_te_rng_tracker",
        "deterministic_mode",
        "batch_invariant_mode",
        "cpu_offloading",
        "cpu_offloading_num_layers",
        "cpu_offloading_activations",
        "cpu_offloading_weights",
        "cpu_offloading_double_buffering",
        "fine_grained_activation_offloading",
        "offload_modules",
        "min_offloaded_tensor_size",
        "overlap_dispatch_backward_with_experts_wgrad",
        "disable_parameter_transpose_cache",
        "clone_scatter_output_in_embedding",
        "config_logger_dir",
        # [megatron.ddp]
        "overlap_grad_reduce",
        "overlap_param_gather",
        "align_param_gather",
        "bucket_size",
        "pad_buckets_for_high_nccl_busbw",
        "nccl_ub",
        "disable_symmetric_registration",
        # [megatron.optimizer]
        "overlap_cpu_optimizer_d2h_h2d",
        "pin_cpu_grads",
        "pin_cpu_params",
        "optimizer_offload_fraction",
    }
)
"""Fields of all three tables that decide where, when or by which kernel something is computed, and
nothing that is learned beyond rounding: a run resumes with others."""
