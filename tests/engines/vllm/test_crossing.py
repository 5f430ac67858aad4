"""Pushes that meet completions under way in a real vLLM: which tokens are of which weights.

What a version must have sampled and routed is computed without the server: transformers runs the
whole sequence under each checkpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_replay.checkpoint.facts import checkpoint_tensors, read_facts
from moe_replay.engines.checks import check_group
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.recording import GivenTokens, record_given
from moe_replay.engines.servers.engine import ServerEngine
from moe_replay.engines.types import (
    Completion,
    FinishReason,
    Request,
    RolloutGroup,
    SamplingParams,
)
from moe_replay.errors import RecipeError
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from ...support.served import ServerProcess
from ...support.served import served as serve_here
from .serving_case import SHAPE, Served, faulty_processes, prompts, start, write_checkpoints

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]
# Above 1, so that random weights hardly ever draw the end.
LONG = SamplingParams(max_completion_length=200, temperature=1.5, seed=4)
# Tokens that some completion has when the push comes.
AT = 40


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("crossing"))


@pytest.fixture(scope="module")
def engine(vllm_imported, checkpoints, tmp_path_factory) -> Iterator[Served]:
    with faulty_processes(), asyncio.Runner() as runner:
        served = start(runner, checkpoints["a"], tmp_path_factory.mktemp("pushes"))
        yield served
        runner.run(served.engine.close())


def crossed(
    served: Served,
    requests: list[Request],
    folder: Path,
    *,
    to: int = 4,
    sampling: SamplingParams = LONG,
) -> list[RolloutGroup]:
    """Sample under version 3, and push once some completion has `AT` tokens."""
    opened, grown = asyncio.Event(), asyncio.Event()

    async def across() -> int:
        await opened.wait()
        return to

    async def push() -> None:
        await served.engine.stage(folder)
        await grown.wait()
        await served.engine.interrupt()
        await served.engine.apply(folder)
        opened.set()

    async def everything() -> list[Completion]:
        calls = [
            served.engine.complete(
                request,
                number,
                sampling,
                policy_version=3,
                progress=lambda count: grown.set() if count >= AT else None,
                across=across,
            )
            for request in requests
            for number in range(2)
        ]
        *completions, _ = await asyncio.gather(*calls, push())
        return completions

    done = iter(served.run(everything()))
    return [RolloutGroup(request=r, completions=(next(done), next(done))) for r in requests]


def num_older(group: RolloutGroup, completion: Completion) -> int:
    """Return the tokens of the first of two versions, by the spans of its rows."""
    assert completion.trace is not None
    first, second = completion.trace.origin.spans
    assert (first.start, first.stop, second.stop) == (0, second.start, len(completion.trace))
    # The row that sampled the last token of the older version is its last one.
    return first.stop - len(group.request.prompt_ids) + 1


def logprobs_of(checkpoint: Path, group: RolloutGroup, completion: Completion) -> np.ndarray:
    """Return the log-probabilities of a completion's tokens under a checkpoint."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    sequence = torch.from_numpy(group.request.sequence(completion.token_ids)).long()
    with torch.inference_mode():
        logits = model(sequence[None]).logits[0] / LONG.temperature
    start = len(group.request.prompt_ids)
    every = torch.log_softmax(logits[start - 1 : -1].double(), dim=-1)
    return every.gather(1, sequence[start:, None])[:, 0].numpy()


def sets_of(checkpoint: Path, group: RolloutGroup, completion: Completion) -> np.ndarray:
    """Return the expert sets of all rows but the last under a checkpoint."""
    given = GivenTokens(name="0", token_ids=group.request.sequence(completion.token_ids))
    ((_, trace),) = record_given(EmbeddedEngine(checkpoint, dtype="float32"), [given])
    return np.sort(trace.expert_ids[:-1])


