"""`moe-replay doctor` for a user: its report on recipes that can run, and that cannot."""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports
from moe_replay.cli.doctor_tables import ranges, size
from moe_replay.cli.main import main
from moe_replay.grpo.start import preflight

from .conftest import CONFIG

Report = dict[str, Any]


@pytest.fixture
def examined(write_recipe, capsys) -> Callable[..., tuple[int, Report]]:
    """Return a function that runs the command on a recipe; it returns exit code and JSON."""

    def run(*arguments: str, **sections: Any) -> tuple[int, Report]:
        code = main(["doctor", str(write_recipe(**sections)), "--json", *arguments])
        return code, json.loads(capsys.readouterr().out)

    return run


def refusal(examined: Callable[..., tuple[int, Report]], *arguments: str, **sections: Any) -> str:
    code, report = examined(*arguments, **sections)
    assert code == 2
    assert report["can_run"] is False
    return " | ".join(report["problems"])


def test_a_recipe_that_can_run_exits_with_0(examined):
    code, report = examined()
    assert (code, report["can_run"], report["problems"]) == (0, True, [])


def test_tables_say_the_same_to_people(write_recipe, capsys):
    assert main(["doctor", str(write_recipe())]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "top-2 of 8" in shown
    assert "old log-probabilities the update's own pass update replay of the engine's" in shown
    assert "this recipe can run here" in shown


def test_tables_of_a_recipe_that_cannot_run_end_with_the_reasons(write_recipe, capsys):
    recipe = str(write_recipe())
    assert main(["doctor", recipe, "--megatron.pipeline_model_parallel_size", "3"]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "this recipe cannot run here - qwen3_moe: 2 layers cannot be dealt evenly" in shown


def test_the_model_is_read_from_its_config_alone(examined):
    config = {**CONFIG, "num_hidden_layers": 4, "mlp_only_layers": [0]}
    _, report = examined(config=config)
    model = report["model"]
    assert model["moe_layers"] == [1, 2, 3]
    assert model["dense_layers"] == [0]
    assert (model["num_experts"], model["topk"], model["num_mtp_layers"]) == (8, 2, 0)


def test_bytes_of_routes_are_those_of_the_fullest_rank(examined):
    """By hand: 2 layers x top-2 x 1 byte a token, and a flag a row; 128 rows, or 8 x (16 + 8)."""
    _, report = examined()
    assert report["routes"] == {
        "bytes_per_token": 4,
        "id_bytes": 1,
        "max_bytes_per_rank_and_microbatch": 128 * 5,
        "max_bytes_per_rank_and_step": 8 * 24 * 5,
    }


def test_bytes_of_routes_shrink_with_every_axis_that_cuts_them(examined):
    """By hand: 512 experts need 2 bytes; a stage has one of two layers; TP halves the rows."""
    config = {**CONFIG, "num_experts": 512}
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    _, report = examined(config=config, megatron=layout)
    assert report["routes"] == {
        "bytes_per_token": 8,
        "id_bytes": 2,
        "max_bytes_per_rank_and_microbatch": 64 * (1 * 2 * 2 + 1),
        "max_bytes_per_rank_and_step": 8 * 12 * 5,
    }
    assert report["layout"]["multiple_of"] == 4


def test_stages_are_told_before_any_process_is_started(examined):
    config = {**CONFIG, "num_hidden_layers": 4, "mlp_only_layers": [0]}
    layout = {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 3}
    _, report = examined(config=config, megatron=layout)
    assert report["layout"]["stages"] == [
        {"layers": [0, 1, 2], "moe_layers": [1, 2]},
        {"layers": [3], "moe_layers": [3]},
    ]


def passes(examined: Callable[..., tuple[int, Report]], **sections: Any) -> dict[str, str]:
    _, report = examined(**sections)
    return {row["pass"]: row["routes"] for row in report["passes"]}


def test_passes_of_r3_replay_the_engines_routes(examined):
    assert passes(examined) == {
        "rollout": "live, recorded",
        "old log-probabilities": "the update's own pass",
        "update": "replay of the engine's",
    }
    found = passes(examined, batch={"steps_per_generation": 2})
    assert found["old log-probabilities"] == "replay of the engine's"


def test_passes_of_r2_replay_those_of_the_old_log_probabilities(examined):
    found = passes(
        examined,
        replay={"router_replay_mode": "R2"},
        grpo={"beta": 0.1},
        megatron={"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    )
    assert found == {
        "rollout": "live",
        "old log-probabilities": "live, recorded",
        "update": "replay of the old log-probabilities'",
        "recomputation": "the routes of its own forward pass",
        "reference": "replay of the policy's",
    }


def test_passes_without_replay_are_live_and_so_is_every_row(examined):
    mode = {"router_replay_mode": "disabled"}
    found = passes(examined, replay=mode, grpo={"beta": 0.1})
    assert set(found.values()) == {"live", "the update's own pass"}
    assert set(passes(examined, replay=mode, batch={"old_logprobs": "pass"}).values()) == {"live"}
    assert examined(replay=mode)[1]["live_rows"] == []


def test_the_reference_is_live_where_the_recipe_says_so(examined):
    found = passes(examined, grpo={"beta": 0.1}, replay={"reference_routes": "live"})
    assert found["reference"] == "live"


def test_recipe_keys_can_be_overridden(examined):
    _, report = examined("--replay.router_replay_mode", "R2")
    assert report["settings"]["mode"] == "R2"
    assert [row["reason"] for row in report["live_rows"]] == ["padding"]


def test_a_model_whose_every_expert_runs_is_refused(examined):
    config = {**CONFIG, "num_experts_per_tok": 8}
    said = refusal(examined, config=config)
    assert "moe_router_topk = num_moe_experts: every expert runs for every token" in said


def test_the_table_tells_each_option_apart(examined):
    _, report = examined(config={**CONFIG, "num_experts_per_tok": 8})
    states = {row["option"]: row["state"] for row in report["options"]}
    assert states.pop("moe_router_topk = num_moe_experts") == "refused"
    assert states["moe_router_fusion"] == "ok"
    assert set(states.values()) <= {"ok", "not applicable"}


def test_what_is_refused_with_replay_is_accepted_without(examined):
    config = {**CONFIG, "num_experts_per_tok": 8}
    code, report = examined(config=config, replay={"router_replay_mode": "disabled"})
    assert (code, report["problems"]) == (0, [])


def test_a_dense_checkpoint_is_refused_with_replay_alone(examined):
    config = {**CONFIG, "mlp_only_layers": [0, 1]}
    assert "is dense, so there is nothing to replay" in refusal(examined, config=config)
    code, _ = examined(config=config, replay={"router_replay_mode": "disabled"})
    assert code == 0


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"pipeline_model_parallel_size": 3}, "2 layers cannot be dealt evenly over 3"),
        ({"tensor_model_parallel_size": 8}, "num_attention_heads = 4 cannot be split over tensor"),
        ({"expert_model_parallel_size": 3}, "num_experts = 8 cannot be split over expert"),
        (
            {"pipeline_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"},
            "this dispatcher refuses batches of varying length",
        ),
    ],
)
def test_a_layout_that_the_model_cannot_have_is_refused(layout, said, examined):
    assert said in refusal(examined, megatron=layout)


