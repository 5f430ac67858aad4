"""Runs over two real vLLM servers, one of which gives some completions wrong routes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_replay.checkpoint.tokenizer import load_tokenizer
from moe_replay.engines.types import RolloutGroup
from moe_replay.errors import MisalignmentError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.recipe.recipe import Recipe
from moe_replay.testing.misrouting import MisroutingEngine, Plant, of_another, one_row_late
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from ..support.rounds import asking_all
from ..support.served import ServerProcess
from .test_loop import run

pytestmark = [pytest.mark.ranks, pytest.mark.vllm, pytest.mark.slow]
Recipes = Callable[..., Recipe]
OPTIONS = ["--dtype", "bfloat16", "--kv-cache-gib", "0.05", "--max-batch-size", "64"]
EVERY = 33
"""One in so many answers of the lying server is wrong: 3 %."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """Return a model of the demo's shape, and two servers of it."""
    model = write_tiny_checkpoint(
        tmp_path_factory.mktemp("chaos") / "model",
        num_hidden_layers=6,
        num_experts=32,
        initializer_range=0.1,
    )
    load_tokenizer(model)
    with ServerProcess(model, *OPTIONS) as first, ServerProcess(model, *OPTIONS) as second:
        first.wait()
        second.wait()
        yield model, [first.url, second.url]


def both_asked(recipe: Recipe, device: torch.device) -> Any:
    return asking_all(recipe_engine(recipe, device))


class Lying:
    """Wraps the recipe's engine: of the answers of the server at ``url``, the first and every
    so manieth after it are misrouted. Each server answers in every step.
    """

    def __init__(self, url: str, plant: Plant) -> None:
        self.url, self.plant, self.answers = url, plant, 0

    def __call__(self, recipe: Recipe, device: torch.device) -> Any:
        return MisroutingEngine(both_asked(recipe, device), self.plant, self.chosen)

    def chosen(self, group: RolloutGroup, number: int) -> bool:
        if group.completions[number].server != self.url:
            return False
        self.answers += 1
        return self.answers % EVERY == 1


def chaotic(recipe: Recipes, model: Path, urls: list[str], **keys: Any) -> Recipe:
    return recipe(
        model__path=str(model),
        rollout__engine="vllm-server",
        rollout__urls=json.dumps(urls),
        rollout__dtype="bfloat16",
        rollout__max_completion_length=48,
        rollout__num_generations=4,
        # A server that could take the whole step would leave none of it to the other.
        rollout__max_batch_size=16,
        batch__global_batch_size=64,
        batch__max_tokens_per_microbatch=1024,
        run__max_steps=2,
        checkpoint__export="false",
        **keys,
    )


@pytest.mark.parametrize("plant", [one_row_late, of_another])
def test_e1_three_percent_wrong_answers_of_one_server_stop_the_run_and_name_it(
    plant: Plant, recipe: Recipes, servers: tuple[Path, list[str]]
) -> None:
    model, urls = servers
    with pytest.raises(MisalignmentError) as caught:
        run(chaotic(recipe, model, urls), make_engine=Lying(urls[1], plant))
    assert "step 1, update 1 of 1" in str(caught.value), str(caught.value)
    assert urls[1] in str(caught.value) and urls[0] not in str(caught.value)


def test_e1_with_drop_the_run_finishes_and_counts_the_samples_by_server(
    recipe: Recipes, servers: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    model, urls = servers
    made = chaotic(recipe, model, urls, replay__on_misaligned="drop")
    records = run(made, make_engine=Lying(urls[1], one_row_late))
    assert len(records) == 2
    dropped = [record["replay/dropped_samples"] for record in records]
    lines = (made.run.output_dir / "completions.jsonl").read_text().splitlines()
    marked = [entry for line in lines if (entry := json.loads(line))["dropped"]]
    by_liar = [json.loads(line)["server"] for line in lines].count(urls[1])
    # Every 33rd answer of the liar, from its first on.
    assert sum(dropped) == len(marked) == (by_liar + EVERY - 1) // EVERY > 0
    assert {entry["server"] for entry in marked} == {urls[1]}
    assert {entry["dropped"] for entry in marked} == {"misaligned"}
    assert urls[1] in capfd.readouterr().out


def test_e1_control_two_honest_servers_lose_nothing(
    recipe: Recipes, servers: tuple[Path, list[str]]
) -> None:
    model, urls = servers
    records = run(
        chaotic(recipe, model, urls, replay__on_misaligned="drop"), make_engine=both_asked
    )
    assert [r["replay/dropped_samples"] + r["replay/lost_samples"] for r in records] == [0.0] * 2
    names = {url.split("://")[1] for url in urls}
    assert {f"replay/agreement_server/{name}" for name in names} <= records[0].keys()