def test_tokens_rows_and_log_probabilities_are_those_of_their_spans(engine, checkpoints):
    weights = load_file(checkpoints["b"] / "model.safetensors")
    groups = crossed(engine, prompts(3), engine.folder(weights))
    met = [
        (group, completion)
        for group in groups
        for completion in group.completions
        if completion.began_under is not None
    ]
    assert len(met) >= 4
    for group in groups:
        check_group(group, engine.engine.description)
    for group, completion in met:
        assert (completion.began_under, completion.policy_version) == (3, 4)
        k, prompt = num_older(group, completion), len(group.request.prompt_ids)
        assert AT // 2 < k < len(completion.token_ids)
        under = {name: logprobs_of(path, group, completion) for name, path in checkpoints.items()}
        ours = completion.rollout_logprobs
        assert np.abs(ours[:k] - under["a"][:k]).max() < 1e-4
        assert np.abs(ours[k:] - under["b"][k:]).max() < 1e-4
        # Controls: the weights can be told apart on either side, next to the border too.
        assert np.abs(ours[:k] - under["b"][:k]).max() > 0.1
        assert np.abs(ours[k:] - under["a"][k:]).max() > 0.1
        routes = np.sort(completion.trace.expert_ids[:-1])
        sets = {name: sets_of(path, group, completion) for name, path in checkpoints.items()}
        border = prompt + k - 1
        assert (routes[:border] == sets["a"][:border]).all()
        assert (routes[border:] == sets["b"][border:]).all()
        assert (routes[:border] != sets["b"][:border]).any(axis=(1, 2)).mean() > 0.5
        assert (routes[border] != sets["a"][border]).any()
    engine.push(load_file(checkpoints["a"] / "model.safetensors"))


def test_a_push_of_the_same_weights_changes_no_token(engine, checkpoints):
    """The noise of a completion goes on behind the tokens that were sampled before the push."""
    same = load_file(checkpoints["a"] / "model.safetensors")
    sampling = replace(LONG, top_k=40, keeps_candidates=True)
    calm = engine.sample(prompts(3), sampling)
    groups = crossed(engine, prompts(3), engine.folder(same), sampling=sampling)
    assert any(c.began_under is not None for group in groups for c in group.completions)
    for ours, theirs in zip(groups, calm, strict=True):
        for mine, other in zip(ours.completions, theirs.completions, strict=True):
            assert mine.token_ids.tolist() == other.token_ids.tolist()
            assert mine.finish_reason == other.finish_reason
            assert np.abs(mine.rollout_logprobs - other.rollout_logprobs).max() < 1e-4
            # What tokens were drawn from goes on behind theirs too, on both sides of the push.
            assert mine.candidates.counts.tolist() == [40] * len(mine.token_ids)
            assert mine.candidates.ids.tolist() == other.candidates.ids.tolist()


def test_control_noise_that_begins_again_gives_other_tokens(
    engine, checkpoints, monkeypatch: pytest.MonkeyPatch
):
    from moe_replay.engines.vllm import sampler

    asked_of = sampler.asked_of

    def forgetful(*asked, num_before: int):
        prompt, params = asked_of(*asked, num_before=num_before)
        params.extra_args[sampler.KEY]["num_before"] = 0
        return prompt, params

    monkeypatch.setattr(sampler, "asked_of", forgetful)
    same = load_file(checkpoints["a"] / "model.safetensors")
    calm = engine.sample(prompts(3), LONG)
    groups = crossed(engine, prompts(3), engine.folder(same))
    for ours, theirs in zip(groups, calm, strict=True):
        for mine, other in zip(ours.completions, theirs.completions, strict=True):
            if mine.began_under is not None:
                assert mine.token_ids.tolist() != other.token_ids.tolist()