def test_a_batch_that_the_replicas_cannot_share_is_refused(examined):
    """Four expert-parallel ranks are four replicas, and an update has two prompts."""
    said = refusal(examined, megatron={"expert_model_parallel_size": 4})
    assert "2 prompts per update" in said
    assert "cannot be shared evenly by 4 data-parallel ranks" in said


def test_processes_that_hold_no_whole_number_of_models_are_refused(examined):
    os.environ |= {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    said = refusal(examined, megatron={"tensor_model_parallel_size": 2})
    assert "3 processes were started, [megatron] needs a multiple of 2" in said


def test_processes_that_hold_one_are_counted(examined):
    os.environ |= {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    code, report = examined(megatron={"tensor_model_parallel_size": 2})
    assert code == 0
    assert (report["layout"]["num_ranks"], report["layout"]["num_replicas"]) == (4, 2)


def test_a_release_outside_the_supported_range_is_refused(examined, monkeypatch):
    installed = preflight.installed
    monkeypatch.setattr(
        preflight,
        "installed",
        lambda name: "0.15.3" if name == "megatron-core" else installed(name),
    )
    assert "megatron-core 0.15.3, expected <0.20,>=0.16" in refusal(examined)


def test_an_engine_that_is_not_installed_is_refused(examined, monkeypatch):
    installed = preflight.installed
    monkeypatch.setattr(
        preflight, "installed", lambda name: None if name == "vllm" else installed(name)
    )
    assert "vllm is missing, expected" in refusal(examined, rollout={"engine": "vllm"})


def test_a_missing_optional_part_refuses_nothing(examined, monkeypatch):
    installed = preflight.installed
    monkeypatch.setattr(
        preflight,
        "installed",
        lambda name: None if name == "transformer-engine" else installed(name),
    )
    code, report = examined()
    (row,) = [row for row in report["versions"] if row["name"] == "transformer-engine"]
    assert (code, row["found"], row["is_ok"]) == (0, None, True)


def test_an_architecture_without_weight_table_is_refused_and_the_rest_is_still_told(examined):
    config = {**CONFIG, "model_type": "phimoe", "num_local_experts": 8}
    code, report = examined(config=config)
    assert code == 2
    assert "phimoe models cannot be trained: its router masks experts" in report["problems"][0]
    assert report["model"] is None
    assert report["settings"]["mode"] == "R3"


def test_a_recipe_that_is_wrong_in_itself_is_refused_like_by_train(write_recipe, capsys):
    recipe = str(write_recipe(replay={"mode": "R3"}))
    assert main(["doctor", recipe]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "replay.mode" in captured.err


def test_layers_are_written_as_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == "none"


def test_sizes_are_written_in_the_largest_unit():
    assert [size(n) for n in (640, 1024, 1_581_056)] == ["640 bytes", "1 KiB", "1.508 MiB"]
