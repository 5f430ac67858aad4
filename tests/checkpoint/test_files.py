"""A checkpoint that libraries would read differently is refused; experts are unstacked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_replay.checkpoint.facts import checkpoint_tensors, read_facts
from moe_replay.checkpoint.files import (
    SafetensorsCheckpoint,
    check_finite,
    in_stored_layout,
)
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.errors import CheckpointError, UnsupportedError
from moe_replay.testing.tiny_models import write_tiny_checkpoint

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("plain"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    return write_tiny_checkpoint(folder, num_hidden_layers=1, max_shard_size="200KB")


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda source: Path(shutil.copytree(source, tmp_path / "copy"))


def stacked(source: Path, target: Path) -> Path:
    """Write a checkpoint again as transformers 5 does with ``save_original_format=False``."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(target, save_original_format=False)
    return target


def edit_index(path: Path, edit: Callable[[dict], object]) -> None:
    index = json.loads((path / INDEX).read_text())
    changed = edit(index)
    (path / INDEX).write_text(json.dumps(index if changed is None else changed))


def test_t18_a_single_file_beside_an_index_of_others_is_refused_by_every_reader(copy, sharded):
    path = copy(sharded)
    other = {name: tensor + 1 for name, tensor in SafetensorsCheckpoint(path).items()}
    save_file(other, path / "model.safetensors", metadata={"format": "pt"})
    for read in (SafetensorsCheckpoint, read_facts, lambda p: EmbeddedEngine(p, dtype="float32")):
        with pytest.raises(CheckpointError, match="an index of other files"):
            read(path)


def test_t18_an_index_of_the_single_file_itself_is_read(copy, plain):
    path = copy(plain)
    names = dict.fromkeys(load_file(path / "model.safetensors"), "model.safetensors")
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert SafetensorsCheckpoint(path).keys() == names.keys()


