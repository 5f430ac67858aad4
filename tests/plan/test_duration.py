"""Operations behind the seconds of a step, by hand."""

from __future__ import annotations

import pytest

from moe_replay.plan.duration import Work


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 48 layers of 32 heads: a product with keys of 128, one with values of 128.
        ("qwen3-30b-a3b", 2 * 48 * 32 * (128 + 128)),
        # 61 layers of 128 heads: keys of 128 + 64 rotated, values of 128.
        ("deepseek-v3", 2 * 61 * 128 * (192 + 128)),
    ],
)
def test_operations_of_attention(shape, name, expected):
    assert Work.of(shape(name)).attention == expected
