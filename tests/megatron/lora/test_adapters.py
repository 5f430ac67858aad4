"""Only adapters are held, saved and changed; what is pushed is merged from weights that stay."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.checkpoint import CheckpointFolder, RunPosition
from moe_replay.megatron.lora.attach import check_export, check_lora
from moe_replay.megatron.model import read_model_shape, transformer_config
from moe_replay.megatron.ranks.messages import all_ranks
from moe_replay.recipe.sections.lora import LoraSection
from moe_replay.recipe.sections.training import ParallelLayout
from moe_replay.routing import Routing
from moe_replay.testing.layouts import layout
from moe_replay.testing.policies import mean_loss, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from .adapter_cases import LORA, drawn, share

pytestmark = pytest.mark.ranks

# Rank 4, hidden size 64. Attention: queries 128 rows, keys and values 64, output 64 of 128. The
# dense layer is 128 wide, each of the 16 experts 32.
ATTENTION = 4 * (64 + 128) + 2 * 4 * (64 + 64) + 4 * (128 + 64)
DENSE = 3 * 4 * (64 + 128)
EXPERT = 3 * 4 * (64 + 32)
IN_ADAPTERS = 2 * ATTENTION + DENSE + 16 * EXPERT


def held(checkpoint: Path, lora: LoraSection) -> tuple[int, int, int]:
    """Return how many numbers have a gradient, an optimizer state, and are there at all."""
    actor = start_policy(checkpoint, lora=lora)
    actor.update(share(actor), mean_loss, temperature=1.0, routing=Routing.LIVE)
    parameters = [p for module in actor.modules for p in module.parameters()]
    parts: list[Any] = list(actor.optimizer.chained_optimizers)
    states = itertools.chain.from_iterable(part.optimizer.state.values() for part in parts)
    return (
        sum(p.numel() for p in parameters if hasattr(p, "main_grad")),
        sum(state["exp_avg"].numel() for state in states),
        sum(p.numel() for p in parameters),
    )


def test_frozen_weights_have_neither_gradients_nor_optimizer_state(
    checkpoints: dict[str, Path],
) -> None:
    ((gradients, states, total),) = run_ranks(held, 1, checkpoints["qwen3_moe"], LORA)
    assert (gradients, states) == (IN_ADAPTERS, IN_ADAPTERS)
    # Without adapters everything has both.
    ((gradients, states, whole),) = run_ranks(held, 1, checkpoints["qwen3_moe"], LoraSection())
    assert gradients == states == whole == total - IN_ADAPTERS


def of_adapters(actor: MegatronActor) -> dict[str, torch.Tensor]:
    assert actor.adapters is not None
    return dict(actor.adapters.tensors())


def save_and_go_on(checkpoint: Path, where: ParallelLayout, folder: Path) -> Any:
    actor = start_policy(checkpoint, where, lora=LORA)
    actor.update(share(actor), mean_loss, temperature=1.0, routing=Routing.LIVE)
    schedule = actor.scheduler.state_dict()
    at = RunPosition(step=1, policy_version=1, next_prompt=0, identity={}, scheduler=schedule)
    CheckpointFolder(folder, save_total_limit=1).save(actor, at)
    saved = of_adapters(actor)
    actor.update(share(actor), mean_loss, temperature=1.0, routing=Routing.LIVE)
    return saved, of_adapters(actor)


def load_and_go_on(checkpoint: Path, where: ParallelLayout, folder: Path) -> Any:
    actor = start_policy(checkpoint, where, lora=LORA)
    CheckpointFolder(folder, save_total_limit=1).load(actor, 1)
    loaded = of_adapters(actor)
    actor.update(share(actor), mean_loss, temperature=1.0, routing=Routing.LIVE)
    return loaded, of_adapters(actor)


def test_a_checkpoint_holds_adapters_alone_and_goes_on_in_another_layout(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = checkpoints["qwen3_moe"]
    saved, after = run_ranks(
        save_and_go_on, 2, checkpoint, layout(tp=2, etp=1), tmp_path / "saved"
    )[0]
    stored = FileSystemReader(tmp_path / "saved" / "step-000001").read_metadata()
    names = set(stored.state_dict_metadata)
    assert names.issuperset(saved)
    assert not [name for name in names if name.endswith("proj.weight") or "embed" in name]
    for loaded, went_on in run_ranks(
        load_and_go_on, 2, checkpoint, layout(pp=2), tmp_path / "saved"
    ):
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())
        moved = torch.cat([(after[n] - saved[n]).flatten() for n in saved]).norm()
        apart = torch.cat([(went_on[n] - after[n]).flatten() for n in saved]).norm()
        assert apart < 1e-3 * moved


def pushed_in_bfloat16(checkpoint: Path) -> Any:
    """Return weights before a push, pushed, the share that changed, weights after, adapters."""
    actor = start_policy(checkpoint, lora=LORA, dtype=torch.bfloat16)
    assert actor.adapters is not None
    with actor.adapters.counting(torch.bfloat16) as changes:
        base = dict(actor.weights.tensors())
    shapes = actor.adapters.shapes
    actor.adapters.take_whole({name: drawn(name, shape) / 8 for name, shape in shapes.items()})
    with actor.adapters.counting(torch.bfloat16) as changes:
        pushed = dict(actor.weights.tensors())
    frac = changes.frac(all_ranks())
    actor.adapters.take_whole({name: torch.zeros(shape) for name, shape in shapes.items()})
    return base, pushed, frac, dict(actor.weights.tensors()), of_adapters(actor)


def test_a_push_is_merged_in_float32_and_leaves_the_weights_alone(
    checkpoints: dict[str, Path],
) -> None:
    ((base, pushed, frac, again, adapters),) = run_ranks(
        pushed_in_bfloat16, 1, checkpoints["qwen3_moe"]
    )
    assert all(torch.equal(again[name], base[name]) for name in base)
    changed = seen = 0
    for name, weight in base.items():
        first = f"{name.removesuffix('.weight')}.lora_A.weight"
        expected = weight
        if first in adapters:
            second = first.replace("lora_A", "lora_B")
            a, b = (
                (drawn(n, tuple(adapters[n].shape)) / 8).bfloat16().float() for n in (first, second)
            )
            expected = (weight.float() + 2.0 * (b @ a)).bfloat16()
            changed += int((expected != weight).sum())
            seen += weight.numel()
        # The product may be summed in another order, and then rounded the other way.
        assert (pushed[name] != expected).float().mean() < 1e-2, name
        assert torch.allclose(pushed[name].float(), expected.float(), rtol=1e-2), name
    assert frac == pytest.approx(changed / seen, abs=1e-3)
    assert 0.3 < frac < 1


@pytest.mark.parametrize(
    ("where", "lora", "overrides", "said"),
    [
        (layout(tp=2), {}, {}, "expert tensor parallelism 2"),
        (layout(tp=4, etp=1), {}, {}, "over 2 key and value"),
        (layout(), {"target_modules": ("query",)}, {}, "names query, but a qwen3_moe"),
        (layout(), {}, {"moe_aux_loss_coeff": 0.01}, "it balances routers"),
        (layout(), {}, {"moe_shared_expert_overlap": True}, "moe_shared_expert_overlap = True"),
    ],
)
def test_what_adapters_cannot_do_exactly_is_refused(
    checkpoints: dict[str, Path],
    where: ParallelLayout,
    lora: dict[str, Any],
    overrides: dict[str, Any],
    said: str,
) -> None:
    shape = read_model_shape(checkpoints["qwen3_moe"])
    section = LoraSection(rank=4, **lora)
    config = transformer_config(shape, where, local_layers=True)
    for name, value in overrides.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedError, match=said):
        check_lora(shape, where, section, config)
    # Attention alone may be cut as the experts may not.
    if said.startswith("expert tensor"):
        attention = LoraSection(rank=4, target_modules=("q_proj", "o_proj"))
        check_lora(shape, where, attention, config)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            ("q_proj", "gate_proj"),
            "have gate_proj of routed experts, without up_proj and down_proj",
        ),
        (
            ("up_proj", "down_proj"),
            "have up_proj and down_proj of routed experts, without gate_proj",
        ),
        (("gate_proj", "up_proj"), "have gate_proj and up_proj .*Set lora.export = 'merged', or"),
        (("q_proj",), None),
        (("down_proj",), None),
        (("gate_proj", "up_proj", "down_proj"), None),
        (("all-linear",), None),
    ],
)
def test_adapters_that_peft_would_leave_out_are_not_exported(
    checkpoints: dict[str, Path], targets: tuple[str, ...], said: str | None
) -> None:
    shape = read_model_shape(checkpoints["qwen3_moe"])
    lora = LoraSection(rank=4, target_modules=targets)
    if said is None:
        check_export(shape, lora)
        return
    with pytest.raises(UnsupportedError, match=said):
        check_export(shape, lora)


def test_a_stage_without_an_adapter_is_refused(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path, num_hidden_layers=2)
    lora = LoraSection(rank=4, target_modules=("q_proj",))
    where = layout(pp=2, stages="E|ttL")
    with pytest.raises(UnsupportedError, match="a pipeline stage would have no adapter"):
        run_ranks(lambda: start_policy(checkpoint, where, lora=lora), 2)