def test_t18_two_shards_that_hold_one_name_are_refused(copy, sharded):
    path = copy(sharded)
    first, second = sorted(path.glob("*.safetensors"))[:2]
    twice = {**load_file(first), **dict([next(iter(load_file(second).items()))])}
    save_file(twice, first, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{first.name} and {second.name} .* both hold"):
        read_facts(path)


def test_t18_a_second_file_without_an_index_is_refused(copy, plain):
    """vLLM reads every safetensors file of a folder, transformers only the usual one."""
    path = copy(plain)
    save_file({NORM: torch.ones(64)}, path / "later.safetensors")
    with pytest.raises(CheckpointError, match=r"without an index, later\.safetensors"):
        read_facts(path)


def test_t18_an_adapter_beside_the_weights_is_refused(copy, plain):
    path = copy(plain)
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="merge it"):
        read_facts(path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", torch.ones(2)),
        ("model.layers.0.mlp.experts.0.up_proj.qweight", torch.ones(2, dtype=torch.int32)),
        (NORM, torch.ones(64).to(torch.float8_e4m3fn)),
        (NORM, torch.ones(64, dtype=torch.int8)),
    ],
)
def test_t19_scales_and_codes_are_refused_as_quantized(copy, plain, name, tensor):
    path = copy(plain)
    tensors = {**load_file(path / "model.safetensors"), name: tensor}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="quantized"):
        read_facts(path)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_t20_stacked_experts_are_read_under_the_usual_names(tmp_path, family):
    plain = write_tiny_checkpoint(tmp_path / "plain", family, num_hidden_layers=2)
    other = stacked(plain, tmp_path / "stacked")
    on_disk = load_file(other / "model.safetensors")
    assert on_disk["model.layers.1.mlp.experts.gate_up_proj"].shape == (16, 64, 64)
    ours, expected = SafetensorsCheckpoint(other), load_file(plain / "model.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert ours.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert read_facts(other) == replace(read_facts(plain), stacks_experts=True)


def test_t20_the_embedded_engine_samples_and_is_pushed_the_same_from_both_layouts(tmp_path, plain):
    other = stacked(plain, tmp_path / "stacked")
    later = write_tiny_checkpoint(tmp_path / "later", num_hidden_layers=1, seed=1)
    request = Request(request_id=0, prompt_ids=np.arange(4, 12, dtype=np.int32), num_generations=2)
    answers = []
    for path in (plain, other):
        engine = EmbeddedEngine(path, dtype="float32")
        for version in range(2):
            (group,) = engine.generate([request], SamplingParams(max_completion_length=6))
            answers.append([completion.token_ids.tolist() for completion in group.completions])
            engine.load_weights(checkpoint_tensors(later), policy_version=version + 1)
    assert answers[:2] == answers[2:]
    assert answers[0] != answers[1]


def test_t20_parts_are_put_together_as_the_source_stacks_them(tmp_path, plain):
    other = stacked(plain, tmp_path / "stacked")
    with SafetensorsCheckpoint(other) as checkpoint:
        written = dict(in_stored_layout(reversed(list(checkpoint.items())), checkpoint.stored))
        some = [item for item in checkpoint.items() if ".experts.3." not in item[0]]
        with pytest.raises(CheckpointError, match="are missing"):
            list(in_stored_layout(some, checkpoint.stored))
    on_disk = load_file(other / "model.safetensors")
    assert written.keys() == on_disk.keys()
    assert all(torch.equal(written[name], on_disk[name]) for name in on_disk)


def test_r6_a_weight_that_is_not_finite_is_refused_by_name(copy, plain):
    path = copy(plain)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"][3, 5] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for read in (check_finite, lambda p: EmbeddedEngine(p, dtype="float32")):
        with pytest.raises(CheckpointError, match=r"mlp\.gate\.weight .* 1 values of 1024"):
            read(path)
    check_finite(plain)


INDEXES = {
    "outside": (lambda i: i["weight_map"].update({NORM: "../outside.safetensors"}), "beside it"),
    "absolute": (lambda i: i["weight_map"].update({NORM: "/etc/passwd"}), "beside it"),
    "list": (lambda _: [], "holds a list, expected an object"),
    "no weight_map": (lambda i: {"metadata": {}}, "has no weight_map"),
    "no metadata": (lambda i: {"weight_map": i["weight_map"]}, '"metadata": {} to the file'),
    "missing shard": (
        lambda i: i["weight_map"].update({NORM: "x.safetensors"}),
        "missing files: x",
    ),
    "unknown name": (
        lambda i: i["weight_map"].update({"a.b": i["weight_map"][NORM]}),
        r"no file contains: a\.b",
    ),
}


@pytest.mark.parametrize("name", INDEXES)
def test_r11_an_index_that_cannot_be_followed_is_refused(copy, sharded, name):
    edit, message = INDEXES[name]
    path = copy(sharded)
    shutil.copy(next(path.glob("*.safetensors")), path.parent / "outside.safetensors")
    edit_index(path, edit)
    with pytest.raises((CheckpointError, ValueError), match=message):
        read_facts(path)


@pytest.mark.parametrize("content", ["half", "foreign", "empty"])
def test_r11_a_damaged_safetensors_file_is_refused(copy, plain, content):
    path = copy(plain)
    whole = (path / "model.safetensors").read_bytes()
    damaged = {"half": whole[: len(whole) // 2], "foreign": b"GGUF" * 99, "empty": b""}[content]
    (path / "model.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_facts(path)


def test_r11_numbers_of_layers_and_experts_are_compared_before_a_model_is_built(copy, plain):
    path = copy(plain)
    config = json.loads((path / "config.json").read_text())
    many = [{"num_hidden_layers": 60000}, {"num_experts": 60000, "num_local_experts": 60000}]
    for changed in many:
        (path / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(CheckpointError, match=r"config\.json requires 60000"):
            read_facts(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(NORM), "is missing 1 of the 60 tensors"),
        (
            lambda t: t.update({"model.evil.weight": torch.ones(2)}),
            "has 1 tensors that do not belong",
        ),
        (lambda t: t.update({NORM: torch.ones(63)}), r"has shape \[63\], expected \[64\]"),
    ],
)
def test_r11_tensors_that_are_not_those_of_the_config_are_refused(copy, plain, edit, message):
    path = copy(plain)
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        read_facts(path)
