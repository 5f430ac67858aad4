"""Fields of Megatron's configs that another key, the checkpoint or the trainer decides."""

from __future__ import annotations

from moe_replay.recipe.options.rows import Decided, names

_CHECKPOINT = "the checkpoint's config.json"
_TRAINER = "the trainer: it packs samples, counts tokens and reduces gradients itself"
_INITIAL = "the checkpoint, from which all weights come"

DECIDED = (
    Decided(
        "transformer",
        "the key of the same name in [megatron]",
        names(
            "tensor_model_parallel_size pipeline_model_parallel_size "
            "virtual_pipeline_model_parallel_size context_parallel_size expert_model_parallel_size "
            "expert_tensor_parallel_size num_layers_in_first_pipeline_stage "
            "num_layers_in_last_pipeline_stage pipeline_model_parallel_layout"
        ),
    ),
    Decided(
        "transformer",
        "megatron.tensor_model_parallel_size, above 1 with sequence parallelism",
        ("sequence_parallel",),
    ),
    Decided(
        "transformer",
        "megatron.pipeline_model_parallel_layout",
        ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    ),
    Decided(
        "transformer",
        "megatron.pipeline_model_parallel_size, in rounds of as many microbatches",
        ("microbatch_group_size_per_vp_stage",),
    ),
    Decided("transformer", "megatron.expert_tensor_parallel_size", ("moe_extended_tp",)),
    Decided("transformer", "megatron.recompute_modules", ("moe_layer_recompute",)),
    Decided(
        "transformer",
        "megatron.transformer.moe_flex_dispatcher_backend",
        ("moe_enable_deepep",),
    ),
    Decided(
        "transformer",
        "megatron.transformer.moe_router_padding_for_quantization",
        ("moe_router_padding_for_fp8",),
    ),
    Decided(
        "transformer",
        "model.dtype",
        ("params_dtype", "pipeline_dtype", "bf16", "fp16", "enable_autocast", "autocast_dtype"),
    ),
    Decided(
        "transformer",
        "whether Transformer Engine is installed, with which experts are always grouped, and "
        "model.grouped_experts without it",
        ("moe_grouped_gemm", "transformer_impl", "moe_use_legacy_grouped_gemm"),
    ),
    Decided(
        "transformer",
        _CHECKPOINT,
        names(
            "num_layers hidden_size num_attention_heads num_query_groups kv_channels "
            "ffn_hidden_size normalization layernorm_epsilon layernorm_zero_centered_gamma "
            "apply_residual_connection_post_layernorm gated_linear_unit activation_func "
            "activation_func_clamp_value glu_linear_offset use_fused_weighted_squared_relu "
            "add_bias_linear add_qkv_bias qk_layernorm qk_l2_norm attention_output_gate "
            "softmax_scale softmax_type rotary_interleaved window_size window_attn_skip_freq "
            "no_rope_freq mrope_section multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim "
            "qk_pos_emb_head_dim v_head_dim rope_type rotary_base rotary_percent "
            "rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow mscale "
            "mscale_all_dim num_moe_experts moe_layer_freq moe_ffn_hidden_size moe_latent_size "
            "moe_apply_probs_on_input moe_shared_expert_intermediate_size moe_shared_expert_gate "
            "moe_router_topk moe_router_topk_limited_devices moe_router_num_groups "
            "moe_router_group_topk moe_router_pre_softmax moe_router_topk_scaling_factor "
            "moe_router_score_function moe_router_enable_expert_bias experimental_attention_variant "
            "dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff "
            "dsa_indexer_use_sparse_loss linear_attention_freq linear_conv_kernel_dim "
            "linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads "
            "is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads "
            "use_mamba_mem_eff_path heterogeneous_block_specs hetereogenous_dist_checkpoint"
        ),
    ),
    Decided(
        "transformer",
        _INITIAL,
        names(
            "perform_initialization use_cpu_initialization init_method output_layer_init_method "
            "init_method_std embedding_init_method embedding_init_method_std "
            "init_model_with_meta_device"
        ),
    ),
    Decided(
        "transformer",
        _TRAINER,
        names(
            "variable_seq_lengths calculate_per_token_loss batch_p2p_comm batch_p2p_sync "
            "finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func "
            "moe_router_bias_update_rate"
        ),
    ),
    Decided(
        "ddp",
        "the trainer: the distributed optimizer is always on",
        ("use_distributed_optimizer",),
    ),
    Decided(
        "optimizer",
        "the trainer: the distributed optimizer is always on",
        ("use_distributed_optimizer",),
    ),
    Decided("optimizer", "optimizer.lr", ("lr",)),
    Decided("optimizer", "optimizer.min_lr", ("min_lr",)),
    Decided("optimizer", "optimizer.weight_decay", ("weight_decay",)),
    Decided("optimizer", "optimizer.beta1", ("adam_beta1",)),
    Decided("optimizer", "optimizer.beta2", ("adam_beta2",)),
    Decided("optimizer", "optimizer.eps", ("adam_eps",)),
    Decided("optimizer", "optimizer.clip_grad", ("clip_grad",)),
    Decided("optimizer", "model.dtype", ("bf16", "fp16", "params_dtype")),
    Decided("optimizer", "megatron.ddp.overlap_param_gather", ("overlap_param_gather",)),
    Decided("optimizer", "megatron.transformer.fp8_recipe", ("fp8_recipe",)),
    Decided(
        "optimizer",
        "megatron.ddp.reuse_grad_buf_for_mxfp8_param_ag",
        ("reuse_grad_buf_for_mxfp8_param_ag",),
    ),
)
