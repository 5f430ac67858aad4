"""Training stops at routes that are not those of their tokens, or goes on without them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.batch import RankPlace, Sample, build_microbatch
from moe_replay.checkpoint.tokenizer import load_tokenizer
from moe_replay.engines.types import Completion, Request, RolloutGroup, SamplingParams
from moe_replay.errors import MisalignmentError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.types import StepBatch
from moe_replay.recipe.recipe import Recipe
from moe_replay.routing import Coverage, RouteSlice
from moe_replay.testing.misrouting import (
    MisroutingEngine,
    Plant,
    of_another,
    one_layer_late,
    one_row_late,
)
from moe_replay.testing.samples import make_samples
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from ..test_loop import run

Recipes = Callable[..., Recipe]
LONG = {
    "rollout__max_completion_length": 40,
    "batch__global_batch_size": 32,
    "batch__max_tokens_per_microbatch": 400,
    "run__max_steps": 1,
    "checkpoint__export": "false",
}
"""32 samples of about 50 rows."""


def wrong(plant: Plant, chosen: Callable[[int, int], bool]) -> Callable[[Recipe, Any], Any]:
    """Return an engine that misroutes the ``chosen`` (prompt of the step, completion)."""

    def make(recipe: Recipe, device: torch.device) -> Any:
        return MisroutingEngine(
            recipe_engine(recipe, device),
            plant,
            lambda group, number: chosen(group.request.request_id, number),
        )

    return make


def one(prompt: int, number: int) -> bool:
    """Choose one sample of the 32: number 14 of the step."""
    return (prompt, number) == (3, 2)


def every(prompt: int, number: int) -> bool:
    return True


def randomised(ids: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    rng = np.random.default_rng(len(ids))
    found = rng.random((*ids.shape[:2], 16)).argsort(axis=2)[..., : ids.shape[2]]
    return found.astype(ids.dtype)


def randomised_each() -> Plant:
    """Return what gives each completion random routes of its own."""
    rng = np.random.default_rng(5)

    def plant(ids: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
        found = rng.random((*ids.shape[:2], 16)).argsort(axis=2)[..., : ids.shape[2]]
        return found.astype(ids.dtype)

    return plant


def layers_rolled(ids: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    return np.roll(ids, 1, axis=1)


def contiguous_under_zigzag(ids: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Give two context-parallel ranks the routes of a contiguous cut, and tokens cut in zigzag.

    Of four quarters rank 0 holds tokens 0 and 3 and gets the routes of 0 and 1; rank 1 holds 1 and
    2 and gets 2 and 3.
    """
    quarter = -(-len(ids) // 4)
    padded = np.concatenate([ids, ids[: 4 * quarter - len(ids)]])
    return np.concatenate([padded[quarter * n :][:quarter] for n in (0, 2, 3, 1)])[: len(ids)]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("plant", "chosen", "cause"),
    [
        (one_row_late, one, "the routes of 1 of 32 samples.*sample 14 .*token shift"),
        (one_layer_late(1), one, "the routes of 1 of 32 samples.*sample 14 .*layer 1, .*token"),
        (
            randomised,
            one,
            "the routes of 1 of 32 samples.*sample 14 .*52 of 52 rows .*fit no place",
        ),
        (
            of_another,
            one,
            "the routes of 1 of 32 samples.*sample 14 .*(routes of sample|fit no place).*rho",
        ),
        (one_row_late, every, "the routes of 32 of 32 samples.*step: .*'token"),
        (layers_rolled, every, "of 32 samples"),
        (randomised, every, "no sample's routes carry information"),
    ],
    ids=["late", "layer late", "random", "another's", "all late", "all layers", "all random"],
)
def test_e1_misaligned_routes_stop_the_run_before_anything_is_learned(
    plant: Plant, chosen: Callable[[int, int], bool], cause: str, recipe: Recipes
) -> None:
    spoiled = recipe(**LONG)
    with pytest.raises(MisalignmentError, match=f"(?s)step 1, update 1 of 1: .*{cause}"):
        run(spoiled, make_engine=wrong(plant, chosen))
    assert not list((spoiled.run.output_dir / "checkpoints").glob("*"))
    failure = json.loads((spoiled.run.output_dir / "failed.json").read_text())
    assert (failure["step"], failure["max_steps"]) == (1, 1)
    assert failure["kind"] == "MisalignmentError"
    assert re.search(f"(?s)step 1, update 1 of 1: .*{cause}", failure["message"])


