"""Megatron's own options: what another key decides, what is not honoured, what has no effect."""

import pytest

from moe_replay.errors import RecipeError, UnsupportedError
from moe_replay.recipe.options.decided import DECIDED
from moe_replay.recipe.options.refused import REFUSED
from moe_replay.recipe.options.switches import SWITCHES
from moe_replay.recipe.sections.resumable import MAY_CHANGE_ON_RESUME

from ...grpo.smallest_recipe import problems_of, recipe

BFLOAT16 = {"dtype": "bfloat16"}
# (table, field, a value that is refused, one that is not or None, words of the reason)
NOT_HONOURED = [
    ("transformer", "hidden_dropout", 0.1, 0.0, "every importance ratio would be noise"),
    ("transformer", "attention_dropout", 0.1, 0.0, "every importance ratio would be noise"),
    ("transformer", "moe_enable_routing_replay", True, False, "would compete"),
    ("transformer", "moe_router_load_balancing_type", "aux_loss", "sinkhorn", "moe_aux_loss_coeff"),
    ("transformer", "moe_router_load_balancing_type", "none", "sinkhorn", "moe_aux_loss_coeff"),
    (
        "transformer",
        "moe_router_load_balancing_type",
        ["aux_loss", "seq_aux_loss"],
        ["sinkhorn"],
        "in which order",
    ),
    (
        "transformer",
        "moe_router_load_balancing_type",
        "global_aux_loss",
        "sinkhorn",
        "not be the same in every layout",
    ),
    ("transformer", "moe_router_load_balancing_type", "aux", "sinkhorn", "has no such balancing"),
    ("transformer", "cuda_graph_impl", "transformer_engine", "none", "a captured graph has one"),
    ("transformer", "enable_cuda_graph", True, False, "a captured graph has one"),
    ("transformer", "external_cuda_graph", True, False, "a captured graph has one"),
    ("transformer", "tp_comm_overlap", True, False, "registered for one number of rows"),
    ("transformer", "hybrid_context_parallel", True, False, "zigzag"),
    ("transformer", "hierarchical_context_parallel_sizes", [2, 2], None, "zigzag"),
    ("transformer", "mtp_num_layers", 1, None, "prediction layers are not trained"),
    ("transformer", "mtp_standalone", True, False, "prediction layers are not trained"),
    ("transformer", "defer_embedding_wgrad_compute", True, False, "inside the output layer"),
    ("transformer", "cross_entropy_loss_fusion", True, False, "computed in chunks"),
    ("transformer", "masked_softmax_fusion", True, False, "inside their kernels"),
    ("transformer", "apply_query_key_layer_scaling", True, False, "inside their kernels"),
    ("transformer", "persist_layer_norm", True, False, "RMSNorm"),
    ("transformer", "memory_efficient_layer_norm", True, False, "RMSNorm"),
    ("transformer", "fp8_param", True, False, "exported and pushed in model.dtype"),
    ("transformer", "fp4_param", True, False, "exported and pushed in model.dtype"),
    (
        "transformer",
        "num_microbatches_with_partial_activation_checkpoints",
        2,
        None,
        "megatron.recompute_num_layers",
    ),
    ("transformer", "distribute_saved_activations", True, False, "excludes sequence parallelism"),
    ("transformer", "use_ring_exchange_p2p", True, False, "torch's own process groups"),
    (
        "transformer",
        "pipeline_model_parallel_comm_backend",
        "ucc",
        None,
        "torch's own process groups",
    ),
    ("transformer", "qk_clip", True, False, "Megatron's own training loop"),
    ("transformer", "log_max_attention_logit", True, False, "Megatron's own training loop"),
    ("transformer", "moe_per_layer_logging", True, False, "Megatron's own training loop"),
    ("transformer", "barrier_with_L1_time", True, False, "Megatron's own training loop"),
    ("transformer", "timers", "t", None, "Megatron's own training loop"),
    ("transformer", "flash_decode", True, False, "Megatron's inference"),
    ("transformer", "cache_mla_latents", True, False, "Megatron's inference"),
    ("transformer", "inference_rng_tracker", True, False, "Megatron's inference"),
    ("transformer", "use_inference_optimized_layers", True, False, "Megatron's inference"),
    ("transformer", "inference_fuse_tp_communication", True, False, "Megatron's inference"),
    ("transformer", "symmetric_ar_type", "one_shot", None, "Megatron's inference"),
    ("transformer", "moe_token_dropping", True, False, "does not implement it"),
    ("transformer", "test_mode", True, False, "Megatron's own tests"),
    ("ddp", "average_in_collective", True, False, "divided once by the number of tokens"),
    ("ddp", "num_distributed_optimizer_instances", 2, 1, "shared by all replicas"),
    ("ddp", "check_for_nan_in_grad", True, False, "the error names the sample"),
    ("ddp", "check_for_large_grads", True, False, "the error names the sample"),
    ("ddp", "use_megatron_fsdp", True, False, "FSDP is not supported"),
    ("ddp", "use_custom_fsdp", True, False, "FSDP is not supported"),
    ("ddp", "data_parallel_sharding_strategy", "optim", "no_shard", "FSDP is not supported"),
    ("ddp", "outer_dp_sharding_strategy", "optim", "no_shard", "FSDP is not supported"),
    ("ddp", "suggested_communication_unit_size", 9, None, "FSDP is not supported"),
    ("ddp", "keep_fp8_transpose_cache", True, False, "FSDP is not supported"),
    ("ddp", "fsdp_double_buffer", True, False, "FSDP is not supported"),
    ("ddp", "fsdp_manual_registration", True, False, "FSDP is not supported"),
    ("ddp", "fp8_param_gather", True, False, "gathered in it"),
    ("ddp", "reuse_grad_buf_for_mxfp8_param_ag", True, False, "gathered in it"),
    ("ddp", "delay_wgrad_compute", True, False, "belong to no forward step"),
    ("optimizer", "optimizer", "sgd", "adam", "[optimizer] is AdamW"),
    ("optimizer", "decoupled_lr", 1e-4, None, "one schedule"),
    ("optimizer", "decoupled_min_lr", 0.0, None, "one schedule"),
    ("optimizer", "loss_scale", 1.0, None, "only fp16 scales its loss"),
    ("optimizer", "initial_loss_scale", 1.0, None, "only fp16 scales its loss"),
    ("optimizer", "min_loss_scale", 1.0, None, "only fp16 scales its loss"),
    ("optimizer", "loss_scale_window", 1.0, None, "only fp16 scales its loss"),
    ("optimizer", "hysteresis", 1, None, "only fp16 scales its loss"),
    (
        "optimizer",
        "overlap_param_gather_with_optimizer_step",
        True,
        False,
        "parts by model chunk",
    ),
    ("optimizer", "log_num_zeros_in_grad", True, False, "Megatron's own training loop"),
    ("optimizer", "barrier_with_L1_time", True, False, "Megatron's own training loop"),
    ("optimizer", "timers", "t", None, "Megatron's own training loop"),
]


