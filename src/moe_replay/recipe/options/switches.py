"""Options of Megatron that do nothing without another one."""

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
