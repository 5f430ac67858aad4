"""TRL's own loss gives the same values and gradients, for every variant that both have.

The functions are taken out of the installed release's source: importing its trainer takes ten
seconds.
"""

from __future__ import annotations

import ast
import itertools
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from . import oracle
from .batches import computed, random_batch
from .oracle import LIMITS, Completion

WANTED = ("_compute_loss", "get_off_policy_mask", "get_high_entropy_mask")


@pytest.fixture(scope="module")
def theirs() -> dict[str, Callable[..., Any]]:
    """Return the functions of TRL's GRPOTrainer that a loss is made of."""
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed: pip install trl==1.16.0")
    if version("trl") != "1.16.0":
        pytest.skip(f"trl {version('trl')} is installed, and the loss is compared with 1.16.0's")
    source = Path(spec.origin).parent / "trainer" / "grpo_trainer.py"
    tree = ast.parse(source.read_text())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in WANTED]
    for function in found:
        function.decorator_list = []
    names = {"torch": torch, "nanmin": torch.min, "nanmax": torch.max}
    module = ast.Module(body=list(found), type_ignores=[])
    exec(compile(module, str(source), "exec"), names)
    return {name: names[name] for name in WANTED}


def padded(batch: list[Completion], name: str) -> torch.Tensor:
    rows = [torch.from_numpy(getattr(sample, name)) for sample in batch]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def trainer_of(
    theirs: dict[str, Callable[..., Any]],
    keys: dict[str, Any],
    new: torch.Tensor,
    entropies: torch.Tensor,
) -> SimpleNamespace:
    """Return what TRL's loss reads of its trainer."""
    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda values: values,
        reduce=lambda values, reduction: values,
        pad_across_processes=lambda values, **_: values,
        device="cpu",
        sync_gradients=True,
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, entropies, None),
        loss_type=keys["loss_type"],
        importance_sampling_level=keys.get("importance_sampling_level", "token"),
        epsilon_low=keys.get("epsilon", 0.2),
        epsilon_high=keys.get("epsilon_high", 0.2),
        beta=keys.get("beta", 0.0),
        max_completion_length=int(oracle.LIMIT),
        top_entropy_quantile=keys.get("top_entropy_quantile", 1.0),
        off_policy_mask_threshold=keys.get("off_policy_sequence_mask_delta"),
        use_vllm="rollout_importance_sampling_mode" in keys,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled="entropy_coef" in keys,
        entropy_coef=keys.get("entropy_coef"),
        use_adaptive_entropy=False,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(
            delta=keys.get("delta"),
            use_bias_correction_kl=keys.get("use_bias_correction_kl", False),
            sapo_temperature_pos=keys.get("sapo_temperature_pos", 1.0),
            sapo_temperature_neg=keys.get("sapo_temperature_neg", 1.05),
            steps_per_generation=1,
        ),
        accelerator=accelerator,
        get_off_policy_mask=theirs["get_off_policy_mask"],
    )
    trainer.get_high_entropy_mask = lambda *given: theirs["get_high_entropy_mask"](trainer, *given)
    return trainer


def trl_loss(
    theirs: dict[str, Callable[..., Any]], batch: list[Completion], keys: dict[str, Any]
) -> tuple[float, list[np.ndarray]]:
    """Return TRL's loss of a batch, and its gradient by the log-probabilities of each sample."""
    lengths = [len(sample.new) for sample in batch]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n) for n in lengths], batch_first=True)
    new = padded(batch, "new").requires_grad_(True)
    trainer = trainer_of(theirs, keys, new, padded(batch, "entropy"))
    gaps = [torch.from_numpy(oracle.correction(sample, keys)) for sample in batch]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor([s.advantage for s in batch], dtype=torch.float64),
        "old_per_token_logps": padded(batch, "old"),
        "sampling_per_token_logps": padded(batch, "mu"),
        "ref_per_token_logps": padded(batch, "ref"),
        "importance_sampling_ratio": torch.nn.utils.rnn.pad_sequence(gaps, batch_first=True),
        "num_items_in_batch": mask.sum(),
    }
    loss = theirs["_compute_loss"](trainer, None, inputs)
    loss.backward()
    assert new.grad is not None
    return float(loss.detach()), [row[:n].numpy() for row, n in zip(new.grad, lengths, strict=True)]


# Of the code's names; bnpo is over one microbatch there.
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
MORE: tuple[dict[str, Any], ...] = (
    {},
    {"beta": 0.3},
    {"beta": 0.3, "use_bias_correction_kl": True},
    {"off_policy_sequence_mask_delta": 0.05},
    {"top_entropy_quantile": 0.4},
    {"entropy_coef": 0.2},
    {"entropy_coef": 0.2, "top_entropy_quantile": 0.6},
    *(
        {
            "rollout_importance_sampling_mode": mode,
            "rollout_importance_sampling_threshold": 1.5,
            "rollout_importance_sampling_min": 0.7,
        }
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    ),
)


def is_exact_there(keys: dict[str, Any]) -> bool:
    """Return whether TRL's sequence level computes what is meant.

    It weighs KL by the ratio of the sequence, and spreads the weights of tokens over all of them.
    """
    if keys["importance_sampling_level"] == "token":
        return True
    mode = keys.get("rollout_importance_sampling_mode", "sequence_mask")
    tokens = mode.startswith("token") or "top_entropy_quantile" in keys
    return not tokens and not keys.get("use_bias_correction_kl")


def same(first: tuple[float, list[np.ndarray]], second: tuple[float, list[np.ndarray]]) -> bool:
    return bool(
        np.isclose(first[0], second[0], rtol=1e-6, atol=1e-7)
        and all(np.allclose(a, b, 1e-6, 1e-7) for a, b in zip(first[1], second[1], strict=True))
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients_are_trls(loss: str, theirs: dict[str, Callable[..., Any]]) -> None:
    compared = 0
    for seed, level, more in itertools.product(range(3), ("token", "sequence"), MORE):
        keys = {"loss_type": loss, "importance_sampling_level": level, **LIMITS[loss], **more}
        if not is_exact_there(keys):
            continue
        batch = [s for s in random_batch(seed, [4, 2, 7, 1, 5]) if s.trains]
        ours = computed(batch, keys)[:2]
        assert same(ours, trl_loss(theirs, batch, keys)), (seed, keys)
        compared += 1
    assert compared == 3 * (len(MORE) + 6)


def test_control_another_key_on_one_side_is_found(theirs: dict[str, Callable[..., Any]]) -> None:
    batch = random_batch(1, [4, 2])
    keys = {"loss_type": "grpo", "importance_sampling_level": "token", **LIMITS["grpo"]}
    for change in (
        {"loss_type": "dapo"},
        {"importance_sampling_level": "sequence"},
        {"epsilon_high": 0.05},
        {"beta": 0.01},
        MORE[-4],
    ):
        assert not same(computed(batch, keys)[:2], trl_loss(theirs, batch, keys | change)), change