@pytest.mark.ranks
def test_e1_the_message_names_sample_prompt_version_positions_and_nats(recipe: Recipes) -> None:
    with pytest.raises(
        MisalignmentError,
        match=r"sample 14 \(prompt \d+, policy version 0\), (layer \d, )?positions 0\.\.\d+: "
        r"token shift \+1.*paired (sample|layer) \d+ nats of \d+",
    ):
        run(recipe(**LONG), make_engine=wrong(one_row_late, one))


@pytest.mark.ranks
def test_e1_without_the_guard_wrong_routes_are_trained_through_and_show(recipe: Recipes) -> None:
    (record,) = run(recipe(replay__guard="false", **LONG), make_engine=wrong(one_row_late, one))
    assert record["replay/agreement_min_sample"] < 0.9 < record["replay/agreement"]
    assert record["details"]["replay/agreement_min_sample"]["sample"] == 14
    assert "replay/dropped_samples" not in record


@pytest.mark.ranks
def test_e1_dropped_samples_are_counted_marked_and_not_trained_on(
    recipe: Recipes, capfd: pytest.CaptureFixture[str]
) -> None:
    made = recipe(replay__on_misaligned="drop", **LONG)
    (record,) = run(made, make_engine=wrong(one_row_late, one))
    assert (record["replay/dropped_samples"], record["replay/lost_samples"]) == (1.0, 0.0)
    (named,) = record["details"]["replay/dropped_samples"]
    assert (named["sample"], named["completion"], named["policy_version"]) == (14, 2, 0)
    lines = (made.run.output_dir / "completions.jsonl").read_text().splitlines()
    marks = [json.loads(line)["dropped"] for line in lines]
    assert marks == [None] * 14 + ["misaligned"] + [None] * 17
    _check_kept_tokens(record, [json.loads(line) for line in lines])
    told = capfd.readouterr().out.replace("\n", " ")
    assert "1 of 32 samples have routes that are not their own and are not trained on" in told
    # Without its sample the step is a healthy one: the gap of the others alone is measured.
    assert record["rollout_correction/k3_kl"] < 0.01
    (clean,) = run(recipe(**LONG), restart=True)
    assert not (made.run.output_dir / "failed.json").exists()
    assert clean["replay/dropped_samples"] == clean["replay/suspects"] == 0.0
    assert clean["replay/guard_margin_nats"] < -3 < 0 < record["replay/guard_margin_nats"]
    assert clean["grad_norm"] != record["grad_norm"]
    # What is usual is saved with the step, so that a resumed run decides as an uninterrupted one.
    saved = made.run.output_dir / "checkpoints" / "step-000001" / "position.json"
    assert len(json.loads(saved.read_text())["guard"]["history"]) == 1


def _check_kept_tokens(record: dict[str, Any], completions: list[dict[str, Any]]) -> None:
    """Eight completions have their tokens: the dropped one, those that agree least, the first."""
    assert [one["sample"] for one in completions] == list(range(32))
    agreement = [one["agreement"] for one in completions]
    assert min(agreement) == agreement[14] == record["replay/agreement_min_sample"]
    least = set(np.argsort(agreement, kind="stable")[:4].tolist())
    first = [number for number in range(8) if number not in least][: 8 - len(least)]
    assert {one["sample"] for one in completions if one["tokens"]} == least | set(first)
    spread = record["details"]["replay/agreement"]
    assert spread["lowest"][0]["sample"] == 14
    assert spread["percentiles"]["50"] == pytest.approx(np.median(agreement), abs=1e-6)
    by_layer = record["details"]["replay/flip_frac"]
    assert by_layer["layers"] == [0, 1, 2]
    assert np.mean(by_layer["flip_frac"]) == pytest.approx(record["replay/flip_frac"], abs=1e-6)
    for one in completions:
        if tokens := one["tokens"]:
            assert {len(part) for part in tokens.values()} == {one["num_tokens"]}
            # The text leaves out the two tokens that the tokenizer calls special.
            spoken = (text for text in tokens["texts"] if text not in {"<pad>", "<eos>"})
            assert "".join(spoken) == one["completion"]
            flips = np.mean(tokens["flips"]) / 3
            assert flips > 0.5 if one["sample"] == 14 else flips < 0.3, one["sample"]
            gap = np.abs(np.subtract(tokens["old_logprobs"], tokens["rollout_logprobs"]))
            assert gap.max() > 0.01