@pytest.mark.parametrize(("table", "name", "refused", "accepted", "reason"), NOT_HONOURED)
def test_an_option_that_is_not_honoured_is_refused_with_the_reason(
    table, name, refused, accepted, reason
):
    with pytest.raises(UnsupportedError) as caught:
        recipe(megatron={table: {name: refused}})
    assert f"megatron.{table}.{name}: {refused!r} cannot be honoured" in str(caught.value)
    assert reason in str(caught.value)
    if accepted is not None:
        loaded = recipe(megatron={table: {name: accepted}})
        assert getattr(loaded.megatron, table) == {name: accepted}


def test_every_line_of_the_table_has_a_case_above():
    lines = {(row.table, name) for row in REFUSED for name in row.fields}
    cases = {(table, name) for table, name, *_ in NOT_HONOURED}
    # Its case needs its switch, below.
    assert lines - cases == {("optimizer", "optimizer_offload_fraction")}
    assert cases - lines == set()


def test_a_fraction_of_0_would_offload_nothing():
    asked = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.0}
    with pytest.raises(UnsupportedError, match=r"that offloads nothing; Megatron's own default"):
        recipe(megatron={"optimizer": asked}, model=BFLOAT16)
    asked["optimizer_offload_fraction"] = 0.5
    half = recipe(megatron={"optimizer": asked}, model=BFLOAT16)
    assert half.megatron.optimizer_fields()["optimizer_offload_fraction"] == 0.5


