"""Megatron's own options against the dataclasses that are installed."""

import dataclasses

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig

from moe_replay.errors import RecipeError, UnsupportedError
from moe_replay.megatron.options.needs import NEEDS
from moe_replay.megatron.options.typed import option_errors, read_options
from moe_replay.megatron.upstream.compat import VERSION
from moe_replay.recipe.options.decided import DECIDED
from moe_replay.recipe.options.refused import REFUSED
from moe_replay.recipe.options.switches import SWITCHES
from moe_replay.recipe.sections.resumable import MAY_CHANGE_ON_RESUME
from moe_replay.recipe.sections.training import MegatronSection

CONFIGS = {
    "transformer": MLATransformerConfig,
    "ddp": DistributedDataParallelConfig,
    "optimizer": OptimizerConfig,
}


def errors(**tables):
    return [str(error) for error in option_errors(MegatronSection(**tables))]


@pytest.mark.parametrize(
    ("table", "name", "value", "words"),
    [
        ("transformer", "moe_z_loss_coef", 0.1, "(nearest: 'moe_z_loss_coeff'). Rename it"),
        ("transformer", "overlap_grad_reduce", True, "move it to [megatron.ddp]"),
        ("ddp", "exp_avg_dtype", "bfloat16", "move it to [megatron.optimizer]"),
        ("transformer", "moe_z_loss_coeff", "much", "expected a number"),
        ("transformer", "moe_z_loss_coeff", True, "expected a number"),
        ("transformer", "moe_permute_fusion", 1, "expected true or false"),
        ("transformer", "moe_deepep_num_sms", 1.5, "expected an integer"),
        ("transformer", "config_logger_dir", 1, "expected a string"),
        ("transformer", "moe_router_dtype", "fp16", "expected one of 'fp32', 'fp64'"),
        ("transformer", "attention_backend", "flush", "(nearest: 'flash')"),
        ("transformer", "offload_modules", "moe_act", "expected a list"),
        ("transformer", "offload_modules", [1], "expected a string"),
        ("transformer", "quant_recipe", "x", "an object of Python, which a recipe cannot hold"),
        ("ddp", "bucket_size", 1.5, "expected an integer"),
        ("optimizer", "exp_avg_dtype", "bf16", "expected one of 'float32', 'bfloat16'"),
        ("optimizer", "exp_avg_dtype", "float64", "expected one of 'float32', 'bfloat16'"),
        ("optimizer", "optimizer_offload_fraction", "all", "expected a number"),
    ],
)
def test_a_wrong_name_or_type_is_named_with_what_is_expected(table, name, value, words):
    found = [text for text in errors(**{table: {name: value}}) if "needs" not in text]
    assert len(found) == 1
    assert found[0].startswith(f"megatron.{table}.{name}: ")
    assert words in found[0]
    with pytest.raises(RecipeError):
        read_options(MegatronSection(**{table: {name: value}}))


@pytest.mark.skipif(VERSION >= (0, 18), reason="the field came with 0.18")
def test_a_field_of_a_later_release_is_named_with_that_release():
    (message,) = errors(transformer={"moe_expert_rank_capacity_factor": 1.5})
    assert "no such field; it came with 0.18" in message


def test_values_arrive_in_megatrons_types():
    options = read_options(
        MegatronSection(
            transformer={"moe_z_loss_coeff": 1, "config_logger_dir": "/tmp/x"},
            ddp={"overlap_grad_reduce": True, "bucket_size": 7},
            optimizer={
                "use_precision_aware_optimizer": True,
                "optimizer_cpu_offload": True,
                "exp_avg_dtype": "bfloat16",
                "main_grads_dtype": "bfloat16",
            },
        )
    )
    assert options.transformer["moe_z_loss_coeff"] == 1.0
    assert isinstance(options.transformer["moe_z_loss_coeff"], float)
    assert options.ddp == {
        "grad_reduce_in_fp32": False,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "bucket_size": 7,
    }
    assert options.optimizer["exp_avg_dtype"] is torch.bfloat16
    assert options.optimizer["main_grads_dtype"] is torch.bfloat16
    assert options.optimizer["optimizer_offload_fraction"] == 1.0


def test_tables_name_fields_that_exist():
    """Some came or went with a release; the others would be typing errors."""
    named = {(row.table, name) for row in (*DECIDED, *REFUSED, *NEEDS) for name in row.fields}
    named |= {(row.table, name) for row in SWITCHES for name in row.fields}
    known = {(t, each.name) for t, config in CONFIGS.items() for each in dataclasses.fields(config)}
    if VERSION == (0, 16):
        assert named - known == set()
    every_field = {name for _, name in known}
    assert MAY_CHANGE_ON_RESUME - every_field <= {
        "moe_permute_fusion_into_hybridep",  # 0.18
        "overlap_dispatch_backward_with_experts_wgrad",  # 0.20
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="what needs a GPU may be accepted on one")
@pytest.mark.parametrize(
    ("table", "name"), [(need.table, f) for need in NEEDS for f in need.fields]
)
def test_what_needs_a_gpu_is_refused_without_one_with_what_is_missing(table, name):
    choices = {
        "fp8": "e4m3",
        "fp4": "e2m1",
        "cp_comm_type": "p2p",
        "attention_backend": "flash",
    }
    value = choices.get(name, True)
    refused = list(option_errors(MegatronSection(**{table: {name: value}})))
    assert len(refused) == 1
    assert isinstance(refused[0], UnsupportedError)
    assert str(refused[0]).startswith(f"megatron.{table}.{name}: ")
    assert "GPU" in str(refused[0])
    if value is True:
        assert list(option_errors(MegatronSection(**{table: {name: False}}))) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have the packages")
@pytest.mark.parametrize(
    ("backend", "package"),
    [({}, "DeepEP"), ({"moe_flex_dispatcher_backend": "hybridep"}, "Hybrid")],
)
def test_the_flex_dispatcher_says_which_package_is_missing(backend, package):
    (message,) = errors(moe_token_dispatcher_type="flex", transformer=backend)
    assert "megatron.moe_token_dispatcher_type: 'flex' needs" in message
    assert package in message
    assert errors(moe_token_dispatcher_type="alltoall") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have Transformer Engine")
def test_a_precision_aware_optimizer_needs_transformer_engine_unless_it_runs_on_the_host():
    (message,) = errors(optimizer={"use_precision_aware_optimizer": True})
    assert "FusedAdam" in message and "optimizer_cpu_offload = true" in message
    both = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
    assert errors(optimizer=both) == []