@pytest.mark.ranks
def test_e1_more_wrong_samples_than_may_be_dropped_stop_the_run(recipe: Recipes) -> None:
    made = recipe(replay__on_misaligned="drop", replay__max_dropped_frac=0.07, **LONG)
    with pytest.raises(
        MisalignmentError,
        match=r"more than it covers: 3 of 32 samples, where replay.max_dropped_frac = 0.07 allows 2",
    ):
        run(made, make_engine=wrong(one_row_late, lambda prompt, n: n == 1 and prompt < 3))


class TwoServers(MisroutingEngine):
    """Says which of two servers sampled each prompt: all that it changes came from the second."""

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Sample, and name a server."""
        return [
            replace(
                group,
                completions=tuple(
                    replace(c, server=f"http://s{int(self._chosen(group, number))}")
                    for number, c in enumerate(group.completions)
                ),
            )
            for group in super().generate(requests, sampling)
        ]


class OtherWeights(MisroutingEngine):
    """Samples as if by other weights: neither routes nor probabilities are the trainer's."""

    def _changed(
        self, groups: Sequence[RolloutGroup], group: RolloutGroup, number: int
    ) -> Completion:
        changed = super()._changed(groups, group, number)
        return replace(changed, rollout_logprobs=changed.rollout_logprobs - np.float32(4))


@pytest.mark.ranks
@pytest.mark.parametrize("way", ["auto", "pass"])
def test_e1_a_sample_that_drift_robbed_of_its_routes_is_left_out_and_never_stops_the_run(
    way: str, recipe: Recipes, capfd: pytest.CaptureFixture[str]
) -> None:
    made = recipe(batch__old_logprobs=way, **LONG)
    (record,) = run(
        made,
        make_engine=lambda loaded, device: OtherWeights(
            recipe_engine(loaded, device),
            randomised,
            lambda group, number: one(group.request.request_id, number),
        ),
    )
    assert (record["replay/lost_samples"], record["replay/dropped_samples"]) == (1.0, 0.0)
    lines = (made.run.output_dir / "completions.jsonl").read_text().splitlines()
    assert [json.loads(line)["dropped"] for line in lines][14] == "lost"
    assert "1 of 32 samples lost their routes to drift" in capfd.readouterr().out.replace("\n", " ")


@pytest.mark.ranks
def test_e1_drift_that_robs_every_sample_of_its_routes_is_told_and_never_stops_the_run(
    recipe: Recipes, capfd: pytest.CaptureFixture[str]
) -> None:
    (record,) = run(
        recipe(**LONG),
        make_engine=lambda loaded, device: OtherWeights(
            recipe_engine(loaded, device), randomised, lambda group, number: True
        ),
    )
    assert record["replay/agreement"] < 0.7
    assert (record["replay/lost_samples"], record["replay/dropped_samples"]) == (0.0, 0.0)
    told = capfd.readouterr().out.replace("\n", " ")
    assert "engine and trainer have drifted apart" in told


class OtherWeightsOnOneServer(TwoServers, OtherWeights):
    """One server of two has other weights."""


