"""Rules between keys: contradictions, keys without effect and untested layouts are refused."""

import inspect
import re

import pytest

from moe_replay.errors import RecipeError, UnsupportedError
from moe_replay.recipe.keys import FIELDS
from moe_replay.recipe.load import recipe_from_table
from moe_replay.recipe.rules import running, scoring
from moe_replay.recipe.sections.base import sections_for
from moe_replay.recipe.sections.rollout import (
    EmbeddedEngineSection,
    RolloutSection,
    VllmEngineSection,
)
from moe_replay.recipe.sections.run import EvalSection

from ..grpo.smallest_recipe import problems_of, recipe, table


@pytest.mark.parametrize(
    ("sections", "path", "reason"),
    [
        (
            {"replay": {"router_replay_mode": "disabled", "min_coverage": 0.5}},
            "replay.min_coverage",
            "replay.router_replay_mode is 'disabled'",
        ),
        (
            {"replay": {"guard": False, "on_misaligned": "drop"}},
            "replay.on_misaligned",
            "replay.guard is false",
        ),
        (
            {"replay": {"router_replay_mode": "R2", "on_misaligned": "drop"}},
            "replay.on_misaligned",
            "a fault of the trainer, which always stops",
        ),
        (
            {"replay": {"max_dropped_frac": 0.1}},
            "replay.max_dropped_frac",
            "replay.on_misaligned is 'stop'",
        ),
        ({"replay": {"reference_routes": "live"}}, "replay.reference_routes", "grpo.beta is 0"),
        ({"optimizer": {"min_lr": 1e-8}}, "optimizer.min_lr", "lr_scheduler is 'constant'"),
        ({"data": {"task": {"max_terms": 3}}}, "data.task", "no dataset is generated"),
        ({"data": {"train_seed": 3}}, "data.train_seed", "data.train is a file"),
        ({"data": {"eval_seed": 3}}, "data.eval_seed", "data.eval is not set"),
        ({"data": {"eval_size": 3}}, "data.eval_size", "data.eval is not set"),
        ({"eval": {"every_steps": 3}}, "eval.every_steps", "nothing is evaluated"),
        (
            {"data": {"train": "reasoning_gym:chain_sum", "prompt_column": "q"}},
            "data.prompt_column",
            "every dataset is generated",
        ),
        (
            {"data": {"train": "reasoning_gym:chain_sum", "shuffle": True}},
            "data.shuffle",
            "random order already",
        ),
        (
            {"megatron": {"recompute_method": "uniform"}},
            "megatron.recompute_method",
            "recompute_granularity is not set, not 'full'",
        ),
        (
            {"megatron": {"recompute_granularity": "selective", "recompute_num_layers": 1}},
            "megatron.recompute_num_layers",
            "is 'selective', not 'full'",
        ),
        (
            {
                "rollout": {
                    "engine": "vllm-server",
                    "urls": ["http://127.0.0.1:8000"],
                    "ca_file": "ca.pem",
                }
            },
            "rollout.ca_file",
            "no address in rollout.urls begins with https://",
        ),
        (
            {"batch": {"max_tokens_per_scoring_microbatch": 2000}},
            "batch.max_tokens_per_scoring_microbatch",
            "the update's own pass gives the old log-probabilities",
        ),
        (
            {
                "rollout": {"engine": "files", "path": "/r"},
                "megatron": {"offload_during_rollout": "gradients"},
            },
            "megatron.offload_during_rollout",
            "rollout.engine = 'files' holds no model",
        ),
    ],
)
def test_key_without_effect_is_refused_with_the_reason(sections, path, reason):
    message = problems_of(**sections)
    assert f"{path}: set to " in message
    assert reason in message
    assert "has 1 problem:" in message


def test_d10_masked_credentials_must_be_written_in_again():
    for url in ("http://***@a:8000", "http://a:8000?key=***"):
        message = problems_of(rollout={"engine": "vllm-server", "urls": [url]})
        assert "rollout.urls" in message and "write it in again" in message


def test_d10_a_recipe_shows_no_credentials_of_its_servers():
    secret = recipe(
        rollout={"engine": "vllm-server", "urls": ["http://me:pa55@a:8000"], "dtype": "float32"}
    )
    assert secret.rollout.urls == ("http://me:pa55@a:8000",)
    assert "pa55" not in secret.resolved_toml()
    assert "http://***@a:8000" in secret.resolved_toml()
    twice = ["http://me:pa55@a", "http://me:pa55@a"]
    assert "pa55" not in problems_of(rollout={"engine": "vllm-server", "urls": twice})


