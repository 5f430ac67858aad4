"""One vLLM over two ranks gives each rank what an engine of its own would have given it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Engine, Request, SamplingParams
from moe_replay.errors import EngineError, RecipeError
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.ranks,
    pytest.mark.usefixtures("vllm_imported"),
    # vLLM gathers its logits by a function that torch is about to rename.
    pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor:FutureWarning"),
]
SAMPLING = SamplingParams(max_completion_length=12, temperature=0.9, seed=3)
TRUNCATED = replace(SAMPLING, top_p=0.9, top_k=20, keeps_candidates=True)
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    return [
        write_tiny_checkpoint(root / str(seed), seed=seed, num_hidden_layers=2) for seed in (0, 1)
    ]


def requests_of(rank: int) -> list[Request]:
    """Return a rank's requests: three prompts of the first, one of the second; lengths differ."""
    rng = np.random.default_rng(rank)
    return [
        Request(
            request_id=10 * rank + number,
            prompt_ids=rng.integers(4, 90, 5 + 3 * number).astype(np.int32),
            num_generations=2,
        )
        for number in range(3 - 2 * rank)
    ]


def open_sharded(path) -> Engine:
    from moe_replay.engines.vllm.engine import VllmEngine

    return VllmEngine(
        path, dtype="float32", max_batch_size=8, kv_cache_gib=0.05, tensor_parallel_size=2
    )


def assert_same(groups, expected) -> None:
    assert len(groups) == len(expected)
    for group, other in zip(groups, expected, strict=True):
        for mine, theirs in zip(group.completions, other.completions, strict=True):
            assert mine.token_ids.tolist() == theirs.token_ids.tolist()
            valid = mine.trace.valid
            np.testing.assert_array_equal(
                np.sort(mine.trace.expert_ids[valid]), np.sort(theirs.trace.expert_ids[valid])
            )
            np.testing.assert_allclose(
                mine.rollout_logprobs, theirs.rollout_logprobs, atol=TOLERANCE
            )


def assert_same_candidates(groups, expected) -> None:
    """Compare what each token was drawn from; the sets of two completions differ."""
    seen = set()
    for group, other in zip(groups, expected, strict=True):
        for mine, theirs in zip(group.completions, other.completions, strict=True):
            assert mine.candidates.counts.tolist() == theirs.candidates.counts.tolist()
            assert mine.candidates.ids.tolist() == theirs.candidates.ids.tolist()
            np.testing.assert_allclose(
                mine.candidates.kept_mass, theirs.candidates.kept_mass, atol=TOLERANCE
            )
            seen.add(tuple(mine.candidates.ids.tolist()))
    assert len(seen) == sum(len(group.completions) for group in groups)


def test_each_rank_gets_its_own_completions_before_and_after_a_push(checkpoints):
    def sample():
        import torch.distributed as dist

        own = requests_of(dist.get_rank())
        engine = open_sharded(checkpoints[0])
        before = engine.generate(own, SAMPLING)
        engine.load_weights(
            load_file(checkpoints[1] / "model.safetensors").items(), policy_version=1
        )
        after = engine.generate(own, SAMPLING)
        limited = engine.generate(own, TRUNCATED)
        shard = next(
            p
            for n, p in engine._vllm.model_executor.driver_worker.worker.get_model().named_parameters()
            if "qkv" in n
        )
        engine.close()
        return before, after, limited, shard.shape[0]

    results = run_ranks(sample, 2)
    for rank, (before, after, limited, shard_rows) in enumerate(results):
        for groups, checkpoint in zip((before, after), checkpoints, strict=True):
            embedded = EmbeddedEngine(checkpoint, dtype="float32")
            assert_same(groups, embedded.generate(requests_of(rank), SAMPLING))
        expected = embedded.generate(requests_of(rank), TRUNCATED)
        assert_same(limited, expected)
        assert_same_candidates(limited, expected)
        whole = load_file(checkpoints[0] / "model.safetensors")
        rows = sum(whole[f"model.layers.0.self_attn.{name}_proj.weight"].shape[0] for name in "qkv")
        assert shard_rows < rows
    # The control: the ranks asked for different things, so another rank's completions would show.
    assert len(results[0][0]) != len(results[1][0])


def test_a_request_that_one_rank_gets_wrong_ends_all_ranks(checkpoints):
    def sample():
        import torch.distributed as dist

        own = requests_of(0)
        if dist.get_rank() == 1:
            own = [Request(request_id=5, prompt_ids=np.array([10**6], np.int32), num_generations=1)]
        engine = open_sharded(checkpoints[0])
        try:
            engine.generate(own, SAMPLING)
        except EngineError as error:
            return str(error)

    messages = run_ranks(sample, 2)
    assert messages[0] == messages[1]
    assert "1000000" in messages[0]


def test_ranks_that_cannot_be_cut_into_engines_are_refused(checkpoints):
    def start():
        from moe_replay.engines.vllm.engine import VllmEngine

        VllmEngine(checkpoints[0], dtype="float32", tensor_parallel_size=3)

    with pytest.raises(RecipeError, match="a divisor of the 2 processes"):
        run_ranks(start, 2)


def test_e24_a_push_that_one_of_two_ranks_cannot_load_is_refused_by_both(checkpoints):
    """Both ranks gather each tensor, as in an export: one that stopped would hold up the other."""
    import torch
    import torch.distributed as dist

    weights = load_file(checkpoints[1] / "model.safetensors")

    def gathered(seen):
        for pair in weights.items():
            dist.all_reduce(torch.ones(1))
            seen.append(pair)
            yield pair

    def sample():
        own, engine, seen = requests_of(dist.get_rank()), open_sharded(checkpoints[0]), []
        model = engine._vllm.model_executor.driver_worker.worker.get_model()
        load = model.load_weights

        def failing(pairs):
            for number, pair in enumerate(pairs):
                if number == 5:
                    raise RuntimeError("no memory left")
                load([pair])

        if dist.get_rank() == 1:
            model.load_weights = failing
        with pytest.raises(EngineError) as refused:
            engine.load_weights(gathered(seen), policy_version=1)
        with pytest.raises(EngineError, match="the last weight push failed half-way"):
            engine.generate(own, SAMPLING)
        version, model.load_weights = engine.policy_version, load
        engine.load_weights(gathered([]), policy_version=1)
        groups = engine.generate(own, SAMPLING)
        engine.close()
        return str(refused.value), version, len(seen), groups

    results = run_ranks(sample, 2)
    embedded = EmbeddedEngine(checkpoints[1], dtype="float32")
    for rank, (message, version, num_seen, groups) in enumerate(results):
        assert "no memory left" in message
        assert (version, num_seen) == (0, len(weights))
        assert_same(groups, embedded.generate(requests_of(rank), SAMPLING))
    assert results[0][0].startswith("a weight push failed on 1 of the 2 ranks")
    assert "rank 1: EngineError" in results[0][0]


@pytest.mark.parametrize(("has_gpu", "device"), [(True, 3), (False, 0)])
def test_an_engine_of_one_rank_runs_on_the_gpu_of_its_process(monkeypatch, has_gpu, device):
    import torch

    from moe_replay.engines.vllm.ranks import own_executor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    executor = own_executor("a file")
    assert executor._distributed_args(executor) == ("a file", 0, device)
