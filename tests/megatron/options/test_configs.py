"""Options of Megatron that are accepted: the built configuration has them, and they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.model import read_model_shape, transformer_config
from moe_replay.megatron.optimization import wrapping_config
from moe_replay.megatron.options.typed import MegatronOptions, read_options
from moe_replay.megatron.upstream.compat import transformer_engine_usable
from moe_replay.recipe.sections.training import MegatronSection
from moe_replay.testing.layouts import Case, Step, layout, replayed_step
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

LAYERS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("options")
    return {
        family: write_tiny_checkpoint(folder / family, family, num_hidden_layers=4)
        for family in ("qwen3_moe", "qwen2_moe")
    }


@pytest.mark.parametrize(
    ("fields", "sizes", "found"),
    [
        ({"moe_router_dtype": "fp64"}, {}, {}),
        ({"moe_z_loss_coeff": 0.01}, {}, {}),
        ({"moe_expert_capacity_factor": 1.5, "moe_token_drop_policy": "position"}, {}, {}),
        ({"moe_token_dispatcher_type": "flex", "moe_deepep_num_sms": 24}, {"ep": 2}, {}),
        (
            {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"},
            {"ep": 2},
            {},
        ),
        ({"moe_shared_expert_overlap": True}, {"ep": 2}, {}),
        ({"overlap_p2p_comm": True}, {"pp": 2, "vpp": 2}, {}),
        ({"attention_backend": "flash"}, {}, {"attention_backend": AttnBackend.flash}),
        ({"cp_comm_type": "a2a"}, {"cp": 2}, {}),
        ({"cpu_offloading": True, "cpu_offloading_num_layers": 1}, {}, {}),
        (
            {"fine_grained_activation_offloading": True, "offload_modules": ["expert_fc1"]},
            {},
            {},
        ),
        ({"use_te_activation_func": True, "bias_activation_fusion": False}, {}, {}),
        ({"bias_activation_fusion": True, "deterministic_mode": True}, {}, {}),
        ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, {}, {}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else str(value),
)
def test_the_built_configuration_has_what_was_asked_for(
    models: dict[str, Path], fields: dict[str, Any], sizes: dict[str, int], found: dict[str, Any]
) -> None:
    asked = {k: found.get(k, v) for k, v in fields.items()}
    config = transformer_config(
        read_model_shape(models["qwen2_moe"]), layout(**sizes), overrides=asked
    )
    assert {name: getattr(config, name) for name in asked} == asked
    plain = transformer_config(read_model_shape(models["qwen2_moe"]), layout(**sizes))
    assert {name: getattr(plain, name) for name in asked} != asked
    assert plain.moe_router_dtype == "fp32"


@pytest.mark.skipif(transformer_engine_usable(), reason="there Megatron accepts them")
@pytest.mark.parametrize(
    "fields", [{"moe_permute_fusion": True}, {"apply_rope_fusion": True}, {"fp8": "hybrid"}]
)
def test_what_megatron_itself_misses_is_said_in_its_words(
    models: dict[str, Path], fields: dict[str, Any]
) -> None:
    with pytest.raises(
        UnsupportedError, match=r"refuses this model.*(TE|transformer-engine|fused_permute)"
    ):
        transformer_config(read_model_shape(models["qwen3_moe"]), layout(), overrides=fields)


def test_buffers_are_configured_as_asked_for() -> None:
    asked = {"overlap_grad_reduce": True, "bucket_size": 9, "pad_buckets_for_high_nccl_busbw": True}
    built = wrapping_config(read_options(MegatronSection(ddp=asked)))
    assert {name: getattr(built, name) for name in asked} == asked
    assert (built.grad_reduce_in_fp32, built.use_distributed_optimizer) == (True, True)
    plain = wrapping_config(MegatronOptions())
    assert (plain.overlap_grad_reduce, plain.grad_reduce_in_fp32) == (False, True)


def _step(checkpoint: Path, sizes: dict[str, int], ranks: int, fields: dict[str, Any]) -> Step:
    case = Case(layout=layout(**sizes), ranks=ranks, overrides=fields)
    return run_ranks(replayed_step, ranks, checkpoint, case, LAYERS)[0]


def _error(step: Step, other: Step) -> float:
    return max(
        float((step.gradients[n] - g).norm() / g.norm().clamp(min=1e-12))
        for n, g in other.gradients.items()
    )


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("family", "sizes", "ranks", "fields"),
    [
        ("qwen2_moe", {"ep": 2}, 2, {"moe_shared_expert_overlap": True}),
        ("qwen3_moe", {"pp": 2, "vpp": 2}, 2, {"overlap_p2p_comm": True}),
        ("qwen3_moe", {"tp": 2}, 2, {"bias_activation_fusion": True}),
        ("qwen3_moe", {}, 1, {"moe_router_dtype": "fp64"}),
    ],
    ids=str,
)
def test_a_replayed_step_is_that_of_a_single_process_without_the_option(
    models: dict[str, Path], family: str, sizes: dict, ranks: int, fields: dict
) -> None:
    alone = _step(models[family], {}, 1, {})
    step = _step(models[family], sizes, ranks, fields)
    assert _error(step, alone) < 1e-5
    for sample_id, values in step.old_logprobs.items():
        np.testing.assert_allclose(values, alone.old_logprobs[sample_id], rtol=1e-5, atol=1e-5)


@pytest.mark.ranks
def test_the_z_loss_is_the_same_wherever_a_sequence_is_not_shared(models: dict[str, Path]) -> None:
    fields = {"moe_z_loss_coeff": 0.1}
    alone = _step(models["qwen3_moe"], {}, 1, fields)
    assert _error(alone, _step(models["qwen3_moe"], {}, 1, {})) > 1e-2
    for sizes in ({}, {"ep": 2}, {"pp": 2}):
        assert _error(_step(models["qwen3_moe"], sizes, 2, fields), alone) < 1e-5, sizes
    # Which is why a recipe cannot ask for it there.
    for sizes in ({"tp": 2}, {"cp": 2}):
        assert _error(_step(models["qwen3_moe"], sizes, 2, fields), alone) > 1e-2, sizes


def _reduced(options: dict[str, Any], checkpoint: Path) -> list[float]:
    from moe_replay.megatron.ranks.replica import Replica
    from moe_replay.routing import Routing
    from moe_replay.testing.policies import mean_loss, pack, start_policy
    from moe_replay.testing.samples import make_samples

    actor = start_policy(checkpoint, dtype=torch.bfloat16, ddp=options)
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    samples = make_samples(8, seed=63)[replica.number :: replica.num_replicas]
    microbatches = pack(samples, scorer=actor, count=2)
    formats = {b.grad_data.dtype for c in actor.chunks for b in c.buffers}
    assert formats == {
        torch.float32 if options.get("grad_reduce_in_fp32", True) else torch.bfloat16
    }
    return [
        actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.LIVE).norm
        for _ in range(2)
    ]


@pytest.mark.ranks
def test_bfloat16_gradients_are_reduced_and_nearly_the_same(models: dict[str, Path]) -> None:
    wide = run_ranks(_reduced, 2, {}, models["qwen3_moe"])[0]
    narrow = run_ranks(_reduced, 2, {"grad_reduce_in_fp32": False}, models["qwen3_moe"])[0]
    both = {"grad_reduce_in_fp32": False, "reduce_scatter_with_fp32_accumulation": True}
    summed = run_ranks(_reduced, 2, both, models["qwen3_moe"])[0]
    np.testing.assert_allclose(narrow, wide, rtol=0.02)
    np.testing.assert_allclose(summed, wide, rtol=0.02)
    assert narrow != wide
