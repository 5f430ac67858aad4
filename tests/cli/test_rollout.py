"""`moe-replay rollout`: killed and restarted, on several ranks, at several policy versions."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from moe_replay.cli.main import main
from moe_replay.engines.files.format import RolloutFile, shard_files
from moe_replay.engines.files.writer import RolloutWriter
from moe_replay.errors import CodecError, RecipeError
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from ..support.rollouts import roll_out

pytestmark = pytest.mark.ranks
NAME = "embedded-float32-policy-0"
OVERRIDES = [
    *(("rollout.dtype", "float32"), ("rollout.max_completion_length", "12")),
    ("batch.max_tokens_per_microbatch", "256"),
]


@pytest.fixture
def recipe(write_recipe, tmp_path) -> Path:
    path = write_recipe()
    write_tiny_checkpoint(tmp_path / "model", num_hidden_layers=3)
    return path


def sample(recipe: Path, folder: Path, *, count: int = 8, ranks: int = 1, **options) -> None:
    """Run the command in processes of their own."""

    def call() -> None:
        options.setdefault("num_prompts", count)
        assert roll_out(recipe, folder, OVERRIDES, **options) == 0

    run_ranks(call, ranks)


def completions(folder: Path) -> dict[int, list[tuple[list[int], list[bool]]]]:
    """Return tokens and valid rows of every completion, each group checked to the last byte."""
    rollout = RolloutFile(folder)
    return {
        number: [
            (c.token_ids.tolist(), c.trace.valid.tolist())
            for c in rollout.group(number).completions
        ]
        for number in rollout.request_ids
    }


def test_e7_killed_while_it_writes_it_goes_on_with_whole_groups(recipe, tmp_path, monkeypatch):
    sample(recipe, tmp_path / "whole")
    reader, reports = os.pipe()
    write = RolloutWriter.write

    def reporting(self, group) -> None:
        write(self, group)
        os.write(reports, b".")

    monkeypatch.setattr(RolloutWriter, "write", reporting)
    child = os.fork()
    if child == 0:
        os.close(reader)
        # The parent ends it in any case.
        roll_out(recipe, tmp_path / "killed", OVERRIDES, num_prompts=8)
        os._exit(0)
    os.close(reports)
    assert [os.read(reader, 1) for _ in range(3)] == [b"."] * 3
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    monkeypatch.undo()
    with RolloutWriter(tmp_path / "killed" / f"{NAME}.json") as writer:
        kept = list(writer.kept)
    assert len(kept) >= 3
    sample(recipe, tmp_path / "killed")
    assert completions(tmp_path / "killed") == completions(tmp_path / "whole")
    # The control: what was kept was not sampled again, and was not changed.
    shard = tmp_path / "killed" / f"{NAME}.shard-0.groups"
    assert kept == sorted(kept)
    before = shard.read_bytes()
    sample(recipe, tmp_path / "killed")
    assert shard.read_bytes() == before


def test_e7_two_ranks_sample_what_one_does(recipe, tmp_path, capfd):
    sample(recipe, tmp_path / "one")
    sample(recipe, tmp_path / "two", ranks=2)
    assert len(shard_files(tmp_path / "two" / f"{NAME}.json", ".groups")) == 2
    assert completions(tmp_path / "two") == completions(tmp_path / "one")
    assert "wrote 32 completions of 8 prompts" in capfd.readouterr().err
    # Both shards are one recording for the commands that read traces.
    assert main(["compare", "--json", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["flip_frac"] == 0 and len(found["flip_frac_by_sequence"]) == 32
    assert main(["inspect", "--json", str(tmp_path / "two" / f"{NAME}.json")]) == 0
    assert json.loads(capfd.readouterr().out)["num_traces"] == 32


def test_e7_one_rank_of_three_is_killed_and_two_go_on(recipe, tmp_path, monkeypatch, capfd):
    write = RolloutWriter.write

    def dying(self, group) -> None:
        write(self, group)
        if dist.get_rank() == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(RolloutWriter, "write", dying)
        # Whichever is told first: that it died, or that the others lost it.
        with pytest.raises(RuntimeError, match=r"rank 2 died|Connection closed|reset by peer"):
            sample(recipe, tmp_path / "killed", ranks=3)
    with pytest.raises(CodecError, match=r"of 8 prompts are there"):
        RolloutFile(tmp_path / "killed")
    sample(recipe, tmp_path / "killed", ranks=2)
    assert "continuing:" in capfd.readouterr().err
    sample(recipe, tmp_path / "whole")
    assert completions(tmp_path / "killed") == completions(tmp_path / "whole")


def test_a_later_policy_version_of_a_checkpoint_with_prediction_layers_is_sampled(recipe, tmp_path):
    """As a run's export holds them."""
    path = write_tiny_checkpoint(
        tmp_path / "model", "glm4_moe", num_hidden_layers=2, num_nextn_predict_layers=1
    )
    weights = load_file(path / "model.safetensors")
    weights["model.layers.2.eh_proj.weight"] = torch.zeros(4, 4)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    sample(recipe, tmp_path / "out", count=1, policy_version=1)
    group = RolloutFile(tmp_path / "out").group(0)
    assert {completion.policy_version for completion in group.completions} == {1}


def test_e7_a_later_policy_version_is_sampled_beside_the_first(recipe, tmp_path):
    folder = tmp_path / "both"
    sample(recipe, folder, count=2)
    write_tiny_checkpoint(tmp_path / "model", num_hidden_layers=3, seed=9)
    sample(recipe, folder, count=2, first_prompt=2, policy_version=1)
    later = RolloutFile(folder / "embedded-float32-policy-1.json")
    assert later.request_ids == range(2, 4)
    for completion in later.group(3).completions:
        assert completion.policy_version == 1
        assert [span.policy_version for span in completion.trace.origin.spans] == [1]
    # The manifests say whose weights they are.
    first = RolloutFile(folder / f"{NAME}.json").manifest
    names = first.weights.keys() & later.manifest.weights.keys()
    changed = {name for name in names if first.weights[name] != later.manifest.weights[name]}
    assert changed == {"model.safetensors"}


@pytest.mark.parametrize("what", ["weights", "prompts"])
def test_e7_it_does_not_go_on_with_other_weights_or_prompts(recipe, tmp_path, what):
    folder = tmp_path / "out"
    sample(recipe, folder, count=2)
    if what == "weights":
        write_tiny_checkpoint(tmp_path / "model", num_hidden_layers=3, seed=9)
        told = r"weights.model.safetensors: was sha256"
    else:
        rows = [{"prompt": f"{n} + 2 =", "answer": str(n + 2)} for n in range(8)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "train.jsonl").write_text(text)
        told = "the dataset, its order"
    with pytest.raises(RecipeError, match=told):
        sample(recipe, folder, count=4)


@pytest.mark.vllm
@pytest.mark.usefixtures("vllm_imported")
@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor:FutureWarning")
def test_e7_ranks_that_share_an_engine_write_one_rollout(recipe, tmp_path):
    shared = [
        *(("rollout.engine", "vllm"), ("rollout.tensor_parallel_size", "2")),
        *(("rollout.kv_cache_gib", "0.05"), *OVERRIDES),
    ]
    folder = tmp_path / "out"

    def call() -> None:
        assert roll_out(recipe, folder, shared, num_prompts=5) == 0

    # Five prompts, two a step: in the last step one rank asks for nothing, and takes part all the
    # same.
    run_ranks(call, 2)
    sample(recipe, tmp_path / "embedded", count=5)
    assert completions(folder) == completions(tmp_path / "embedded")
    shutil.rmtree(folder)
