"""Runs over two real `moe-replay serve` processes whose rollouts overlap with training."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_replay.checkpoint.tokenizer import load_tokenizer
from moe_replay.engines.types import Request, RolloutGroup, SamplingParams
from moe_replay.errors import MisalignmentError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.recipe.recipe import Recipe
from moe_replay.testing.misrouting import MisroutingEngine, one_row_late
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from ..support.served import ServerProcess
from .test_loop import run
from .test_overlap_ends import stopped_in

pytestmark = [pytest.mark.ranks, pytest.mark.vllm, pytest.mark.slow]
Recipes = Callable[..., Recipe]
# So few at once that most of a rollout is left when the servers say that they sample.
OPTIONS = ["--dtype", "float32", "--kv-cache-gib", "0.1", "--max-batch-size", "4"]
STEPS = 4
# For what hangs.
LIMIT_S = 600.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """Return a model whose completions are long, and two servers of it."""
    model = write_tiny_checkpoint(
        tmp_path_factory.mktemp("overlap") / "model",
        num_hidden_layers=3,
        num_experts=32,
        initializer_range=0.1,
        max_position_embeddings=512,
    )
    load_tokenizer(model)
    with ServerProcess(model, *OPTIONS) as first, ServerProcess(model, *OPTIONS) as second:
        first.wait()
        second.wait()
        yield model, [first.url, second.url]


def crossing(recipe: Recipes, servers: tuple[Path, list[str]], **keys: Any) -> Recipe:
    model, urls = servers
    settings = {
        "model__path": model,
        "rollout__engine": "vllm-server",
        "rollout__urls": json.dumps(urls),
        "rollout__dtype": "float32",
        "rollout__max_staleness": 1,
        "rollout__push_in_flight": "true",
        "rollout__max_batch_size": 64,
        "rollout__max_completion_length": 240,
        "batch__global_batch_size": 32,
        "batch__max_tokens_per_microbatch": 4096,
        "run__max_steps": STEPS,
        "optimizer__lr": 1e-4,
        "checkpoint__save_steps": 100,
        "checkpoint__export": "false",
    }
    return recipe(**settings | keys)


class PushedAtWork:
    """The engine of a recipe: every push but the last meets a rollout that samples.

    A rollout begins when the trainer pushes, and the push goes on when the servers say that they
    sample: there are about a thousand steps to go.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._engine, self._num_rollouts = recipe_engine(recipe, device), 0
        self._pushing = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        self._num_rollouts += 1
        if self._num_rollouts > 1:
            assert self._pushing.wait(LIMIT_S)
            self._pushing.clear()
        return self._engine.generate(requests, sampling)

    def load_weights(self, weights: Any, *, policy_version: int) -> None:
        if policy_version < STEPS:
            self._pushing.set()
            while not self._engine.progress.num_tokens:
                threading.Event().wait(0.01)
        self._engine.load_weights(weights, policy_version=policy_version)


@pytest.mark.parametrize(("lr", "agreement"), [(1e-30, 1.0), (1e-4, 0.9)])
def test_completions_cross_pushes_and_their_routes_stay_theirs(
    lr: float, agreement: float, recipe: Recipes, servers: tuple[Path, list[str]]
) -> None:
    records = run(crossing(recipe, servers, optimizer__lr=lr), make_engine=PushedAtWork)
    assert len(records) == STEPS
    assert all(r["rollout/num_crossed"] > 0 for r in records[1:])
    for record in records:
        assert record["rollout/staleness_max"] <= 1.0
        assert record["replay/coverage"] == 1.0
        assert record["replay/dropped_samples"] == record["replay/lost_samples"] == 0.0
        assert record["replay/agreement"] >= agreement
        if lr < 1e-20:
            # The same weights are pushed again and again, so nothing but a wrong row could differ.
            assert record["rollout_correction/k3_kl"] < 1e-9
    assert {v for k, v in records[-1].items() if k.startswith("rollout/faults_")} == {0.0}


def test_control_shifted_routes_are_found_in_such_a_run(
    recipe: Recipes, servers: tuple[Path, list[str]]
) -> None:
    def make(r: Recipe, device: torch.device) -> Any:
        return MisroutingEngine(
            recipe_engine(r, device),
            one_row_late,
            lambda group, number: (group.request.request_id, number) == (19, 2),
        )

    with pytest.raises(MisalignmentError, match=r"step 3, .*1 of 32 samples do not belong"):
        run(crossing(recipe, servers), make_engine=make)


def test_a_stop_while_a_rollout_is_awaited_drops_it_and_the_run_goes_on(
    recipe: Recipes, servers: tuple[Path, list[str]]
) -> None:
    made = crossing(recipe, servers)
    assert stopped_in(made, (3, "rollout"), 1, recipe_engine) == 2
    assert not list(made.run.output_dir.glob("checkpoints/*/rollout"))
    records = run(made)
    assert len(records) == STEPS
    # Sampled again, by the weights of the checkpoint.
    assert records[2]["rollout/staleness_max"] == 0.0
