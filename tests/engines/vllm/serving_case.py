"""A served vLLM in its event loop, checkpoints that it can be compared with, and the comparison."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moe_replay.engines.types import Request, RolloutGroup, SamplingParams
from moe_replay.testing.tiny_models import write_tiny_checkpoint

SAMPLING = SamplingParams(max_completion_length=20, temperature=0.8, seed=5)
SHAPE = {"num_hidden_layers": 3, "mlp_only_layers": [1], "max_position_embeddings": 512}


class Served:
    """A started engine and the loop that it lives in."""

    def __init__(self, runner: asyncio.Runner, engine, folder: Path) -> None:
        self.run, self.engine, self._folder, self._count = runner.run, engine, folder, 0

    def sample(self, requests: list[Request], sampling: SamplingParams = SAMPLING):
        """Return the groups of all requests, sampled together."""

        async def everything():
            calls = [self.one(request, n, sampling) for request in requests for n in range(2)]
            return await asyncio.gather(*calls)

        done = iter(self.run(everything()))
        return [RolloutGroup(request=r, completions=(next(done), next(done))) for r in requests]

    def one(self, request: Request, number: int, sampling: SamplingParams, progress=lambda n: None):
        return self.engine.complete(request, number, sampling, policy_version=3, progress=progress)

    def folder(self, *files: dict[str, torch.Tensor]) -> Path:
        """Return a new push of these files."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        for number, tensors in enumerate(files):
            save_file(tensors, folder / f"model-{number:05d}.safetensors")
        return folder

    def push(self, weights: dict[str, torch.Tensor]) -> Path:
        """Stage and apply all weights, in two files."""
        names = sorted(weights)
        folder = self.folder(*({n: weights[n] for n in names[part::2]} for part in range(2)))

        async def both():
            await self.engine.stage(folder)
            await self.engine.apply(folder)

        self.run(both())
        return folder

    def workers(self, method: str, *arguments) -> list:
        """Call a method in the workers of the first replica."""
        return self.run(self.engine._replicas[0].workers(method, *arguments))


def write_checkpoints(root: Path, **shape: object) -> dict[str, Path]:
    """Write two checkpoints that differ in every weight."""
    return {
        name: write_tiny_checkpoint(root / name, seed=seed, **SHAPE, **shape)
        for name, seed in (("a", 0), ("b", 1))
    }


@contextmanager
def faulty_processes() -> Iterator[None]:
    """Let vLLM's processes import the faulty worker, and leave their threads unbound."""
    from moe_replay.engines.vllm import serving as vllm_async

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setattr(vllm_async, "PUSH_WORKER", "worker_case.FaultyWorker")
        yield


def start(runner: asyncio.Runner, path: Path, folder: Path, **options: object) -> Served:
    from moe_replay.engines.vllm.serving import VllmServing

    sizes = {"dtype": "float32", "max_batch_size": 16, "kv_cache_gib": 0.05}
    engine = VllmServing(path, **sizes | options)
    runner.run(engine.start())
    return Served(runner, engine, folder)


def prompts(count: int, *, seed: int = 0) -> list[Request]:
    """Return requests that start alike, so that later ones are answered from the prompt cache."""
    rng = np.random.default_rng(seed)
    head = rng.integers(4, 100, 40)
    return [
        Request(
            request_id=number,
            prompt_ids=np.concatenate([head, rng.integers(4, 100, 5)]).astype(np.int32),
            num_generations=2,
        )
        for number in range(count)
    ]


def gap(ours: list[RolloutGroup], theirs: list[RolloutGroup]) -> float:
    """Return the largest log-probability gap, infinite where tokens, routes or reasons differ."""
    gaps = [0.0]
    for a, b in zip(ours, theirs, strict=True):
        for mine, other in zip(a.completions, b.completions, strict=True):
            if (
                mine.token_ids.tolist() != other.token_ids.tolist()
                or mine.finish_reason != other.finish_reason
                or (np.sort(mine.trace.expert_ids) != np.sort(other.trace.expert_ids))[:-1].any()
            ):
                return float("inf")
            gaps.append(np.abs(mine.rollout_logprobs - other.rollout_logprobs).max())
    return max(gaps)
