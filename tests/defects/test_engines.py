"""Defects of engines and of what reads them: each test would fail if the defect came back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_replay.engines.checks import check_group
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.types import Engine, Request, RolloutGroup, SamplingParams
from moe_replay.engines.vllm.wire import RoutePayload, trace_from_vllm
from moe_replay.errors import EngineError, TokenMismatchError, TraceError
from moe_replay.routing import Origin, RoutedModel
from moe_replay.testing.tiny_models import write_tiny_checkpoint
from moe_replay.transformers import record_routes

SAMPLING = SamplingParams(max_completion_length=60, temperature=0.8, seed=5)
MODEL = RoutedModel(moe_layers=(1, 2), num_decoder_layers=3, num_experts=16, topk=2)
TOKENS = np.arange(4, 46, dtype=np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Stop tokens of an untrained model end completions early; without a tokenizer there is none
    # that it samples.
    path = write_tiny_checkpoint(
        tmp_path_factory.mktemp("defects"), num_hidden_layers=3, eos_token_id=99
    )
    for file in path.glob("tokenizer*"):
        file.unlink()
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def start(checkpoint: Path, **options: object) -> Engine:
    from moe_replay.engines.vllm.engine import VllmEngine

    return VllmEngine(
        checkpoint,
        **{"dtype": "float32", "max_context_length": 160, "kv_cache_gib": 0.05, **options},
    )


@pytest.fixture(scope="module")
def roomy(vllm_imported: None, checkpoint: Path) -> Iterator[Engine]:
    engine = start(checkpoint)
    yield engine
    engine.close()


def prompts(count: int, length: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            request_id=number,
            prompt_ids=rng.integers(4, 99, length).astype(np.int32),
            num_generations=2,
        )
        for number in range(count)
    ]


def misplaced(groups: list[RolloutGroup], model: torch.nn.Module) -> tuple[int, float]:
    """Return how many routes differ from the model's own, and the largest log-probability gap."""
    num_wrong, gaps = 0, []
    for group in groups:
        for completion in group.completions:
            every = np.concatenate([group.request.prompt_ids, completion.token_ids])
            with torch.no_grad(), record_routes(model) as recorder:
                logits = model(torch.from_numpy(every).long()[None]).logits[0]
            routes, trace = recorder.take().numpy(), completion.trace
            own = np.sort(trace.expert_ids[trace.valid])
            num_wrong += int((own != np.sort(routes[trace.valid])).any(axis=-1).sum())
            scores = torch.log_softmax(logits / SAMPLING.temperature, dim=-1).numpy()
            taken = scores[np.arange(len(every) - 1), every[1:]][
                len(group.request.prompt_ids) - 1 :
            ]
            gaps.append(np.abs(taken - completion.rollout_logprobs).max())
    return num_wrong, max(gaps)


def read(rows: np.ndarray | None, *, model: RoutedModel = MODEL) -> None:
    trace_from_vllm(
        RoutePayload(completion_rows=rows),
        version="0.30.0",
        token_ids=TOKENS,
        num_prompt_tokens=8,
        model=model,
        origin=Origin.single(
            engine="vllm", engine_version="0.30.0", policy_version=0, num_rows=len(TOKENS)
        ),
        was_cut=False,
        where="request 5",
    )


def decoder_rows(num_layers: int = 3, *, dense: tuple[int, ...] = (0,)) -> np.ndarray:
    """Return possible routes of every fed token, zeros in the dense layers."""
    first = (np.arange(len(TOKENS) - 1)[:, None] * 5 + np.arange(num_layers) * 3) % 15
    rows = np.stack([first, first + 1], axis=-1).astype(np.uint8)
    rows[:, list(dense)] = 0
    return rows


def test_a11_swapped_completions_of_one_request_raise():
    engine = FakeEngine(vocab_size=100)
    (group,) = engine.generate(prompts(1, 6), replace(SAMPLING, max_completion_length=8))
    first, second = group.completions
    check_group(group, engine.description)
    swapped = (replace(first, trace=second.trace), replace(second, trace=first.trace))
    with pytest.raises(TokenMismatchError):
        check_group(replace(group, completions=swapped), engine.description)


def test_c3_physical_ids_of_a_load_balanced_engine_raise():
    # 16 logical experts on 20 physical slots: the extra ids are replicas.
    rows = decoder_rows()
    read(rows)
    rows[3, 1] = (17, 18)
    with pytest.raises(TraceError, match="18"):
        read(rows)


def test_c3_a_buffer_that_nobody_wrote_raises():
    with pytest.raises(TraceError, match="unwritten"):
        read(np.zeros_like(decoder_rows()))


def test_d8_an_engine_without_the_capture_flag_is_named():
    with pytest.raises(EngineError, match="--enable-return-routed-experts"):
        read(None)


@pytest.mark.vllm
def test_f3_preempted_requests_have_the_routes_of_their_tokens(vllm_imported, checkpoint, model):
    # Room for about three of twelve sequences, so that vLLM throws running ones out and computes
    # them anew.
    crowded = start(checkpoint, kv_cache_gib=0.0008)
    scheduler = crowded._vllm.engine_core.engine_core.scheduler
    preempted = []
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **kw: (preempted.append(1), preempt(*args, **kw))[1]
    groups = crowded.generate(prompts(6, 40), SAMPLING)
    crowded.close()
    assert len(preempted) > 0
    num_wrong, gap = misplaced(groups, model)
    assert num_wrong == 0 and gap < 1e-4


@pytest.mark.vllm
def test_f4_cached_prompts_have_the_routes_of_cold_ones(roomy, model):
    requests = prompts(3, 80)
    cold, cached = (roomy.generate(requests, SAMPLING) for _ in range(2))
    for groups in (cold, cached):
        assert misplaced(groups, model)[0] == 0


def test_f4_rows_that_the_cache_left_empty_raise():
    rows = decoder_rows()
    rows[:4] = 0
    with pytest.raises(TraceError, match=r"4 of 41 rows are unwritten.*prefix cach"):
        read(rows)


@pytest.mark.vllm
def test_f5_prompts_run_in_chunks_have_the_routes_of_whole_ones(vllm_imported, checkpoint, model):
    chunked = start(checkpoint, max_batch_size=8, max_tokens_per_forward=16)
    groups = chunked.generate(prompts(3, 80), SAMPLING)
    chunked.close()
    assert misplaced(groups, model)[0] == 0


@pytest.mark.vllm
def test_f5_misplaced_counts_rows_of_another_chunk(roomy, model):
    (group,) = roomy.generate(prompts(1, 80), SAMPLING)
    shifted = tuple(
        replace(c, trace=replace(c.trace, expert_ids=_moved(c.trace.expert_ids, 16)))
        for c in group.completions
    )
    assert misplaced([replace(group, completions=shifted)], model)[0] > 100


def test_f6_rows_of_a_draft_layer_raise():
    with pytest.raises(TraceError, match=r"4 layers, expected 3.*draft"):
        read(decoder_rows(4))


def test_f6_a_draft_layer_in_the_place_of_a_dense_one_raises():
    with pytest.raises(TraceError, match=r"layer 0 is dense.*draft"):
        read(decoder_rows(dense=()))


def _moved(expert_ids: np.ndarray, rows: int) -> np.ndarray:
    """Return the ids with every routed row that many places later, the last ones first."""
    return np.concatenate([np.roll(expert_ids[:-1], rows, axis=0), expert_ids[-1:]])