@pytest.mark.parametrize(
    ("engine", "start"),
    [("vllm-server", "moe-replay serve"), ("sglang-server", "sglang.launch_server")],
)
@pytest.mark.parametrize("urls", [[], ["http://a", "http://a"]])
def test_servers_must_be_named_once(engine, start, urls):
    message = problems_of(rollout={"engine": engine, "urls": urls})
    assert "rollout.urls" in message and start in message


def test_certificates_are_accepted_as_soon_as_one_server_has_tls():
    mixed = ["http://127.0.0.1:8000", "HTTPS://127.0.0.1:8001"]
    loaded = recipe(rollout={"engine": "sglang-server", "urls": mixed, "ca_file": "ca.pem"})
    assert loaded.rollout.ca_file is not None and loaded.rollout.ca_file.name == "ca.pem"


def test_a_rule_runs_where_the_sections_that_it_names_are_there_and_of_its_classes():
    asked = []

    def over_vllm(rollout: VllmEngineSection, eval: EvalSection) -> None:
        asked.append(rollout.engine)

    def run(rollout: RolloutSection, **more: object) -> None:
        needed = sections_for(over_vllm, {"rollout": rollout, **more})
        if needed is not None:
            over_vllm(**needed)

    vllm = VllmEngineSection(engine="vllm", max_completion_length=1)
    run(EmbeddedEngineSection(max_completion_length=1), eval=EvalSection())
    run(vllm)
    assert asked == []
    run(vllm, eval=EvalSection())
    assert asked == ["vllm"]


def test_rules_name_keys_that_exist():
    """A key that is renamed in its section alone would switch off the rule about it."""
    source = inspect.getsource(running) + inspect.getsource(scoring)
    named = set(re.findall(r'"((?:' + "|".join(FIELDS) + r')\.[a-z_]+)"', source))
    unknown = {path for path in named if path.split(".")[1] not in FIELDS[path.split(".")[0]]}
    assert unknown == set()
    assert {"batch.micro_batch_size", "rollout.ca_file", "data.eval_seed"} <= named


def test_key_without_effect_is_refused_even_at_its_default():
    assert "optimizer.min_lr" in problems_of(optimizer={"min_lr": 0.0})


def test_same_keys_are_accepted_where_they_have_an_effect():
    loaded = recipe(
        replay={"reference_routes": "live", "on_misaligned": "drop", "min_coverage": 0.5},
        grpo={"beta": 0.1},
        optimizer={"lr_scheduler": "cosine", "min_lr": 1e-8},
        data={"eval": "reasoning_gym:chain_sum", "task": {"max_terms": 3}, "eval_size": 5},
        eval={"every_steps": 3},
        rollout={"engine": "vllm", "kv_cache_gib": 2.0},
    )
    assert loaded.replay.reference_routes == "live"


@pytest.mark.parametrize(
    ("sections", "path", "reason"),
    [
        (
            {"batch": {"global_batch_size": 33}},
            "batch.global_batch_size",
            "33 samples per update is not a multiple",
        ),
        ({"batch": {"micro_batch_size": 4}}, "batch.max_tokens_per_microbatch", "both of"),
        (
            {"batch": {"max_tokens_per_microbatch": 575}},
            "batch.max_tokens_per_microbatch",
            "= 576 tokens",
        ),
        (
            {"batch": {"max_tokens_per_scoring_microbatch": 575}, "grpo": {"beta": 0.1}},
            "batch.max_tokens_per_scoring_microbatch",
            "= 576 tokens",
        ),
        (
            {"optimizer": {"lr_scheduler": "linear", "min_lr": 1.0}},
            "optimizer.min_lr",
            "is above lr",
        ),
        ({"optimizer": {"warmup_steps": 10}}, "optimizer.warmup_steps", "never be reached"),
        (
            {"megatron": {"recompute_granularity": "full", "recompute_method": "uniform"}},
            "megatron.recompute_num_layers",
            "missing",
        ),
        (
            {"rewards": [{"function": "a.py:f"}, {"function": "b.py:f"}]},
            "rewards.1.name",
            "also the name of rewards.0",
        ),
        (
            {"data": {"eval": "/e.jsonl"}, "eval": {"num_generations": 2}},
            "eval.num_generations",
            "all equal",
        ),
        (
            {"rollout": {"engine": "vllm", "kv_cache_gib": 1, "gpu_memory_utilization": 0.5}},
            "rollout.gpu_memory_utilization",
            "give one of the two",
        ),
        *(
            (
                {"rollout": {"engine": "sglang-server", "urls": ["http://a"], **limit}},
                f"rollout.{next(iter(limit))}",
                "whose servers do not say which ids each token was drawn from",
            )
            for limit in ({"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05})
        ),
        (
            {
                "rollout": {"engine": "vllm-server", "urls": ["http://a"], "max_staleness": 1},
                "megatron": {"offload_during_rollout": "gradients"},
            },
            "megatron.offload_during_rollout",
            "needs all of its memory",
        ),
    ],
)
def test_contradiction_between_keys_is_refused(sections, path, reason):
    message = problems_of(**sections)
    assert f"\n  {path}: " in message
    assert reason in message


def test_batch_needs_a_budget_or_a_size():
    broken = table()
    del broken["batch"]["max_tokens_per_microbatch"]
    with pytest.raises(
        RecipeError, match=r"neither of max_tokens_per_microbatch and micro_batch_size"
    ):
        recipe_from_table(broken)


def test_micro_batch_size_must_divide_the_batch():
    broken = table(batch={"micro_batch_size": 5})
    del broken["batch"]["max_tokens_per_microbatch"]
    with pytest.raises(RecipeError, match=r"5 does not divide global_batch_size = 32"):
        recipe_from_table(broken)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("virtual_pipeline_model_parallel_size", 2),
        ("num_layers_in_first_pipeline_stage", 3),
        ("num_layers_in_last_pipeline_stage", 3),
        ("pipeline_model_parallel_layout", "Et|tL"),
    ],
)
def test_what_deals_layers_needs_several_stages(key, value):
    with pytest.raises(
        RecipeError, match=rf"megatron.{key}: got {value!r}.*there is one stage".replace("|", r"\|")
    ):
        recipe(megatron={key: value})
    recipe(megatron={key: value, "pipeline_model_parallel_size": 2})


