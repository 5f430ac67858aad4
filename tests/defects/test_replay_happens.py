"""Defects by which replay does not happen, or does not end."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.errors import CoverageError, RecipeError, UnsupportedError
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.model import read_model_shape, transformer_config
from moe_replay.megatron.replay import RecordScope
from moe_replay.megatron.replay.refusals import REFUSALS, Verdict, judge
from moe_replay.recipe.load import recipe_from_table
from moe_replay.routing import Coverage, LiveReason, Routing
from moe_replay.testing.layouts import coded_samples, layout
from moe_replay.testing.policies import mean_loss, pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import FAMILIES, write_tiny_checkpoint

LAYERS = (0, 1, 2, 3)
NUM_EXPERTS = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Qwen3-MoE checkpoint of 4 layers."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def _sets(**fields: Any) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        for name, value in fields.items():
            setattr(config, name, value)

    return change


REFUSED = {
    "fused kernel": (_sets(moe_router_fusion=True), "the fused kernel picks experts itself"),
    "sinkhorn": (_sets(moe_router_load_balancing_type="sinkhorn"), "sinkhorn balancing returns"),
    "sinkhorn among others": (
        _sets(moe_router_load_balancing_type=["aux_loss", "sinkhorn"]),
        "sinkhorn balancing returns",
    ),
    "quantile balancing": (
        _sets(
            moe_router_load_balancing_type="quantile_balancing",
            moe_router_quantile_balancing_ema=0.0,
        ),
        "quantile balancing computes the experts before",
    ),
    "capacity": (_sets(moe_expert_capacity_factor=1.0), "dropped after the replay"),
    "capacity of a rank": (_sets(moe_expert_rank_capacity_factor=1.0), "dropped after the replay"),
    "every expert": (_sets(moe_router_topk=NUM_EXPERTS), "no choice to replay"),
    "overlapped communication": (
        _sets(overlap_moe_expert_parallel_comm=True),
        "the forward step only plans",
    ),
    "recomputed in fp8": (
        _sets(fp8="hybrid", recompute_granularity="full"),
        "does not say of which microbatch",
    ),
    "selectively recomputed in fp8": (
        _sets(fp8="hybrid", recompute_granularity="selective", recompute_modules=["moe"]),
        "does not say of which microbatch",
    ),
    "random scores": (_sets(moe_router_force_load_balancing=True), "the scores are random"),
    "jitter": (_sets(moe_input_jitter_eps=0.01), "by other noise"),
}
GRAPHS = {
    "whole layers": _sets(cuda_graph_impl="transformer_engine", cuda_graph_scope=[]),
    "the router": _sets(
        cuda_graph_impl="transformer_engine",
        cuda_graph_scope=[SimpleNamespace(name="attn"), SimpleNamespace(name="moe_router")],
    ),
    "Megatron's own": _sets(cuda_graph_impl="local", cuda_graph_scope=[]),
    "the iteration": _sets(cuda_graph_impl="full_iteration", cuda_graph_scope=[]),
}
ACCEPTED = {
    "nothing": _sets(),
    "graphs of attention": _sets(
        cuda_graph_impl="transformer_engine", cuda_graph_scope=[SimpleNamespace(name="attn")]
    ),
    "auxiliary loss": _sets(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01),
    "fp8 without recomputation": _sets(fp8="hybrid"),
    "recomputed activations in fp8": _sets(
        fp8="hybrid", recompute_granularity="selective", recompute_modules=["core_attn"]
    ),
}


def _opened(checkpoint: Path, changes: dict[str, Callable[[Any], None]]) -> dict[str, str]:
    """Return what a scope says to each change of the configuration of a built model."""
    actor = start_policy(checkpoint)
    plain = actor.config
    said = {}
    for name, change in changes.items():
        config = replace_fields(plain, change)
        for router in actor.routers.values():
            router.config = config
        try:
            RecordScope(actor.routers, [0])
            said[name] = "opened"
        except UnsupportedError as error:
            said[name] = str(error)
    return said


def replace_fields(config: Any, change: Callable[[Any], None]) -> Any:
    """Return a copy with changed fields; Megatron would refuse some without a GPU."""
    changed = copy(config)
    change(changed)
    return changed


@pytest.mark.ranks
def test_d1_every_option_that_bypasses_the_scope_is_refused_with_its_reason(checkpoint):
    changes = {name: change for name, (change, _) in REFUSED.items()}
    (said,) = run_ranks(_opened, 1, checkpoint, changes)
    for name, (_, reason) in REFUSED.items():
        assert reason in said[name], name
        assert "or replay.router_replay_mode = 'disabled'" in said[name]


@pytest.mark.ranks
def test_d1_control_options_beside_them_are_accepted(checkpoint):
    (said,) = run_ranks(_opened, 1, checkpoint, ACCEPTED)
    assert said == dict.fromkeys(ACCEPTED, "opened")


@pytest.mark.ranks
def test_d1_control_a_sinkhorn_router_never_asks(checkpoint):
    """Why it is refused: the stock router returns another choice before it calls the hook."""

    def asked(kind: str) -> bool:
        actor = start_policy(checkpoint)
        router = actor.routers[0]
        router.routing_type = kind
        calls = []

        def get_replay_topk(scores: Any, topk: int, *groups: Any) -> Any:
            calls.append(topk)
            return groups[-1](scores, topk)

        router.router_replay = SimpleNamespace(get_replay_topk=get_replay_topk)
        router(torch.zeros(3, 1, router.config.hidden_size))
        return bool(calls)

    assert run_ranks(asked, 1, "none") == [True]
    assert run_ranks(asked, 1, "sinkhorn") == [False]


@pytest.mark.ranks
def test_d6_captured_graphs_that_hold_a_router_are_refused(checkpoint):
    (said,) = run_ranks(_opened, 1, checkpoint, GRAPHS)
    for name, message in said.items():
        assert "a captured graph repeats the routes that it was captured with" in message, name


def test_d1_every_line_of_the_table_is_tested(checkpoint):
    config = transformer_config(read_model_shape(checkpoint), layout())
    found = {
        refusal.option
        for change in [*(change for change, _ in REFUSED.values()), *GRAPHS.values()]
        for refusal, verdict in judge(replace_fields(config, change))
        if verdict is Verdict.REFUSED
    }
    assert found == {refusal.option for refusal in REFUSALS}


def test_d6_control_a_model_without_routers_has_nothing_to_refuse(checkpoint):
    config = transformer_config(read_model_shape(checkpoint), layout())
    dense = replace_fields(config, _sets(num_moe_experts=None, cuda_graph_impl="local"))
    assert {verdict for _, verdict in judge(dense)} == {Verdict.NOT_APPLICABLE}


@pytest.mark.parametrize("family", FAMILIES)
def test_d2_constant_routes_change_the_logits_of_a_hugging_face_model(family, tmp_path):
    from transformers import AutoModelForCausalLM

    from moe_replay.transformers import find_routers, replay_routes

    path = write_tiny_checkpoint(tmp_path, family, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = torch.arange(7)[None] + 10
    layers = tuple(site.layer for site in find_routers(model))
    ids = np.tile(np.array([0, 1, 2, 3]), (7, len(layers), 1))
    with torch.no_grad():
        live = model(tokens).logits
        with replay_routes(model, ids, np.ones(7, dtype=bool), layers=layers):
            replayed = model(tokens).logits
    assert (replayed - live).abs().amax(dim=-1).min() > 1e-3


def test_d2_control_a_hugging_face_model_swallows_routes_that_it_is_given(tmp_path):
    from transformers import AutoModelForCausalLM

    path = write_tiny_checkpoint(tmp_path, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = torch.arange(7)[None] + 10
    with torch.no_grad():
        live = model(tokens).logits
        swallowed = model(tokens, routed_experts=torch.zeros(7, 2, 4, dtype=torch.long)).logits
    assert torch.equal(live, swallowed)


RECIPE: dict[str, Any] = {
    "run": {"output_dir": "/runs/a", "max_steps": 10},
    "model": {"path": "/models/m"},
    "data": {"train": "/data/train.jsonl"},
    "rewards": [{"function": "exact_match"}],
    "rollout": {"max_completion_length": 64},
    "batch": {"global_batch_size": 32, "max_tokens_per_microbatch": 4096},
}


def with_keys(**sections: dict[str, Any]) -> dict[str, Any]:
    return {**RECIPE, **{name: {**RECIPE.get(name, {}), **keys} for name, keys in sections.items()}}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"megatron": {"router_replay_mode": "R3"}}, "megatron.router_replay_mode"),
        ({"rollout": {"router_replay_mode": "R3"}}, "rollout.router_replay_mode"),
        ({"replay": {"mode": "R3"}}, "replay.mode"),
        ({"replay": {"router_replay_mode": "disabled", "min_coverage": 0.9}}, "min_coverage"),
        ({"megatron": {"recompute_modules": ["moe"]}}, "recompute_modules"),
    ],
)
def test_d3_a_key_in_the_wrong_section_or_without_effect_is_an_error(sections, said):
    with pytest.raises(RecipeError, match=said):
        recipe_from_table(with_keys(**sections))


def test_d3_an_auxiliary_loss_of_a_dense_model_is_an_error(checkpoint):
    dense = replace(read_model_shape(checkpoint), num_experts=0, moe_layers=())
    with pytest.raises(UnsupportedError, match="no experts to balance"):
        transformer_config(dense, layout(), overrides={"moe_aux_loss_coeff": 0.01})
    transformer_config(dense, layout(), overrides={"moe_aux_loss_coeff": 0.0})


def test_d3_control_the_same_keys_are_accepted_where_they_belong():
    keys = with_keys(
        replay={"router_replay_mode": "R3", "min_coverage": 0.9},
        megatron={"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    )
    assert recipe_from_table(keys).replay.min_coverage == 0.9


def _logprobs(actor: MegatronActor, routing: Routing = Routing.LIVE) -> np.ndarray:
    samples = coded_samples(LAYERS)
    scored = actor.score(pack(samples, scorer=actor), temperature=1.0, routing=routing).samples
    return np.concatenate([scored[sample.sample_id].token_logprobs for sample in samples])


def _after_a_failure(checkpoint: Path) -> dict[str, Any]:
    actor = start_policy(checkpoint)
    before = _logprobs(actor)
    replayed = _logprobs(actor, Routing.REPLAY)

    def failing(*_: Any) -> torch.Tensor:
        raise KeyError("a loss that fails")

    with pytest.raises(KeyError):
        actor.update(
            pack(coded_samples(LAYERS), scorer=actor),
            failing,
            temperature=1.0,
            routing=Routing.REPLAY,
        )
    after_replay = _logprobs(actor)
    recording = actor.score(
        pack(coded_samples(LAYERS), scorer=actor), temperature=1.0, routing=Routing.RECORD
    )
    return {
        "live is not replay": bool((before != replayed).mean() > 0.9),
        "live after a failed update": bool((before == after_replay).all()),
        "recorded": len(recording.routes) > 0,
        "live after recording": bool((before == _logprobs(actor)).all()),
        "no seat is left": all(r.router_replay is None for r in actor.routers.values()),
    }


@pytest.mark.ranks
def test_d4_a_plain_forward_pass_is_live_again_after_a_failure_or_a_recording(checkpoint):
    (found,) = run_ranks(_after_a_failure, 1, checkpoint)
    assert found == dict.fromkeys(found, True)


def _stock_after_a_failure(checkpoint: Path) -> bool:
    """Megatron's own action survives what happens between setting and clearing it."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    actor = start_policy(checkpoint)
    before = _logprobs(actor)
    for router in actor.routers.values():
        router.router_replay = RouterReplay()
    stock: Any = RouterReplay
    try:
        stock.set_global_router_replay_action(RouterReplayAction.RECORD)
        raise KeyError("a failure before the action was cleared")
    except KeyError:
        pass
    after = _logprobs(actor)
    still_recording = stock.get_recorded_data()[0] is not None
    return bool((before == after).all()) and still_recording