@pytest.mark.ranks
@pytest.mark.parametrize("is_drift", [True, False])
def test_e1_drift_on_one_server_of_two_never_stops_the_run_and_wrong_routes_do(
    is_drift: bool, recipe: Recipes, capfd: pytest.CaptureFixture[str]
) -> None:
    def make(loaded: Recipe, device: torch.device) -> Any:
        kind = OtherWeightsOnOneServer if is_drift else TwoServers
        inner = recipe_engine(loaded, device)
        plant = randomised_each()
        return kind(inner, plant, lambda group, number: group.request.request_id % 4 == 1)

    if not is_drift:
        with pytest.raises(MisalignmentError, match="server http://s1: "):
            run(recipe(**LONG), make_engine=make)
        return
    (record,) = run(recipe(**LONG), make_engine=make)
    assert (record["replay/lost_samples"], record["replay/dropped_samples"]) == (8.0, 0.0)
    assert "have drifted apart" in capfd.readouterr().out.replace("\n", " ")


@pytest.mark.ranks
def test_e1_one_of_two_data_parallel_ranks_with_wrong_routes_stops_both(recipe: Recipes) -> None:
    def make(loaded: Recipe, device: torch.device) -> Any:
        engine = recipe_engine(loaded, device)
        if torch.distributed.get_rank() == 0:
            return engine
        return MisroutingEngine(engine, one_row_late, lambda group, number: True)

    with pytest.raises(MisalignmentError, match=r"(?s)the routes of 16 of 32 samples.*rank 1: "):
        run(recipe(**LONG), world_size=2, make_engine=make)


@pytest.mark.ranks
def test_e1_contiguous_routes_under_zigzag_context_parallelism_stop_the_run(
    recipe: Recipes,
) -> None:
    parallel = {"megatron__context_parallel_size": 2, **LONG}
    (clean,) = run(recipe(**parallel), world_size=2, restart=True)
    assert clean["replay/suspects"] == 0.0
    with pytest.raises(MisalignmentError, match=r"rank 1: .*its routes were cut for other rows"):
        run(
            recipe(**parallel),
            world_size=2,
            restart=True,
            make_engine=wrong(contiguous_under_zigzag, every),
        )


@pytest.mark.ranks
def test_a_suspect_is_looked_at_again_in_an_interleaved_pipeline(
    recipe: Recipes, tmp_path: Path
) -> None:
    model = write_tiny_checkpoint(tmp_path / "model", num_hidden_layers=4)
    load_tokenizer(model)
    staged = recipe(
        model__path=str(model),
        megatron__pipeline_model_parallel_size=2,
        megatron__virtual_pipeline_model_parallel_size=2,
        **LONG,
    )
    # The suspect's microbatch is run beside another, because the schedule takes even numbers only.
    with pytest.raises(MisalignmentError, match=r"(?s)of 1 of 32 samples.*sample 14 .*rho"):
        run(staged, world_size=2, make_engine=wrong(randomised, one))


with_routes = StepBatch.with_routes


def late_in_one_microbatch(batch: StepBatch, routes: Mapping[int, RouteSlice]) -> StepBatch:
    """Pack recorded routes as the trainer does, but those of microbatch 1 one row late."""
    held = dict(routes)
    held[1] = replace(held[1], expert_ids=np.roll(held[1].expert_ids, 1, axis=1))
    return with_routes(batch, held)


@pytest.mark.ranks
def test_e1_a_fault_of_our_own_packing_stops_the_update_before_the_optimizer_moves(
    recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"replay__router_replay_mode": "R2", **LONG}
    (clean,) = run(recipe(**keys), restart=True)
    assert clean["replay/agreement"] == 1.0
    assert clean["replay/suspects"] == 0.0
    monkeypatch.setattr(StepBatch, "with_routes", late_in_one_microbatch)
    with pytest.raises(MisalignmentError, match="step 1, update 1 of 1: the routes of"):
        run(recipe(**keys), restart=True)


def test_dropped_samples_stay_in_their_microbatches_and_do_not_train() -> None:
    samples: tuple[Sample, ...] = tuple(make_samples(4, seed=0))
    batch = StepBatch(
        minibatches=tuple(
            (build_microbatch(key, samples[2 * key : 2 * key + 2], place=RankPlace()),)
            for key in (0, 1)
        ),
        origins=(),
        coverage=Coverage(),
    )
    assert [sample.trains for sample in batch.without({2}).samples] == [True, True, False, True]
    assert batch.without(set()) is batch
