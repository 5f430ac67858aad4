"""vLLM with several workers, as the server drives it.

Completions, cancelling, pushes that fail half-way, its processes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from moe_replay.engines.checks import check_group
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.serve.engine import PushRefused, ServedEngine
from moe_replay.engines.types import FinishReason, RolloutGroup, SamplingParams
from moe_replay.errors import DivergedError, EngineError, RecipeError

from .serving_case import SAMPLING, Served, faulty_processes, gap, prompts, start, write_checkpoints

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def weights(checkpoints: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(path / "model.safetensors") for name, path in checkpoints.items()}


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, list[RolloutGroup]]:
    """What the embedded engine samples from each checkpoint."""
    return {
        name: EmbeddedEngine(path, dtype="float32").generate(prompts(6), SAMPLING)
        for name, path in checkpoints.items()
    }


@pytest.fixture(scope="module")
def served(vllm_imported, checkpoints, tmp_path_factory) -> Iterator[Served]:
    """One engine of two workers."""
    folder = tmp_path_factory.mktemp("pushes")
    with faulty_processes(), asyncio.Runner() as runner:
        served = start(runner, checkpoints["a"], folder, tensor_parallel_size=2)
        yield served
        runner.run(served.engine.close())


def test_two_workers_sample_what_the_embedded_engine_does(served, expected):
    groups = served.sample(prompts(6))
    assert isinstance(served.engine, ServedEngine)
    for group in groups:
        check_group(group, served.engine.description)
        assert {c.policy_version for c in group.completions} == {3}
    assert gap(groups, expected["a"]) < 1e-5


def test_progress_counts_the_tokens_of_a_long_completion(served):
    sampling = SamplingParams(max_completion_length=400, seed=1)
    seen: list[int] = []
    completion = served.run(served.one(prompts(1)[0], 0, sampling, seen.append))
    assert completion.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert seen[-1] == len(completion.token_ids)


def test_e24_pushes_there_and_back_give_what_the_pushed_weights_give(served, expected, weights):
    folders = []
    for name in ("b", "a", "b", "a"):
        folders.append(served.push(weights[name]))
        assert gap(served.sample(prompts(6)), expected[name]) < 1e-5
    # Only the last is still needed.
    assert [folder.exists() for folder in folders] == [False, False, False, True]
    # Control: the two checkpoints can be told apart.
    assert gap(expected["a"], expected["b"]) == float("inf")


def test_e24_a_push_that_one_of_two_workers_fails_goes_back_everywhere(served, expected, weights):
    served.push(weights["b"])
    before = served.sample(prompts(6))
    served.workers("replay_plant", 1, 20, 1)
    with pytest.raises(PushRefused, match=r"worker 1.*planted.*the weights before this push stay"):
        served.push(weights["a"])
    assert gap(served.sample(prompts(6)), before) == 0
    # No worker is one answer behind: each says what it was asked now.
    assert served.workers("replay_num_requests")[0] == served.workers("replay_num_requests")[1]
    served.push(weights["a"])
    assert gap(served.sample(prompts(6)), expected["a"]) < 1e-5


def test_e24_without_finishing_a_reload_the_next_push_is_ruined(served, expected, weights):
    """Why `PushWorker` finishes a reload that broke off: vLLM counts its parts for the next."""
    served.workers("replay_plant", 1, 20, 1)
    served.workers("replay_leave_torn", True)
    with pytest.raises(PushRefused):
        served.push(weights["b"])
    served.workers("replay_leave_torn", False)
    # What was never loaded holds whatever was in that memory, numbers or not.
    try:
        ruined = gap(served.sample(prompts(6)), expected["a"])
    except DivergedError:
        ruined = math.inf
    assert ruined > 0.1
    served.push(weights["a"])
    assert gap(served.sample(prompts(6)), expected["a"]) < 1e-5


def test_e24_when_going_back_fails_too_nothing_is_sampled_until_a_push(served, expected, weights):
    served.workers("replay_plant", 0, 20, 2)
    with pytest.raises(EngineError, match=r"so did going back") as caught:
        served.push(weights["b"])
    assert not isinstance(caught.value, PushRefused)
    with pytest.raises(EngineError, match=r"last weight push failed half-way"):
        served.sample(prompts(1))
    served.push(weights["a"])
    assert gap(served.sample(prompts(6)), expected["a"]) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_e23_a_push_with_one_value_that_is_not_finite_is_refused(served, expected, weights, value):
    name = "model.layers.2.mlp.experts.15.down_proj.weight"
    bad = weights["b"][name].clone()
    bad[-1, -1] = value
    with pytest.raises(DivergedError, match=rf"{name} was pushed with 1 of"):
        served.push(weights["b"] | {name: bad})
    assert gap(served.sample(prompts(6)), expected["a"]) < 1e-5


@pytest.mark.parametrize("kind", ["missing", "unknown", "shape", "damaged"])
def test_a_push_that_does_not_fit_changes_nothing(served, expected, weights, kind):
    name = "model.norm.weight"
    pushed = dict(weights["b"])
    if kind == "missing":
        del pushed[name]
    elif kind == "unknown":
        pushed["model.norm.bias"] = pushed[name].clone()
    elif kind == "shape":
        pushed[name] = pushed[name][:-1].clone()
    folder = served.folder(pushed)
    if kind == "damaged":
        (folder / "model-00000.safetensors").write_bytes(b"rubbish")
    with pytest.raises(EngineError, match=r"norm\.|not a safetensors file"):
        served.run(served.engine.stage(folder))
    with pytest.raises(EngineError, match="was not staged"):
        served.run(served.engine.apply(folder))
    assert gap(served.sample(prompts(6)), expected["a"]) < 1e-5


def test_e23_logits_that_are_not_numbers_end_a_completion_and_not_the_engine(
    served, expected, weights
):
    # Finite, and too large to multiply.
    huge = {"model.norm.weight": torch.full_like(weights["a"]["model.norm.weight"], 3e38)}
    served.push(weights["a"] | huge)
    with pytest.raises(DivergedError, match=r"request 0, completion 0.*policy version 3"):
        served.run(served.one(prompts(1)[0], 0, SAMPLING))
    served.push(weights["a"])
    assert gap(served.sample(prompts(6)), expected["a"]) < 1e-5


def test_e3_a_cancelled_completion_leaves_every_worker_and_the_others_go_on(served):
    """Eight run, four for clients that leave; going on would sample 400 tokens for each."""
    sampling = SamplingParams(max_completion_length=400, seed=2, stop_token_ids=())
    requests = prompts(8, seed=4)

    async def leave():
        first = [asyncio.Event() for _ in requests]
        tokens = [0] * len(requests)

        def count(place: int, length: int) -> None:
            tokens[place] = length
            first[place].set()

        tasks = [
            asyncio.create_task(served.one(r, 0, sampling, lambda n, p=place: count(p, n)))
            for place, r in enumerate(requests)
        ]
        await asyncio.gather(*(event.wait() for event in first))
        for task in tasks[:4]:
            task.cancel()
        left = await asyncio.gather(*tasks[:4], return_exceptions=True)
        at_leave = tokens[:4]
        (replica,) = served.engine._replicas
        running = replica.num_running
        # A step later the workers know, while the others still run.
        await _grown(tokens, 4)
        held = await replica.workers("replay_num_requests")
        rest = await asyncio.gather(*tasks[4:])
        return (
            left,
            at_leave,
            tokens[:4],
            running,
            held,
            rest,
            await replica._llm.reset_prefix_cache(),
        )

    left, at_leave, at_end, running, held, rest, is_free = served.run(leave())
    assert all(isinstance(error, asyncio.CancelledError) for error in left)
    assert at_leave == at_end
    assert running == 4
    assert held == [4, 4]
    assert max(at_leave) < min(len(c.token_ids) for c in rest)
    # vLLM empties its cache only when it has no request left.
    assert is_free


async def _grown(tokens: list[int], place: int) -> None:
    """Wait until a completion has grown twice, so that a whole step has begun and ended since."""
    for _ in range(2):
        before = tokens[place]
        while tokens[place] == before:
            await asyncio.sleep(0)


def test_a_push_while_completions_run_is_refused(served, expected, weights):
    sampling = SamplingParams(max_completion_length=400, seed=2)

    async def both():
        folder = served.folder(weights["b"])
        await served.engine.stage(folder)
        begun = asyncio.Event()
        task = asyncio.create_task(served.one(prompts(1)[0], 0, sampling, lambda n: begun.set()))
        # Its first token: all others are to come.
        await begun.wait()
        with pytest.raises(EngineError, match="1 completions are sampled"):
            await served.engine.apply(folder)
        await task

    served.run(both())
    assert gap(served.sample(prompts(6)), expected["a"]) < 1e-5


def test_e15_the_number_of_sequences_that_fit_is_said(served):
    # 0.05 GiB hold 2 (keys, values) x 3 layers x 2 heads (one a worker) x 32 x 4 bytes a token.
    per_token = 2 * 3 * 1 * 32 * 4
    blocks = int(0.05 * (1 << 30)) // (per_token * 32)
    fit = blocks * 32 // 512
    assert served.engine.capacity().startswith(f"{fit:,} sequences of 512 tokens fit")


def test_replicas_take_devices_one_after_the_other():
    from moe_replay.engines.vllm.serving import devices_of

    assert [devices_of(replica, 2, 2, 4) for replica in range(2)] == [[0, 1], [2, 3]]
    # vLLM takes the first of those that are visible, and a CPU has none.
    assert devices_of(0, 4, 1, 4) is None
    assert devices_of(1, 2, 2, None) is None
    with pytest.raises(RecipeError, match="need 6 devices, 4 are visible"):
        devices_of(0, 2, 3, 4)


def test_e25_closing_ends_what_runs_and_leaves_no_process(served):
    """The last of this module: it closes the engine of the others."""
    children = psutil.Process().children(recursive=True)
    workers = [worker for replica in served.engine._replicas for worker in replica._workers]
    assert len(workers) == 2
    assert set(workers) < set(children)
    push = served.engine._held._folder
    assert push.is_dir()

    async def close():
        begun = asyncio.Event()
        task = asyncio.create_task(served.one(prompts(1)[0], 0, SAMPLING, lambda n: begun.set()))
        await begun.wait()
        await served.engine.close()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    left = served.run(close())
    assert isinstance(left, EngineError)
    assert "was closed" in str(left)
    assert not any(worker.is_running() for worker in workers)
    assert not push.exists()
    served.run(served.engine.close())
    with pytest.raises(EngineError, match="is closed"):
        served.sample(prompts(1))
