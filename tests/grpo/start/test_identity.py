"""What a run is by content: what counts as a change, what does not, and what is said about it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_replay.errors import CheckpointError
from moe_replay.grpo.start.admission import check_admission
from moe_replay.grpo.start.device import on_this_device
from moe_replay.grpo.start.digest_cache import DigestCache
from moe_replay.grpo.start.identity import LARGE, differences, is_allowed, run_identity
from moe_replay.megatron.checkpoint import CheckpointFolder
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.recipe import Recipe

from ..test_loop import metrics_of, run


@pytest.fixture
def home(workspace: Path, tmp_path: Path) -> Path:
    """Return a copy of the workspace whose files may be edited."""
    folder = tmp_path / "home"
    shutil.copytree(workspace, folder)
    return folder


def load(home: Path, **overrides: Any) -> Recipe:
    pairs = [(key.replace("__", "."), str(value)) for key, value in overrides.items()]
    return load_recipe(home / "recipe.toml", pairs)


def identity(home: Path, **overrides: Any) -> dict[str, Any]:
    return run_identity(load(home, **overrides), DigestCache(home / "digests.json"))


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [difference.key for difference in differences(before, after)]


def test_t24_a_run_that_is_moved_or_copied_is_the_same(home: Path, tmp_path: Path) -> None:
    before = identity(home)
    (home / "train.jsonl").rename(home / "prompts.jsonl")
    (home / "model").rename(home / "other")
    shutil.move(home, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere"
    os.utime(moved / "other" / "config.json", (1, 1))
    (moved / "other" / "README.md").write_text("is not read")
    after = identity(moved, data__train=moved / "prompts.jsonl", model__path=moved / "other")
    assert changed(before, after) == []


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("train.jsonl", "data.train"),
        ("reward.py", "rewards.0.function"),
        ("model/config.json", "model.path/config.json"),
        ("model/tokenizer.json", "model.path/tokenizer.json"),
        ("model/model.safetensors", "model.path/model.safetensors"),
    ],
)
def test_t24_one_edited_byte_is_a_change_of_its_key(home: Path, file: str, key: str) -> None:
    before = identity(home)
    content = bytearray((home / file).read_bytes())
    content[len(content) // 2] ^= 1
    times = (home / file).stat()
    (home / file).write_bytes(content)
    os.utime(home / file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert changed(before, identity(home)) == [key]


def test_t24_a_module_that_a_reward_imports_counts_with_it(home: Path) -> None:
    (home / "helpers").mkdir()
    (home / "helpers" / "__init__.py").write_text("from .deep import x\n")
    (home / "helpers" / "deep.py").write_text("x = 1\n")
    (home / "beside.py").write_text("import os, numpy\n")
    reward = home / "reward.py"
    text = "from helpers import x\nfrom beside import os\nimport not_there\n"
    reward.write_text(text + reward.read_text())
    before = identity(home)
    assert {f"rewards.0.function/{name}" for name in ("beside.py", "helpers/deep.py")} < set(before)
    (home / "helpers" / "deep.py").write_text("x = 2\n")
    assert changed(before, identity(home)) == ["rewards.0.function/helpers/deep.py"]


def test_t24_files_of_a_dataset_folder_count(home: Path) -> None:
    folder = home / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"prompt": "a"}\n')
    recipe = load(home, data__train=folder)
    cache = DigestCache(home / "digests.json")
    before = run_identity(recipe, cache)
    (folder / "notes.md").write_text("is not read")
    assert changed(before, run_identity(recipe, cache)) == []
    (folder / "b.jsonl").write_text('{"prompt": "b"}\n')
    assert changed(before, run_identity(recipe, cache)) == ["data.train"]
    (folder / "a.jsonl").rename(folder / "c.jsonl")
    assert changed(before, run_identity(recipe, cache)) == ["data.train"]


def test_t24_evaluation_may_change_where_no_training_item_depends_on_it(home: Path) -> None:
    before = identity(home)
    shutil.copy(home / "train.jsonl", home / "held.jsonl")
    held = {"data__eval": home / "held.jsonl", "data__eval_size": 4}
    assert changed(before, identity(home, **held)) == []
    # Generated training items are drawn around the held-out ones.
    task = {"data__train": "reasoning_gym:chain_sum", "rewards__0__function": "reasoning_gym"}
    before = identity(home, **task)
    drawn = {"data__eval": "reasoning_gym:chain_sum", "data__eval_size": 4}
    assert {"data.eval", "data.eval_size"} <= set(changed(before, identity(home, **task, **drawn)))


def test_t24_generated_items_count_by_the_version_of_their_generator(home: Path) -> None:
    task = {"data__train": "reasoning_gym:chain_sum", "rewards__0__function": "reasoning_gym"}
    found = identity(home, **task)
    assert found["data.train"] == "reasoning_gym:chain_sum"
    assert found["data.train (reasoning-gym)"]
    assert found["rewards.0.function"] == "reasoning_gym"


def write_large(path: Path, *, at: int = 0, value: int = 0, name: str = "b") -> None:
    """Write 2 tensors of 40 MiB as a sparse file, with one byte set."""
    size = 40 << 20
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
            name: {"dtype": "U8", "shape": [size], "data_offsets": [size, 2 * size]},
        }
    ).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * size)
        file.seek(8 + len(header) + at)
        file.write(bytes([value]))


def test_t24_large_weights_count_by_header_and_the_start_of_every_tensor(home: Path) -> None:
    large = home / "model" / "model.safetensors"
    seen = []
    for options in ({}, {"name": "c"}, {"value": 1}, {"at": 40 << 20, "value": 1}):
        write_large(large, **options)
        assert large.stat().st_size > LARGE
        seen.append(identity(home)["model.path/model.safetensors"])
    assert len(set(seen)) == 4
    # Stated: the middle of a tensor of a large file is not looked at.
    write_large(large, at=(40 << 20) + 4096, value=1)
    assert identity(home)["model.path/model.safetensors"] == seen[0]


def test_t24_a_large_file_is_read_once_and_again_when_it_was_written(home: Path) -> None:
    path, reads = home / "large", []

    def read(file: Path, size: int) -> str:
        reads.append(size)
        return f"digest {len(reads)}"

    def digest() -> str:
        cache = DigestCache(home / "digests.json")
        found = cache.digest(path, read)
        cache.save()
        return found

    with path.open("wb") as file:
        file.truncate(LARGE + 1)
    long_ago = 10**9
    os.utime(path, ns=(long_ago, long_ago))
    # Just written, by its time of change, so nothing may be remembered of it yet.
    assert [digest(), digest()] == ["digest 1", "digest 2"]
    entries = {
        str(path): {
            "file": [
                (status := path.stat()).st_size,
                status.st_ino,
                status.st_mtime_ns,
                status.st_ctime_ns,
            ],
            "digest": "remembered",
        }
    }
    (home / "digests.json").write_text(json.dumps(entries))
    assert digest() == "remembered"
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(long_ago, long_ago))
    assert digest() == "digest 3"


def test_a_key_that_an_earlier_revision_did_not_know_is_no_change_at_its_default(
    home: Path,
) -> None:
    now = load(home)
    record = identity(home)
    for key in ("grpo.delta", "grpo.epsilon", "rewards.0.weight", "replay.min_coverage"):
        record.pop(key, None)
    assert changed(record, identity(home))
    assert differences(record, identity(home), now.fingerprint_defaults()) == []
    # With another value than the default it is one.
    keys = {"grpo__epsilon": 0.3, "grpo__epsilon_high": 0.2}
    wider = load(home, **keys)
    found = differences(record, identity(home, **keys), wider.fingerprint_defaults())
    assert [(each.key, each.old, each.new) for each in found] == [("grpo.epsilon", None, 0.3)]
    # What has no default, and what is gone, is one too.
    record = {name: v for name, v in identity(home).items() if name != "rewards.0.function"}
    found = differences(record, identity(home), now.fingerprint_defaults())
    assert [each.key for each in found] == ["rewards.0.function"]
    gone = {**identity(home), "grpo.forgotten": 1}
    assert len(differences(gone, identity(home), now.fingerprint_defaults())) == 1


def test_d11_keys_are_allowed_with_all_that_lies_below_them() -> None:
    allowed = ["optimizer.lr", "model.path", "data.train"]
    for key in ("optimizer.lr", "model.path/config.json", "data.train (reasoning-gym)"):
        assert is_allowed(key, allowed)
    for key in ("optimizer.lr_scheduler", "model.dtype", "optimizer"):
        assert not is_allowed(key, allowed)


def refusal_of_dry_run(recipe: Recipe, allow_changed: list[str]) -> str | None:
    folder = CheckpointFolder(recipe.run.output_dir / "checkpoints", save_total_limit=2)
    before = sorted(recipe.run.output_dir.rglob("*"))
    try:
        here = on_this_device(recipe)
        check_admission(here, folder, restart=False, allow_changed=allow_changed)
        return None
    except CheckpointError as error:
        return str(error)
    finally:
        assert sorted(recipe.run.output_dir.rglob("*")) == before


@pytest.mark.ranks
def test_t24_d11_a_changed_run_is_refused_by_key_and_goes_on_when_told_to(home: Path) -> None:
    run(load(home, run__max_steps=1))
    reward = home / "reward.py"
    reward.write_text(reward.read_text() + "# edited\n")
    changes = load(home, run__max_steps=2, optimizer__lr=5e-4)
    with pytest.raises(CheckpointError) as caught:
        run(changes)
    said = str(caught.value)
    assert "optimizer.lr: was 0.001, is 0.0005" in said
    assert "rewards.0.function: was" in said
    assert "--allow-changed optimizer.lr --allow-changed rewards.0.function" in said
    with pytest.raises(CheckpointError, match=r"rewards\.0\.function: was"):
        run(changes, allow_changed=["optimizer.lr"])
    assert refusal_of_dry_run(changes, []) == said
    assert "optimizer.lr" not in str(refusal_of_dry_run(changes, ["optimizer.lr"]))
    accepted = ["optimizer.lr", "rewards.0.function"]
    assert refusal_of_dry_run(changes, accepted) is None
    records = run(changes, allow_changed=accepted)
    assert [record["learning_rate"] for record in records] == [1e-3, 5e-4]
    written = (home / "out" / "changes.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in written]
    assert [(line["key"], line["after_step"]) for line in lines] == [(key, 1) for key in accepted]
    assert (lines[0]["old"], lines[0]["new"]) == (1e-3, 5e-4)
    # What was accepted is the run from now on.
    assert metrics_of(changes) == run(changes)
    with pytest.raises(CheckpointError, match=r"optimizer\.lr: was 0\.0005, is 0\.001"):
        run(load(home, run__max_steps=2))


@pytest.mark.ranks
def test_d12_a_run_directory_that_is_a_file_is_refused_by_dry_run_and_start(home: Path) -> None:
    (home / "taken").write_text("")
    for path in ("taken", "taken/below"):
        recipe = load(home, run__output_dir=home / path, run__max_steps=1)
        said = refusal_of_dry_run(recipe, [])
        assert said is not None and "taken is a file" in said
        with pytest.raises(CheckpointError) as caught:
            run(recipe)
        assert str(caught.value) == said
    # A folder that is not there yet is made by the start, and not by the dry run.
    fresh = load(home, run__output_dir=home / "not" / "yet", run__max_steps=1)
    assert refusal_of_dry_run(fresh, []) is None
    assert not (home / "not").exists()


@pytest.mark.ranks
def test_t24_a_changed_run_is_refused_on_every_rank(
    home: Path,
) -> None:
    run(load(home, run__max_steps=1), world_size=2)
    np.save(home / "model" / "unread.npy", np.zeros(1))
    assert len(run(load(home, run__max_steps=1), world_size=2)) == 1
    (home / "train.jsonl").write_text('{"prompt": "say 1:"}\n')
    weights = bytearray((home / "model" / "model.safetensors").read_bytes())
    weights[-4] ^= 1
    (home / "model" / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"data\.train: was [^\n]*\n *model\.path/model"):
        run(load(home, run__max_steps=1), world_size=2)
