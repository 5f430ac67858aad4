"""Short runs of TRL on the demo's model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHECKPOINT = Path(__file__).parents[2] / "recipes/demo/model"
# Questions of several lengths, so that prompts are padded.
QUESTIONS = [" + ".join(str((n * 7 + k) % 10) for k in range(2 + n % 4)) for n in range(16)]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


def pays_odd_sums(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward what differs within a group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


@pytest.fixture(scope="session")
def trainer_of(tokenizer, tmp_path_factory) -> Callable[..., Any]:
    """Return a function that makes a trainer of ``kind``; ``changes`` are TRL's settings."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig

    folder = tmp_path_factory.mktemp("trl")

    def make(kind: type, changes: dict[str, Any] | None = None, **options: Any) -> Any:
        dtype = options.pop("dtype", torch.float32)
        model = options.pop("model", None) or AutoModelForCausalLM.from_pretrained(
            CHECKPOINT, dtype=dtype
        )
        settings = {
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "max_completion_length": 16,
            "max_steps": 1,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "router_aux_loss_coef": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "seed": 3,
        }
        return kind(
            model=model,
            processing_class=tokenizer,
            reward_funcs=pays_odd_sums,
            train_dataset=Dataset.from_list([{"prompt": text} for text in QUESTIONS]),
            args=GRPOConfig(**(settings | (changes or {}))),
            **options,
        )

    return make
