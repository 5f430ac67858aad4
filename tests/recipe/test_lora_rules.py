"""What `[lora]` goes with, and which of its keys have no effect."""

from __future__ import annotations

from typing import Any

import pytest

from ..grpo.smallest_recipe import problems_of, recipe


def test_the_scale_of_an_adapter_follows_rank_and_alpha() -> None:
    assert not recipe().lora.is_on
    assert recipe(lora={"rank": 4, "alpha": 32.0}).lora.scale == 8
    assert recipe(lora={"rank": 4, "alpha": 32.0, "rslora": True}).lora.scale == 16


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"lora": {"rank": 8, "dropout": 0.05}}, "lora.dropout: 0.05: each pass"),
        ({"lora": {"rank": 8, "target_modules": ["q_proj", "q_proj"]}}, "each projection once"),
        ({"lora": {"rank": 8, "target_modules": ["all-linear", "q_proj"]}}, "alone"),
        ({"lora": {"alpha": 16.0}}, "lora.rank is 0"),
        (
            {"lora": {"rank": 8, "export": "merged"}, "checkpoint": {"export": False}},
            "checkpoint.export is false",
        ),
        (
            {"lora": {"rank": 8}, "megatron": {"ddp": {"overlap_param_gather": True}}},
            "megatron.ddp.overlap_param_gather",
        ),
        (
            {"lora": {"rank": 4}, "model": {"grouped_experts": True, "dtype": "bfloat16"}},
            "choose a multiple of 8",
        ),
    ],
)
def test_what_adapters_do_not_go_with_is_refused(sections: dict[str, Any], said: str) -> None:
    assert said in problems_of(**sections)


def test_aligned_ranks_run_in_grouped_products() -> None:
    grouped = {"grouped_experts": True, "dtype": "float32"}
    assert recipe(lora={"rank": 4}, model=grouped).lora.rank == 4


def test_what_adapters_compute_is_part_of_what_a_run_is() -> None:
    items = recipe(lora={"rank": 8, "target_modules": ["q_proj"]}).fingerprint_items()
    assert items["lora.rank"] == 8
    assert items["lora.target_modules"] == ["q_proj"]
    # How it is exported at the end may change.
    assert "lora.export" not in items
