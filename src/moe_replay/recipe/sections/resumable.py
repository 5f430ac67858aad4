"""Which of Megatron's own options a run may change when it is resumed."""

from __future__ import annotations

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
