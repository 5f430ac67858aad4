"""Bytes of candidates are those that the trainer uploads, and a plan says what bounds them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_replay.megatron.logprobs import _VocabularyLimits
from moe_replay.plan.machine import read_machine
from moe_replay.plan.plan import Plan, make_plan
from moe_replay.plan.trainer.candidates import candidate_bytes
from moe_replay.plan.trainer.settings import AdamStorage, Settings
from moe_replay.recipe.sections.training import MegatronSection
from moe_replay.routing.candidates import Candidates

SETTINGS = Settings(
    num_ranks=1,
    megatron=MegatronSection(),
    adam=AdamStorage(dtype_bytes=4),
    max_tokens=6,
    max_sequence_length=6,
)


def planned(recipe, **rollout) -> Plan:
    keys = {"engine": "vllm-server", "urls": ["http://127.0.0.1:1"], "max_completion_length": 7168}
    changed = recipe(rollout=keys | rollout)
    return make_plan(changed, read_machine(["gpus=8x80GB", "servers=8x80GB"]))


def test_a_token_takes_what_is_uploaded_for_it():
    layer = SimpleNamespace(output_size_per_partition=50, tp_group=SimpleNamespace(rank=lambda: 0))
    sets = [np.arange(number, number + 5) for number in range(6)]
    limits = _VocabularyLimits.of(Candidates.of_sets(sets, [0.9] * 6), layer, torch.device("cpu"))
    uploaded = sum(each.nbytes for each in (limits.rows, limits.words, limits.limited))
    assert uploaded == candidate_bytes(SETTINGS, 5) == 6 * (5 * 16 + 8)
    # The control: one more candidate of one token is one more that is uploaded.
    sets[2] = np.arange(6)
    limits = _VocabularyLimits.of(Candidates.of_sets(sets, [0.9] * 6), layer, torch.device("cpu"))
    assert limits.rows.nbytes + limits.words.nbytes + limits.limited.nbytes == uploaded + 16


def test_context_parallel_ranks_hold_the_candidates_of_their_own_rows():
    cut = replace(SETTINGS, megatron=MegatronSection(context_parallel_size=2))
    assert candidate_bytes(cut, 5) == candidate_bytes(SETTINGS, 5) / 2


def test_top_k_bounds_them_and_they_are_in_the_sums(recipe):
    plain, limited = planned(recipe), planned(recipe, top_k=20)
    assert "candidates" not in plain.assumptions()
    assert "rollout.top_k = 20" in limited.assumptions()["candidates"]
    before, after = (
        next(phase for phase in plan.memory.phases if phase.name == "update")
        for plan in (plain, limited)
    )
    # 16,384 tokens by hand, and a tenth for what is not modelled.
    assert after.parts["candidates"] == 16384 * (20 * 16 + 8)
    assert after.total - before.total == pytest.approx(1.1 * 16384 * 328)


def test_only_the_last_stage_holds_them(recipe):
    keys = {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 4}
    rollout = {"engine": "vllm-server", "urls": ["http://127.0.0.1:1"], "top_k": 20}
    changed = recipe(rollout=rollout | {"max_completion_length": 7168}, megatron=keys)
    plan = make_plan(changed, read_machine(["gpus=8x80GB", "servers=8x80GB"]))
    for phase in plan.memory.phases:
        assert ("candidates" in phase.parts) <= (phase.stage == 1)


@pytest.mark.parametrize("limit", [{"top_p": 0.9}, {"min_p": 0.05}])
def test_what_nothing_bounds_is_in_no_sum_and_is_said(recipe, limit):
    plain, limited = planned(recipe), planned(recipe, **limit)
    assert limited.memory.peak == plain.memory.peak
    said = limited.assumptions()["candidates"]
    # 16,384 x (100 x 16 + 8) and 16,384 x (151,936 x 16 + 8) bytes.
    assert "100 a token are 26.3 MB" in said and "all 151936 would be 39.8 GB" in said
