"""The formulas against what torch hands out on the CPU, and formulas with a term left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moe_replay.plan.trainer.kernels import CPU
from moe_replay.plan.trainer.settings import AdamStorage, Settings
from moe_replay.plan.trainer.training import trainer_bytes
from moe_replay.recipe.sections.training import MegatronSection
from moe_replay.testing.layouts import layout
from moe_replay.testing.planned import CASES, Compared, compare

# The padding of shared buffers differs by a few hundred bytes between ranks.
MAX_HELD_FRAC = {"weights": 0.0, "gradients": 0.0, "optimizer": 1e-3}
MAX_ERROR_FRAC = 0.1


def update_of(rows: list[Compared]) -> Compared:
    (found,) = [row for row in rows if row.what == "update"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_held_is_exact_and_peaks_are_near(tmp_path, name):
    for row in compare(tmp_path, CASES[name]):
        limit = MAX_HELD_FRAC.get(row.what, MAX_ERROR_FRAC)
        assert abs(row.error_frac) <= limit, row


@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("plain", {"gated_copies": 0, "weighted_copies": 0}),
        ("plain", {"normed_projection": 0, "core_queries_keys": 0}),
        ("full recompute", {"dispatch_copies": 0}),
        ("latent attention", {"keeps_attention_weights": False}),
    ],
)
def test_formulas_without_a_term_are_far_off(tmp_path, name, term: dict[str, Any]):
    rows = compare(tmp_path, CASES[name], replace(CPU, **term))
    assert update_of(rows).error_frac < -MAX_ERROR_FRAC


def test_formulas_without_recomputation_are_far_off(tmp_path):
    """The policy recomputes, the plan is told that it does not."""
    planned = update_of(compare(tmp_path, CASES["plain"])).planned
    measured = update_of(compare(tmp_path, CASES["full recompute"])).measured
    assert planned > 2 * measured


def test_a_stage_holds_what_it_sent_while_it_scores_the_next_microbatch(shape):
    model = shape("qwen3-30b-a3b")

    def scoring(num_microbatches: int) -> list[float]:
        settings = Settings(
            num_ranks=2,
            megatron=MegatronSection(**layout(pp=2).model_dump()),
            dtype_bytes=2,
            adam=AdamStorage(dtype_bytes=4),
            max_tokens=1024,
            max_sequence_length=1024,
            num_microbatches=num_microbatches,
        )
        stages = trainer_bytes(model, settings, [range(24), range(24, 48)], CPU)
        return [stage.scoring.activations for stage in stages]

    (first, last), (alone, last_alone) = scoring(2), scoring(1)
    assert first - alone == 1024 * model.hidden_size * 2
    assert last == last_alone
