"""Adapters in PEFT's format: written, read again, loaded by PEFT, and refused where they differ."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_replay.errors import CheckpointError
from moe_replay.megatron.lora.attach import check_export
from moe_replay.megatron.lora.peft_files import check_adapter, save_adapter
from moe_replay.megatron.model import read_model_shape
from moe_replay.recipe.sections.lora import LoraSection
from moe_replay.routing import Routing
from moe_replay.testing.layouts import layout
from moe_replay.testing.policies import mean_loss, start_policy
from moe_replay.testing.ranks import run_ranks

from .adapter_cases import LORA, drawn, share

pytestmark = pytest.mark.ranks
PLAIN: dict[str, Any] = {
    "init_lora_weights": "gaussian",
    "layers_to_transform": [0, 1],
    "loftq_config": {},
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "revision": "main",
    "lora_bias": False,
    "exclude_modules": None,
}
"""What PEFT writes beside, of adapters that compute no more than others."""
EXPERT = "base_model.model.model.layers.1.mlp.experts.5.down_proj"


def write(checkpoint: Path, output: Path, lora: LoraSection = LORA) -> dict[str, torch.Tensor]:
    """Write drawn adapters, and return the merged weights."""
    actor = start_policy(checkpoint, layout(ep=2), lora=lora)
    assert actor.adapters is not None
    shapes = actor.adapters.shapes
    actor.adapters.take_whole({name: drawn(name, shape) for name, shape in shapes.items()})
    save_adapter(actor.adapters, lora, checkpoint, output)
    return dict(actor.weights.tensors())


def read(checkpoint: Path, folder: Path, **keys: Any) -> dict[str, torch.Tensor]:
    lora = LoraSection(rank=4, alpha=8.0, adapter=folder).model_copy(update=keys)
    return dict(start_policy(checkpoint, lora=lora).weights.tensors())


def read_and_learn(checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Start from an adapter in bfloat16, take one step of at most 1e-3, return the adapter."""
    lora = LORA.model_copy(update={"adapter": folder})
    actor = start_policy(checkpoint, lora=lora, dtype=torch.bfloat16)
    actor.update(share(actor), mean_loss, temperature=1.0, routing=Routing.LIVE)
    assert actor.adapters is not None
    return dict(actor.adapters.tensors())


@pytest.fixture(scope="module")
def written(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return the folder that two ranks wrote, and what they would push."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    return folder, run_ranks(write, 2, checkpoints["qwen3_moe"], folder)[0]


def test_an_adapter_is_written_by_expert_and_read_again(
    checkpoints: dict[str, Path], written: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    folder, merged = written
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tuple(tensors[f"{EXPERT}.lora_A.weight"].shape) == (4, 32)
    assert tuple(tensors[f"{EXPERT}.lora_B.weight"].shape) == (64, 4)
    # Two layers of q, k, v, o; three projections of the dense layer and of each expert.
    assert len(tensors) == 2 * (2 * 4 + 3 + 16 * 3)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8.0, "LORA")
    assert config["peft_version"] >= "0.19"
    (again,) = run_ranks(read, 1, checkpoints["qwen3_moe"], folder)
    assert all(torch.equal(again[name], merged[name]) for name in merged)


def test_a_run_goes_on_from_the_adapter_that_it_starts_with(
    checkpoints: dict[str, Path], written: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    (learned,) = run_ranks(read_and_learn, 1, checkpoints["qwen3_moe"], written[0])
    differences = {
        name: float((value.float() - drawn(name, tuple(value.shape))).abs().max())
        for name, value in learned.items()
    }
    # The step, and the rounding of numbers up to 0.4 to bfloat16.
    assert max(differences.values()) < 4e-3
    assert min(differences.values()) > 0


def changed(folder: Path, to: Path, config: dict[str, Any], renamed: dict[str, str]) -> Path:
    """Copy an adapter with other values of its config, and other names."""
    to.mkdir()
    values = json.loads((folder / "adapter_config.json").read_text()) | config
    (to / "adapter_config.json").write_text(json.dumps(values))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    tensors.pop("", None)
    save_file(tensors, to / "adapter_model.safetensors")
    return to


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 16}, "r is 16, expected 4; set lora.rank = 16"),
        ({"lora_alpha": 16}, "multiplied by 4 .*expected 2 .*set lora.alpha = 16"),
        ({"use_rslora": True}, "multiplied by 4 .*set lora.alpha = 8, lora.rslora = true"),
        ({"use_dora": True}, "use_dora is True, expected False"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, "init_lora_weights is 'eva'"),
        ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens is \[5\]"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"a_later_kind": {}, "another_later_kind": 2}, "another_later_kind is 2"),
    ],
)
def test_an_adapter_that_computes_something_else_is_refused_before_it_is_read(
    written: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    config: dict[str, Any],
    said: str,
) -> None:
    same = changed(written[0], tmp_path / "same", PLAIN, {})
    check_adapter(LORA.model_copy(update={"adapter": same}))
    other = changed(written[0], tmp_path / "other", config, {})
    with pytest.raises(CheckpointError, match=said):
        check_adapter(LORA.model_copy(update={"adapter": other}))


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "1 are missing, such as model.layers.1"), ("fused", "1 are missing.*1 are not expected")],
)
def test_an_adapter_of_other_matrices_is_refused(
    checkpoints: dict[str, Path],
    written: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    name: str,
    said: str,
) -> None:
    other = changed(written[0], tmp_path / "other", {}, {f"{EXPERT}.lora_A.weight": name})
    with pytest.raises(CheckpointError, match=said):
        run_ranks(read, 1, checkpoints["qwen3_moe"], other)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("family", "rslora", "targets"),
    [
        ("qwen3_moe", True, ("all-linear",)),
        ("qwen3_moe", False, ("q_proj", "v_proj")),
        ("qwen3_moe", False, ("o_proj", "down_proj")),
        ("deepseek_v3", False, ("all-linear",)),
        ("deepseek_v3", False, ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_peft_computes_what_is_pushed(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    family: str,
    rslora: bool,
    targets: tuple[str, ...],
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    lora = LoraSection(rank=4, alpha=8.0, rslora=rslora, target_modules=targets)
    check_export(read_model_shape(checkpoints[family]), lora)
    checkpoint = checkpoints[family]
    merged = run_ranks(write, 2, checkpoint, tmp_path / "adapter", lora)[0]
    # 8 / sqrt(4) is twice 8 / 4.
    assert lora.scale == (4.0 if rslora else 2.0) == 8 / (math.sqrt(4) if rslora else 4)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.arange(4, 28).reshape(2, 12)
    with torch.no_grad():
        plain = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(ids).logits
        save_file(merged, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        expected = whole(ids).logits
    assert (adapted - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 1e-2
