"""Conversations of several turns, sampled by a real engine and trained under R3."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Request, RolloutGroup
from moe_replay.errors import MisalignmentError, RecipeError, RewardError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.inputs import open_inputs
from moe_replay.grpo.turns import _begin, turn_id
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.recipe import Recipe
from moe_replay.testing.misrouting import MisroutingEngine, of_another, one_row_late

from ..support.served import served
from .test_loop import run

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
ENVIRONMENT = """
class Echo:
    def reset(self, *, seed, **row):
        self.number, self.letters, self.left = seed % 1000, 0, 3
        return f" [{self.number}]"

    def step(self, text):
        self.letters += len(text)
        self.left -= 1
        return f"more {self.number}?" if self.left else None

    def get_reward(self):
        return float(self.letters % 7)
"""


@pytest.fixture
def turns(recipe: Recipes, workspace: Path, tmp_path: Path) -> Recipes:
    """Return a function that loads a recipe of conversations with three turns."""
    model = tmp_path / "model"
    model.mkdir()
    for file in (workspace / "model").iterdir():
        (model / file.name).symlink_to(file)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "echo.py").write_text(ENVIRONMENT)

    def load(**overrides: Any) -> Recipe:
        return recipe(
            **{
                "model__path": str(model),
                "environment__factory": f"{tmp_path}/echo.py:Echo",
                "environment__form": "step",
                "rollout__dtype": "float32",
                "rollout__max_completion_length": 100,
                # An untrained model seldom ends a turn; so often do some of its tokens.
                "rollout__stop_token_ids": str(list(range(4, 16))),
                "batch__global_batch_size": 32,
                "batch__max_tokens_per_microbatch": 400,
                "checkpoint__export": "false",
                "run__max_steps": 2,
                **overrides,
            }
        )

    return load


def test_turns_replay_the_routes_of_the_calls_that_fed_them_first(turns: Recipes) -> None:
    # The environment is the only reward. Truncated, so that candidates go through turns too.
    loaded = turns(rewards="[]", rollout__top_p=0.9, rollout__top_k=60, rollout__min_p=0.01)
    for record in run(loaded):
        assert record["replay/agreement"] == 1.0
        assert record["replay/coverage"] == 1.0
        assert record["rollout_correction/k3_kl"] < 1e-9
        assert record["rollout/kept_mass"] < 0.95
        assert 1 < record["rollout/candidates_mean"] < record["rollout/candidates_max"] <= 60
        assert record["num_turns/max"] == 3
        assert record["num_turns/mean"] > 2
        assert record["replay/rows_live_environment_omitted"] == 0
        assert record["reward"] == record["rewards/Echo/mean"] > 0
    lines = (loaded.run.output_dir / "completions.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert [turn["by"] for turn in first["turns"]] == ["policy", "environment"] * 2 + ["policy"]


def planting(plant: Any, chosen: Callable[[int], bool]) -> Callable[[Recipe, Any], Any]:
    """Return an engine that misroutes the turns whose request ids are ``chosen``."""

    def make(recipe: Recipe, device: Any) -> Any:
        def picks(group: RolloutGroup, number: int) -> bool:
            return chosen(group.request.request_id)

        return MisroutingEngine(recipe_engine(recipe, device), plant, picks)

    return make


@pytest.mark.parametrize("plant", [one_row_late, of_another])
def test_wrong_routes_of_one_turn_in_one_of_32_conversations_are_found(
    turns: Recipes, plant: Any
) -> None:
    # Later turns of other conversations have other ids, so `of_another` finds theirs.
    wrong = {turn_id(3, 2, turn) for turn in (1, 2)}
    with pytest.raises(MisalignmentError, match="1 of 32 samples"):
        run(turns(run__max_steps=1), make_engine=planting(plant, wrong.__contains__))


def test_ids_of_turns_meet_no_other_id() -> None:
    ids = {
        turn_id(request, number, turn)
        for request in (0, 1, 7, (1 << 40) + 3)
        for number in (0, 1, 4095)
        for turn in (1, 2, 255)
    }
    assert len(ids) == 4 * 3 * 3
    assert min(ids) >= 1 << 62 and max(ids) < 1 << 64


MIXED = """
class Levels:
    def reset(self, *, level=1, **row):
        return f" {level + 1}{sorted(row)}"
    def step(self, text): ...

