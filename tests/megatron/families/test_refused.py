"""Every MoE family of transformers is trained, or refused with what Megatron-Core lacks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.families.refused import REFUSED
from moe_replay.megatron.families.rules import FAMILIES
from moe_replay.megatron.model import read_model_shape
from moe_replay.testing.moe_families import MOE_FAMILIES

PAGE = Path(__file__).parents[3] / "docs" / "megatron.md"


def table() -> str:
    """Return the rows of the page: a reason, and the families that it refuses."""
    by_reason: dict[str, list[str]] = {}
    for family, reason in REFUSED.items():
        by_reason.setdefault(reason, []).append(f"`{family}`")
    return "\n".join(f"| {', '.join(sorted(f))} | {why} |" for why, f in by_reason.items())


def test_every_moe_family_of_transformers_is_trained_or_refused_by_name():
    assert sorted(set(MOE_FAMILIES) - FAMILIES.keys() - REFUSED.keys()) == []
    assert FAMILIES.keys() & REFUSED.keys() == set()


@pytest.mark.parametrize("family", ["qwen3_next", "granitemoe", "lfm2_moe"])
def test_a_refused_family_is_told_what_is_missing(tmp_path, family):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=re.escape(REFUSED[family])):
        read_model_shape(tmp_path)


def test_the_page_lists_every_refused_family_with_its_reason():
    assert table() in PAGE.read_text(), "docs/megatron.md should have these rows:\n" + table()
