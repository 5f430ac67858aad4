"""The Python blocks of pages that have one or two of them run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_replay.errors import TokenMismatchError
from moe_replay.tasks.environments.loading import load_environment

from .pages import ROOT
from .test_library import blocks, run

MEGATRON = "a model of Megatron-Core"


def text_of(page: str) -> str:
    folder = ROOT if page == "README.md" else ROOT / "docs"
    return (folder / page).read_text()


def readme_names(rows: int) -> dict[str, Any]:
    """Return what the README's second block takes as given: an engine's routes of a sample."""
    from moe_replay.routing import Origin

    rng = np.random.default_rng(5)
    ids = rng.random((rows, 4, 128)).argsort(axis=2)[..., :8].astype(np.uint8)
    tokens = np.arange(20, 20 + rows, dtype=np.int32)
    return {
        "expert_ids": ids,
        "token_ids": tokens,
        "valid": np.arange(rows) < rows - 1,
        "moe_layers": [1, 2, 3, 5],
        "origin": Origin.single(engine="made", engine_version="0", policy_version=0, num_rows=rows),
        "sample_token_ids": tokens.copy(),
    }


def test_readme_records_a_trace_and_a_reward_scores():
    names = run(text_of("README.md"), None, readme_names(9))
    assert names["accuracy"]([" 12", "13"], answer=["12", "12"]) == [1.0, 0.0]
    assert tuple(names["trace"].layers) == (1, 2, 3, 5)
    given = readme_names(9)
    np.testing.assert_array_equal(names["trace"].expert_ids[:8], given["expert_ids"][:8])


def test_readme_refuses_a_sample_whose_last_token_differs():
    given = readme_names(9)
    given["sample_token_ids"][-1] += 1
    with pytest.raises(TokenMismatchError, match="sample 7"):
        run(text_of("README.md"), None, given)


def readme_on_megatron(checkpoint: Path) -> tuple[bool, bool]:
    """Return whether replay changed the logits, and whether they are finite."""
    import torch

    from moe_replay.megatron.scorer import packed_rows
    from moe_replay.routing import RowIndex
    from moe_replay.testing.policies import start_policy
    from moe_replay.testing.synthetic_routes import synthetic_trace

    chunk = start_policy(checkpoint).chunks[0]
    tokens = np.arange(5, 17)

    def forward(_: object = None) -> torch.Tensor:
        batch, at = torch.from_numpy(tokens)[None], torch.arange(len(tokens))[None]
        return chunk(batch, at, None, packed_seq_params=packed_rows([len(tokens)]))

    names = {
        "chunks": [chunk],
        "chunk": forward,
        "traces": [synthetic_trace(tokens, seed=1, num_layers=4)],
        "index": RowIndex.packed([len(tokens)]),
    }
    with torch.no_grad():
        live = forward()
        replayed = run(text_of("README.md"), MEGATRON, names)["output"]
    return bool((live - replayed).abs().max() > 1e-3), bool(replayed.isfinite().all())


@pytest.mark.ranks
def test_readme_replays_on_megatron(tmp_path):
    import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports
    from moe_replay.testing.ranks import run_ranks
    from moe_replay.testing.tiny_models import write_tiny_checkpoint

    assert run_ranks(readme_on_megatron, 1, write_tiny_checkpoint(tmp_path))[0] == (True, True)


def test_reward_of_the_first_run_scores():
    names = run(text_of("first-run.md"), None, {})
    assert names["accuracy"]([" 12", "13"], answer=["12", "12"]) == [1.0, 0.0]


def test_rewards_score():
    accuracy = run(text_of("rewards.md"), None, {})["accuracy"]
    columns = {"answer": ["12", "12"], "tolerance": 0.1, "prompts": [], "completion_ids": []}
    assert accuracy([" 12", "13"], **columns) == [1.0, 0.0]


def test_reward_of_the_migration_page_calls_the_other_one_a_sample_at_a_time():
    def compute_score(source: str, text: str, truth: str) -> float:
        return float(source == "gsm8k" and text == truth)

    score = run(text_of("migration.md"), None, {"compute_score": compute_score})["score"]
    given = {"data_source": ["gsm8k", "gsm8k", "other"], "ground_truth": ["1", "2", "3"]}
    assert score(["1", "0", "3"], **given) == [1.0, 0.0, 0.0]


def test_class_of_the_environments_page_is_an_environment(tmp_path):
    ((_, code),) = blocks(text_of("environments.md"), None)
    (tmp_path / "calculator.py").write_text(code)
    offer = load_environment(f"{tmp_path}/calculator.py:Calculator", (), "tools", {})
    (tool,) = offer.description.tools
    assert tool["function"]["name"] == "multiply"
    assert offer.description.has_reward
    assert offer.description.required == ["answer"]


def test_rule_of_the_megatron_page_is_one_of_a_family():
    from moe_replay.megatron.families import rules

    ((_, code),) = blocks(text_of("megatron.md"), None)
    rule = eval(code, vars(rules).copy())
    assert rule in rules.FAMILIES["qwen3_moe"].rules


@pytest.mark.filterwarnings("ignore")
def test_trainer_of_the_trl_page_trains(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import GRPOConfig

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "my-qwen3-moe").symlink_to(ROOT / "recipes" / "demo" / "model")
    monkeypatch.chdir(tmp_path)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids) % 7) for ids in completion_ids]

    config = GRPOConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=1,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    dataset = Dataset.from_list([{"prompt": "3 + 4"}, {"prompt": "5 + 1"}])
    names = run(text_of("trl.md"), None, {"reward": reward, "dataset": dataset, "config": config})
    (logged,) = [row for row in names["trainer"].state.log_history if "replay/coverage" in row]
    assert logged["replay/coverage"] == 1.0