def test_offloading_offloads_everything_where_megatron_would_offload_nothing():
    offload = {"optimizer_cpu_offload": True}
    asked = recipe(megatron={"optimizer": offload}, model=BFLOAT16).megatron
    assert asked.optimizer_fields() == {
        "use_distributed_optimizer": True,
        "optimizer_offload_fraction": 1.0,
        "use_precision_aware_optimizer": True,
        "optimizer_cpu_offload": True,
    }
    assert recipe().megatron.optimizer_fields() == {"use_distributed_optimizer": True}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("use_precision_aware_optimizer", False, "which needs it"),
        ("decoupled_weight_decay", False, "whose optimizer is AdamW"),
        ("exp_avg_dtype", "bfloat16", "float32 on the host"),
        ("store_param_remainders", False, "float32 on the host"),
    ],
)
def test_what_an_optimizer_on_the_host_cannot_do_is_refused(name, value, said):
    asked = {"optimizer_cpu_offload": True, name: value}
    message = problems_of(megatron={"optimizer": asked}, model=BFLOAT16)
    assert f"megatron.optimizer.{name}: " in message
    assert said in message
    assert "has 1 problem:" in message


def test_an_optimizer_on_the_host_takes_bfloat16_gradients_and_models_alone():
    asked = {"optimizer_cpu_offload": True, "main_grads_dtype": "bfloat16"}
    loaded = recipe(megatron={"optimizer": asked}, model=BFLOAT16)
    assert loaded.megatron.ddp_fields()["grad_reduce_in_fp32"] is False
    with pytest.raises(UnsupportedError, match="cannot load the checkpoints of such a model"):
        recipe(megatron={"optimizer": asked}, model={"dtype": "float32"})


def test_an_optimizer_on_the_host_is_judged_by_what_the_device_makes_of_auto():
    asked = {"optimizer_cpu_offload": True}
    loaded = recipe(megatron={"optimizer": asked})
    assert loaded.on_device("cuda").model.dtype == "bfloat16"
    with pytest.raises(UnsupportedError, match="cannot load the checkpoints of such") as refused:
        loaded.on_device("cpu")
    assert str(refused.value).startswith("recipe, on a CPU, has 1 problem:\n")
    assert "true with model.dtype = 'float32'" in str(refused.value)
    recipe(megatron={"optimizer": asked}, model=BFLOAT16).on_device("cpu")
    recipe().on_device("cpu")


@pytest.mark.parametrize(
    ("table", "name", "decider"),
    [
        ("transformer", "tensor_model_parallel_size", "the key of the same name in [megatron]"),
        ("transformer", "sequence_parallel", "megatron.tensor_model_parallel_size"),
        ("transformer", "bf16", "model.dtype"),
        ("transformer", "hidden_size", "the checkpoint's config.json"),
        ("transformer", "num_moe_experts", "the checkpoint's config.json"),
        ("transformer", "moe_router_topk", "the checkpoint's config.json"),
        ("transformer", "perform_initialization", "from which all weights come"),
        ("transformer", "calculate_per_token_loss", "the trainer"),
        ("transformer", "moe_grouped_gemm", "model.grouped_experts"),
        ("transformer", "moe_enable_deepep", "megatron.transformer.moe_flex_dispatcher_backend"),
        ("ddp", "use_distributed_optimizer", "always on"),
        ("optimizer", "lr", "optimizer.lr"),
        ("optimizer", "adam_beta2", "optimizer.beta2"),
        ("optimizer", "clip_grad", "optimizer.clip_grad"),
        ("optimizer", "overlap_param_gather", "megatron.ddp.overlap_param_gather"),
        ("optimizer", "fp8_recipe", "megatron.transformer.fp8_recipe"),
    ],
)
def test_what_something_else_decides_is_refused_with_where_it_is_said(table, name, decider):
    message = problems_of(megatron={table: {name: 1}})
    assert f"megatron.{table}.{name}: set to 1, but what decides it is " in message
    assert decider in message
    assert "has 1 problem:" in message


