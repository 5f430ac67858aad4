"""`moe-replay doctor` on Megatron's own options: what replay refuses, and what is missing here."""

import json
from typing import Any

import pytest
import torch

import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports
from moe_replay.cli.main import main
from moe_replay.megatron.upstream.compat import VERSION

DISABLED = {"router_replay_mode": "disabled"}


@pytest.fixture
def examined(write_recipe, capsys):
    """Return a function that runs the command; it returns the problems and the table of options."""

    def run(transformer: dict[str, Any], **sections: Any) -> tuple[str, dict[str, str]]:
        recipe = write_recipe(megatron={"transformer": transformer}, **sections)
        code = main(["doctor", str(recipe), "--json"])
        report = json.loads(capsys.readouterr().out)
        assert (code == 0) == (not report["problems"])
        rows = report["options"] or []
        return " | ".join(report["problems"]), {row["option"]: row["state"] for row in rows}

    return run


@pytest.mark.parametrize(
    ("transformer", "option", "reason"),
    [
        ({"moe_router_fusion": True}, "moe_router_fusion", "the fused kernel picks experts"),
        (
            {"moe_router_load_balancing_type": "sinkhorn"},
            "moe_router_load_balancing_type = sinkhorn",
            "sinkhorn balancing returns before",
        ),
        (
            {"moe_router_load_balancing_type": ["sinkhorn"]},
            "moe_router_load_balancing_type = sinkhorn",
            "sinkhorn balancing returns before",
        ),
        ({"moe_expert_capacity_factor": 1.5}, "moe_expert_capacity_factor", "are dropped after"),
        (
            {"moe_router_force_load_balancing": True},
            "moe_router_force_load_balancing",
            "the scores are random",
        ),
        ({"moe_input_jitter_eps": 0.01}, "moe_input_jitter_eps", "other noise"),
        (
            {"overlap_moe_expert_parallel_comm": True},
            "overlap_moe_expert_parallel_comm",
            "only plans the layers",
        ),
        (
            {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True},
            "overlap_moe_expert_parallel_comm",
            "only plans the layers",
        ),
        (
            {
                "fp8": "e4m3",
                "recompute_granularity": "selective",
                "recompute_modules": ["moe"],
            },
            "recomputed routers in fp8 or fp4",
            "does not say of which microbatch",
        ),
    ],
)
def test_what_replay_cannot_honour_is_refused_by_name_and_only_with_replay(
    examined, transformer, option, reason
):
    said, _ = examined(transformer)
    assert f"replay cannot be exact with {option}: " in said
    assert reason in said
    without, _ = examined(transformer, replay=DISABLED)
    assert "replay cannot be exact" not in without


def test_the_table_marks_what_is_refused(examined):
    _, table = examined({"moe_expert_capacity_factor": 1.5})
    assert table["moe_expert_capacity_factor"] == "refused"
    assert table["moe_input_jitter_eps"] == "ok"
    said, table = examined({"moe_z_loss_coeff": 0.1})
    assert said == ""
    assert set(table.values()) <= {"ok", "not applicable"}


@pytest.mark.skipif(VERSION >= (0, 19), reason="the balancing came with 0.19")
def test_a_balancing_that_this_megatron_lacks_is_refused_with_replay_and_without(examined):
    asked = {"moe_router_load_balancing_type": "quantile_balancing"}
    said, _ = examined(asked)
    assert "replay cannot be exact with moe_router_load_balancing_type = quantile_balancing" in said
    said, _ = examined(asked, replay=DISABLED)
    assert "came with Megatron-Core 0.19" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have Transformer Engine")
def test_every_missing_package_is_a_problem_of_its_own(examined):
    said, _ = examined({"apply_rope_fusion": True, "moe_permute_fusion": True})
    assert said.count("is missing here") == 2
    assert "megatron.transformer.apply_rope_fusion: true needs Transformer Engine" in said


def test_a_wrong_name_is_found_before_a_start(examined):
    said, _ = examined({"moe_z_loss_coef": 0.1})
    assert "no such field (nearest: 'moe_z_loss_coeff')" in said


def test_what_megatron_refuses_is_said_by_megatron(examined):
    said, _ = examined({"overlap_p2p_comm": True, "overlap_p2p_comm_warmup_flush": True})
    assert said == ""
    said, _ = examined({"moe_shared_expert_overlap": True, "fp8": "e4m3"}, replay=DISABLED)
    assert "needs Transformer Engine" in said


def test_what_is_set_is_shown_with_what_follows_from_it(write_recipe, capsys):
    lean = {"optimizer_cpu_offload": True, "main_grads_dtype": "bfloat16"}
    megatron = {"transformer": {"moe_z_loss_coeff": 0.1}, "optimizer": lean}
    recipe = write_recipe(megatron=megatron, model={"dtype": "bfloat16"})
    main(["doctor", str(recipe), "--json"])
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["megatron.transformer"] == "moe_z_loss_coeff = 0.1"
    assert settings["megatron.optimizer"] == (
        "use_distributed_optimizer = true, optimizer_offload_fraction = 1.0, "
        "use_precision_aware_optimizer = true, optimizer_cpu_offload = true, "
        'main_grads_dtype = "bfloat16"'
    )
    assert "megatron.ddp" not in settings


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is bfloat16 on a GPU")
def test_an_optimizer_on_the_host_is_refused_for_what_auto_becomes_here(write_recipe, capsys):
    megatron = {"optimizer": {"optimizer_cpu_offload": True}}
    refusals = {}
    for dtype in ("auto", "bfloat16"):
        recipe = write_recipe(megatron=megatron, model={"dtype": dtype})
        code = main(["doctor", str(recipe), "--json"])
        problems = json.loads(capsys.readouterr().out)["problems"]
        refusals[dtype] = [text for text in problems if "optimizer_cpu_offload" in text]
        assert not problems or code == 2
    (said,) = refusals["auto"]
    assert "true with model.dtype = 'float32'" in said
    assert refusals["bfloat16"] == []


def test_narrow_gradients_without_the_optimizer_for_them_are_noted(write_recipe, capsys):
    notes = []
    for wide in (False, True):
        recipe = write_recipe(
            megatron={"ddp": {"grad_reduce_in_fp32": wide}}, model={"dtype": "bfloat16"}
        )
        main(["doctor", str(recipe), "--json"])
        notes.append(" ".join(json.loads(capsys.readouterr().out)["notes"]))
    assert "float32 copy of all gradients" in notes[0]
    assert "float32 copy of all gradients" not in notes[1]