@pytest.mark.ranks
def test_d4_control_megatrons_own_action_is_left_on_by_a_failure(checkpoint):
    assert run_ranks(_stock_after_a_failure, 1, checkpoint) == [True]


def test_d5_rows_without_routes_are_counted_and_too_many_stop_the_run():
    valid = np.ones(20, dtype=bool)
    valid[[12, 13, 19]] = False
    coverage = Coverage.of_rows(valid, prompt_length=4)
    assert coverage.num_live[LiveReason.ENGINE_GAVE_NONE] == 2
    assert coverage.fraction == 17 / 19
    with pytest.raises(CoverageError, match=r"engine_gave_none: 2.*min_coverage is 0\.95"):
        coverage.require(0.95)


def test_d5_control_the_row_of_the_last_token_alone_stops_nothing():
    valid = np.arange(20) < 19
    coverage = Coverage.of_rows(valid, prompt_length=4)
    assert coverage.num_live[LiveReason.LAST_TOKEN] == 1
    coverage.require(1.0)


def _sample_without_routes(checkpoint: Path) -> tuple[bool, str]:
    """Score a batch whose routes were all left out, and one that has none at all."""
    actor = start_policy(checkpoint)
    microbatches = pack(coded_samples(LAYERS), scorer=actor)
    bare = [replace(m, routes=None) for m in microbatches]
    with pytest.raises(UnsupportedError) as caught:
        actor.update(bare, mean_loss, temperature=1.0, routing=Routing.REPLAY)
    return all(r.router_replay is None for r in actor.routers.values()), str(caught.value)