@pytest.mark.parametrize(
    ("table", "name", "value", "switch", "on"),
    [
        ("transformer", "moe_deepep_num_sms", 24, "moe_token_dispatcher_type", "flex"),
        ("transformer", "offload_modules", ["moe_act"], "fine_grained_activation_offloading", True),
        ("transformer", "cpu_offloading_num_layers", 1, "cpu_offloading", True),
        ("transformer", "fused_single_qkv_rope", True, "apply_rope_fusion", True),
        ("transformer", "overlap_p2p_comm_warmup_flush", True, "overlap_p2p_comm", True),
        ("transformer", "fp8_recipe", "blockwise", "fp8", "e4m3"),
        ("transformer", "fp4_recipe", "nvfp4", "fp4", "e2m1"),
        ("transformer", "moe_token_drop_policy", "probs", "moe_expert_capacity_factor", 1.5),
        ("transformer", "delay_wgrad_compute", True, "overlap_moe_expert_parallel_comm", True),
        ("ddp", "bucket_size", 1000, "overlap_grad_reduce", True),
        ("ddp", "overlap_param_gather", True, "overlap_grad_reduce", True),
        ("optimizer", "exp_avg_dtype", "bfloat16", "use_precision_aware_optimizer", True),
        ("optimizer", "pin_cpu_grads", False, "optimizer_cpu_offload", True),
    ],
)
def test_an_option_without_its_switch_has_no_effect(table, name, value, switch, on):
    message = problems_of(megatron={table: {name: value}})
    assert f"megatron.{table}.{name}: set to {value!r}, but it has no effect" in message
    loaded = recipe(megatron={table: {name: value, switch: on}}, model=BFLOAT16)
    assert getattr(loaded.megatron, table)[name] == value


def test_an_option_stands_in_one_line_of_the_tables():
    switches = [(row.table, name) for row in SWITCHES for name in row.fields]
    decided = [(row.table, name) for row in DECIDED for name in row.fields]
    assert len(set(switches)) == len(switches)
    assert len(set(decided)) == len(decided)
    assert not set(decided) & set(switches)


def test_keys_of_megatron_may_be_said_in_either_place_but_not_in_both():
    here = recipe(megatron={"moe_aux_loss_coeff": 0.1})
    there = recipe(megatron={"transformer": {"moe_aux_loss_coeff": 0.1}})
    assert here == there
    assert there.megatron.config_fields()["moe_aux_loss_coeff"] == 0.1
    with pytest.raises(RecipeError, match=r"set beside megatron.moe_aux_loss_coeff"):
        recipe(megatron={"moe_aux_loss_coeff": 0.1, "transformer": {"moe_aux_loss_coeff": 0.1}})


def test_gradients_have_the_format_that_the_optimizer_takes():
    plain = recipe().megatron
    lean = {"use_precision_aware_optimizer": True, "main_grads_dtype": "bfloat16"}
    assert plain.ddp_fields()["grad_reduce_in_fp32"] is True
    assert (
        recipe(megatron={"optimizer": lean}).megatron.ddp_fields()["grad_reduce_in_fp32"] is False
    )


def test_a_run_resumes_with_other_kernels_and_not_with_other_arithmetic():
    options = {
        "transformer": {"moe_permute_fusion": True, "moe_z_loss_coeff": 0.1},
        "ddp": {"overlap_grad_reduce": True, "bucket_size": 5},
        "optimizer": {"optimizer_cpu_offload": True, "pin_cpu_grads": False},
    }
    items = recipe(megatron=options, model=BFLOAT16).fingerprint_items()
    assert {
        key: value
        for key, value in items.items()
        if key.startswith("megatron.") and key.count(".") == 2
    } == {
        "megatron.transformer.moe_z_loss_coeff": 0.1,
        "megatron.optimizer.optimizer_cpu_offload": True,
    }
    assert "moe_z_loss_coeff" not in MAY_CHANGE_ON_RESUME


@pytest.mark.parametrize(
    ("option", "degree", "harmless"),
    [
        (
            {"moe_z_loss_coeff": 0.1},
            "tensor_model_parallel_size",
            "expert_model_parallel_size",
        ),
        ({"moe_z_loss_coeff": 0.1}, "context_parallel_size", "pipeline_model_parallel_size"),
        ({"cpu_offloading": True}, "pipeline_model_parallel_size", "tensor_model_parallel_size"),
    ],
)
def test_an_option_that_some_parallelism_breaks_is_refused_with_it(option, degree, harmless):
    (name,) = option
    with pytest.raises(
        UnsupportedError, match=rf"transformer.{name}: .* with megatron.{degree} = 2"
    ):
        recipe(megatron={"transformer": option, degree: 2})
    assert recipe(megatron={"transformer": option, harmless: 2}).megatron.transformer == option