def short_alone(completions, dataset): return [float(name == "short") for name in dataset]
def hard_alone(completions, dataset): return [float(name == "hard") for name in dataset]
def levels(completions, **row): return [each and float(each) for each in row["level"]]
"""


def test_prompts_to_which_reset_adds_keep_their_dataset_and_columns_and_it_has_its_defaults(
    turns: Recipes, workspace: Path, tmp_path: Path
) -> None:
    (tmp_path / "mixed.py").write_text(MIXED)
    for name, columns in (("short", {"level": 5}), ("long", {"hint": "x"}), ("hard", {"level": 7})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "q"} | columns) + "\n")
    sets = {
        name: f'{{name = "{name}", dataset = "{tmp_path / name}.jsonl"}}'
        for name in ("short", "long", "hard")
    }
    functions = [
        f'{{function = "{tmp_path}/mixed.py:short_alone", datasets = "short"}}',
        f'{{function = "{tmp_path}/mixed.py:hard_alone", datasets = "hard"}}',
        f'{{function = "{tmp_path}/mixed.py:levels"}}',
    ]
    text = (workspace / "recipe.toml").read_text().replace('train = "train.jsonl"\n', "")
    (tmp_path / "mixed.toml").write_text(text)
    keys = {
        "model.path": str(turns().model.path),
        "environment.factory": f"{tmp_path}/mixed.py:Levels",
        "environment.form": "step",
        "data.max_prompt_length": "100",
        "mixture": f"[{sets['short']}, {sets['long']}]",
        "held_out": f"[{sets['hard']}]",
        "rewards": f"[{', '.join(functions)}]",
    }
    inputs = open_inputs(load_recipe(tmp_path / "mixed.toml", list(keys.items())))
    with closing(inputs):
        assert inputs.environment is not None
        prompts = [*inputs.train.at(0, 8), *inputs.held_out["hard"].at(0, 1)]
        names = [prompt.dataset for prompt in prompts]
        assert set(names) == {"short", "long", "hard"}
        requests = [
            Request(request_id=n, prompt_ids=prompt.prompt_ids, num_generations=1)
            for n, prompt in enumerate(prompts)
        ]
        begun = [each.prompt for each in _begin(inputs.environment, 1, prompts, requests)]
        told = {
            "short": "q 6['prompt']",
            "long": "q 2['hint', 'prompt']",
            "hard": "q 8['prompt']",
        }
        assert [prompt.text for prompt in begun] == [f"u:{told[name]}\na:" for name in names]
        assert [prompt.columns for prompt in begun] == [prompt.columns for prompt in prompts]
        scored = inputs.rewards.score(begun, ["x"] * 9, [[1]] * 9).scores
        ones = {"short_alone": {"short": 1.0}, "hard_alone": {"hard": 1.0}}
        for function, of in (ones | {"levels": {"short": 5.0, "hard": 7.0}}).items():
            expected = [of.get(name, np.nan) for name in names]
            np.testing.assert_array_equal(scored[function], expected)
        # Nor does a batch of one dataset alone lack the columns of another.
        long = [prompt for prompt in begun if prompt.dataset == "long"]
        alone = inputs.rewards.score(long, ["x"] * len(long), [[1]] * len(long))
        assert np.isnan(alone.scores["levels"]).all()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("vllm_imported")
@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor:FutureWarning")  # vLLM's own call
def test_ranks_that_share_a_vllm_take_their_turns_together(turns: Recipes) -> None:
    made = turns(
        rollout__engine="vllm", rollout__kv_cache_gib=0.05, rollout__tensor_parallel_size=2
    )
    for record in run(made, world_size=2):
        assert record["replay/agreement"] == 1.0
        assert record["replay/coverage"] == 1.0
        assert record["rollout_correction/k3_kl"] < 1e-9
        assert record["num_turns/max"] == 3


def test_turns_over_servers_are_those_of_the_same_engine_here(
    turns: Recipes, tmp_path: Path
) -> None:
    keys = {"run__max_steps": 2, "batch__global_batch_size": 16}
    here = run(turns(run__output_dir=tmp_path / "here", **keys))
    model = turns().model.path
    with ExitStack() as opened:
        urls = [
            opened.enter_context(served(EmbeddedEngine(model, dtype="float32"))) for _ in range(2)
        ]
        there = {
            "run__output_dir": tmp_path / "there",
            "rollout__engine": "vllm-server",
            "rollout__urls": str(urls).replace("'", '"'),
        }
        loaded = turns(**keys, **there)
        over = run(loaded)
    for mine, theirs in zip(here, over, strict=True):
        assert theirs["replay/agreement"] == theirs["replay/coverage"] == 1.0
        assert theirs["rollout_correction/k3_kl"] < 1e-9
        for name in ("num_turns/mean", "reward", "completions/environment_tokens", "grad_norm"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4), name
    kept = (loaded.run.output_dir / "completions.jsonl").read_text().splitlines()
    # Turns of one conversation go to whichever server is free.
    addresses = {each for line in kept for each in json.loads(line)["server"].split(" and ")}
    assert addresses <= set(urls) and addresses


def test_a_prompt_that_reset_makes_too_long_is_dropped_cut_or_stops_as_data_says(
    turns: Recipes, tmp_path: Path
) -> None:
    # Some groups get 40 characters more than the others, and their prompts 70 tokens.
    longer = ENVIRONMENT.replace(
        'f" [{self.number}]"', 'f" [{self.number}]" + "x" * (40 if seed % 2 else 0)'
    )
    (tmp_path / "echo.py").write_text(longer)
    keys = {"data__max_prompt_length": 48, "run__max_steps": 1, "data__truncation": "delete"}
    loaded = turns(**keys)
    (record,) = run(loaded)
    lines = (loaded.run.output_dir / "completions.jsonl").read_text().splitlines()
    said = [json.loads(line) for line in lines]
    unbegun = [line for line in said if not line["turns"]]
    assert 0 < len(unbegun) < len(said) == 32 and len(unbegun) % 4 == 0
    assert record["environment/dropped_ratio"] == len(unbegun) / 32
    assert record["num_turns/min"] >= 1 and record["replay/agreement"] == 1.0
    for line in said:
        assert (line["reward"] is None) == (line in unbegun)
        if line in unbegun:
            assert (line["num_tokens"], line["finish_reason"]) == (0, "aborted")
            assert line["advantage"] == 0 and "[" not in line["prompt"]
    with pytest.raises(RecipeError, match=r"after reset: the prompt has .* tokens"):
        run(turns(**keys | {"data__truncation": "error", "run__output_dir": tmp_path / "b"}))


def test_reset_that_depends_on_more_than_the_seed_is_refused(
    turns: Recipes, tmp_path: Path
) -> None:
    count = "import itertools\ncounter = itertools.count()\n"
    changed = ENVIRONMENT.replace("seed % 1000", "next(counter)")
    (tmp_path / "echo.py").write_text(count + changed)
    with pytest.raises(RewardError, match="reset gave the conversations of one prompt"):
        run(turns(run__max_steps=1))