def test_what_may_not_cross_is_not_continued(engine, checkpoints):
    """Control: without ``across`` an interrupted completion ends as aborted."""

    async def everything() -> Completion:
        grown = asyncio.Event()
        call = asyncio.create_task(
            engine.engine.complete(
                prompts(1)[0], 0, LONG, policy_version=3, progress=lambda count: grown.set()
            )
        )
        await grown.wait()
        await engine.engine.interrupt()
        return await call

    completion = engine.run(everything())
    assert completion.finish_reason.value == "aborted"
    assert len(completion.token_ids) < LONG.max_completion_length


OPTIONS = ["--dtype", "float32", "--kv-cache-gib", "0.1", "--max-batch-size", "16"]
MAX_LENGTH = 1 << 15
ENDLESS = SamplingParams(max_completion_length=MAX_LENGTH - 100, temperature=1.0, seed=4)


@contextmanager
def client(url: str, checkpoint: Path, *, crosses: bool) -> Iterator[ServerEngine]:
    engine = ServerEngine(
        [url],
        facts=read_facts(checkpoint),
        run="test",
        dtype="float32",
        record_routes=True,
        crosses_pushes=crosses,
    )
    with closing(engine):
        yield engine


def write_endless(root: Path) -> tuple[Path, Path]:
    """Write two checkpoints: the first never samples the end, the second samples nothing else.

    One channel of every embedding is so large that it is the same in every final state, and the
    end's logit reads that channel alone.
    """
    models = tuple(
        write_tiny_checkpoint(root / name, **SHAPE | {"max_position_embeddings": MAX_LENGTH})
        for name in ("endless", "ending")
    )
    for model, logit in zip(models, (-100.0, 100.0), strict=True):
        weights = load_file(model / "model.safetensors")
        weights["model.embed_tokens.weight"][:, 0] = 1000.0
        (end,) = read_facts(model).eos_ids
        weights["lm_head.weight"][end] = 0.0
        weights["lm_head.weight"][end, 0] = logit
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return models[0], models[1]


def pushed_at_work(
    engine: ServerEngine, requests: list[Request], sampling: SamplingParams, model: Path
) -> list[Completion]:
    """Return completions that a server has begun to sample when ``model`` is pushed."""
    with ThreadPoolExecutor(1) as thread:
        work = thread.submit(engine.generate, requests, sampling)
        while not work.done() and not engine.progress.num_tokens:
            wait([work], timeout=0.01)
        engine.load_weights(checkpoint_tensors(model), policy_version=1)
        return [c for group in work.result() for c in group.completions]


def test_a_push_does_not_wait_for_the_completions_of_a_server(tmp_path):
    endless, ending = write_endless(tmp_path)
    with ServerProcess(endless, *OPTIONS) as server:
        server.wait()
        with client(server.url, endless, crosses=True) as engine:
            engine.restore(endless)
            crossed = pushed_at_work(engine, prompts(2), ENDLESS, ending)
        # The push let them end.
        assert {c.finish_reason for c in crossed} == {FinishReason.STOP}
        assert max(len(c.token_ids) for c in crossed) < ENDLESS.max_completion_length
        # One that had not begun is of the new weights alone.
        versions = {(c.oldest_version, c.policy_version) for c in crossed}
        assert (0, 1) in versions and versions <= {(0, 1), (1, 1)}
        # The control: a push that may not cross waits for them, and they are of one version.
        with client(server.url, endless, crosses=False) as engine:
            engine.restore(endless)
            waited = pushed_at_work(engine, prompts(2), replace(LONG, temperature=1.0), ending)
        assert {(c.oldest_version, c.policy_version) for c in waited} == {(0, 0)}
        assert {len(c.token_ids) for c in waited} == {LONG.max_completion_length}


def test_a_server_that_cannot_is_refused(checkpoints):
    with (
        serve_here(EmbeddedEngine(checkpoints["a"], dtype="float32")) as url,
        pytest.raises(RecipeError, match="push_in_flight needs servers of `moe-replay serve` with"),
        client(url, checkpoints["a"], crosses=True),
    ):
        pass