@pytest.mark.ranks
def test_d5_a_microbatch_without_routes_is_not_trained_live(checkpoint):
    ((given_back, said),) = run_ranks(_sample_without_routes, 1, checkpoint)
    assert given_back
    assert "has no routes to replay" in said


def _reference(checkpoint: Path, frozen: bool, routing: str) -> tuple[np.ndarray, np.ndarray]:
    """Return reference log-probabilities, and the experts of the first layer's first rows."""
    from moe_replay.megatron.actor import build_scorer
    from moe_replay.megatron.layout import initialize

    if frozen:
        initialize(layout())
        scorer: Any = build_scorer(checkpoint, layout(), dtype=torch.float32)
    else:
        scorer = start_policy(checkpoint)
    ran: list[np.ndarray] = []
    scorer.routers[0].register_forward_hook(lambda _, __, out: ran.append(out[1].numpy()))
    logprobs = _logprobs(scorer, Routing[routing])
    return logprobs, ran[0]


@pytest.mark.ranks
@pytest.mark.parametrize("routing", ["LIVE", "REPLAY"])
def test_d7_the_reference_model_replays_exactly_when_it_is_told_to(routing, checkpoint):
    """The frozen scorer and the policy with the same weights: one word, one meaning."""
    ((reference, ran),) = run_ranks(_reference, 1, checkpoint, True, routing)
    ((policy, ran_by_policy),) = run_ranks(_reference, 1, checkpoint, False, routing)
    assert (ran == ran_by_policy).all()
    assert np.abs(reference - policy).max() < 1e-5


@pytest.mark.ranks
def test_d7_control_the_two_routings_of_the_reference_model_differ(checkpoint):
    ((live, _),) = run_ranks(_reference, 1, checkpoint, True, "LIVE")
    ((replayed, _),) = run_ranks(_reference, 1, checkpoint, True, "REPLAY")
    assert np.abs(live - replayed).max() > 0.1