def test_layers_are_dealt_in_one_way():
    with pytest.raises(RecipeError, match="both say how layers are dealt"):
        recipe(
            megatron={
                "pipeline_model_parallel_size": 2,
                "pipeline_model_parallel_layout": "Et|tL",
                "num_layers_in_first_pipeline_stage": 1,
            }
        )


def test_grouped_experts_must_be_whole():
    split = {"tensor_model_parallel_size": 2}
    with pytest.raises(UnsupportedError, match="each expert is cut over 2 ranks"):
        recipe(model={"grouped_experts": True}, megatron=split)
    recipe(model={"grouped_experts": True}, megatron={**split, "expert_tensor_parallel_size": 1})


@pytest.mark.parametrize(("chunks", "count", "expected"), [(None, 3, 3), (2, 3, 4), (2, 4, 4)])
def test_interleaving_takes_a_multiple_of_the_stages(chunks, count, expected):
    layout = {"pipeline_model_parallel_size": 2}
    if chunks:
        layout["virtual_pipeline_model_parallel_size"] = chunks
    assert recipe(megatron=layout).megatron.round_up_microbatches(count) == expected


def test_unsupported_and_wrong_together_are_wrong():
    with pytest.raises(RecipeError) as caught:
        recipe(
            model={"grouped_experts": True},
            megatron={"tensor_model_parallel_size": 2},
            grpo={"epsilonn": 1},
        )
    assert not isinstance(caught.value, UnsupportedError)


def test_weights_are_pushed_in_flight_only_where_something_is():
    server = {"engine": "vllm-server", "urls": ["http://a"], "push_in_flight": True}
    assert "nothing is sampled while weights are pushed" in problems_of(rollout=server)
    other = server | {"engine": "sglang-server", "max_staleness": 1}
    assert "which weights sampled which token" in problems_of(rollout=other)
    assert recipe(rollout=server | {"max_staleness": 1}).rollout.push_in_flight


ENVIRONMENT = {"factory": "/e/play.py:Game", "form": "step"}


def test_turns_are_refused_where_they_cannot_be_sampled():
    files = {"engine": "files", "path": "/r"}
    assert "later turns depend on what the environment answers" in problems_of(
        environment=ENVIRONMENT, rollout=files
    )
    beside = {"engine": "vllm-server", "urls": ["http://127.0.0.1:1"], "max_staleness": 1}
    assert "a conversation takes several" in problems_of(environment=ENVIRONMENT, rollout=beside)
    # The control: without an environment both are fine.
    recipe(rollout=files)
    recipe(rollout=beside)


def test_an_environment_may_be_the_only_reward_and_has_a_name_of_its_own():
    assert recipe(environment=ENVIRONMENT, rewards=[]).environment.name == "Game"
    assert "expected at least one [[rewards]] table" in problems_of(rewards=[])
    twice = [{"function": "exact_match", "name": "Game"}]
    assert "also the class of environment.factory" in problems_of(
        environment=ENVIRONMENT, rewards=twice
    )
    unread = {**ENVIRONMENT, "tool_parser": "hermes"}
    assert "environment.form is 'step', without tools" in problems_of(environment=unread)
