"""What a user's engine returns is held to the contract before anything is learned from it."""

from __future__ import annotations

import copy
import json
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.engines.types import (
    Completion,
    Engine,
    FinishReason,
    Request,
    RolloutGroup,
    SamplingParams,
)
from moe_replay.errors import DivergedError, EngineError, MoeReplayError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.loop import train
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.ranks import run_ranks

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]
Change = Callable[[Request, int, Completion], Completion]


class OwnEngine:
    """The embedded engine, with completions changed as a user's engine might return them."""

    def __init__(self, inner: Engine, change: Change) -> None:
        self.inner = inner
        self.change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Complete every request, and change every completion."""
        return [
            replace(
                group,
                completions=tuple(
                    self.change(group.request, number, completion)
                    for number, completion in enumerate(group.completions)
                ),
            )
            for group in self.inner.generate(requests, sampling)
        ]

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int
    ) -> None:
        """Pass the weights on."""
        self.inner.load_weights(weights, policy_version=policy_version)


def _train(
    recipe: Recipe, change: Change, world_size: int, own: type[OwnEngine] = OwnEngine
) -> None:
    rank = torch.distributed.get_rank()
    directory = RunDirectory(recipe.run.output_dir)
    with build_reporter(recipe, rank=rank, run_directory=directory) as reporter:
        train(
            recipe,
            process=ProcessSpec(rank=rank, world_size=world_size),
            reporter=reporter,
            make_engine=lambda r, device: own(recipe_engine(r, device), change),
        )


def run(recipe: Recipe, change: Change, *, world_size: int = 1) -> list[dict[str, Any]]:
    """Train with `OwnEngine` in processes of their own and return the lines of metrics.jsonl."""
    run_ranks(lambda: _train(recipe, change, world_size), world_size)
    return records(recipe, "metrics.jsonl")


def records(recipe: Recipe, name: str) -> list[dict[str, Any]]:
    """Return the lines of a file of the run directory."""
    return [json.loads(line) for line in (recipe.run.output_dir / name).read_text().splitlines()]


def _wide(request: Request, number: int, completion: Completion) -> Completion:
    # As an engine without our annotations does it: np.array(ids) is int64.
    wide = copy.copy(completion)
    object.__setattr__(wide, "token_ids", completion.token_ids.astype(np.int64))
    object.__setattr__(wide, "rollout_logprobs", completion.rollout_logprobs.astype(np.float64))
    return wide


@pytest.mark.parametrize("mode", ["disabled", "R2"])
def test_t3_a_run_refuses_wide_numbers_before_it_learns_from_them(
    mode: str, recipe: Recipes
) -> None:
    refused = recipe(replay__router_replay_mode=mode, run__max_steps=1)
    with pytest.raises(EngineError, match="token_ids are a 1-dimensional array of int64"):
        run(refused, _wide)
    assert not (refused.run.output_dir / "metrics.jsonl").exists()


def _later(request: Request, number: int, completion: Completion) -> Completion:
    return replace(completion, policy_version=completion.policy_version + 1)


def test_t15_a_run_refuses_completions_of_other_weights(recipe: Recipes) -> None:
    with pytest.raises(EngineError, match="policy version 1, the trainer is at 0"):
        run(recipe(run__max_steps=1), _later)


def _aborts_first(request: Request, number: int, completion: Completion) -> Completion:
    return replace(completion, finish_reason=FinishReason.ABORTED) if number == 0 else completion


def test_t15_aborted_completions_are_counted_and_not_trained_on(recipe: Recipes) -> None:
    settings = {"run__max_steps": 1, "rollout__dtype": "float32", "grpo__scale_rewards": "none"}
    aborted = recipe(**settings)
    (record,) = run(aborted, _aborts_first)
    assert record["completions/aborted_ratio"] == 0.25
    assert record["completions/filtered_ratio"] >= 0.25
    lines = records(aborted, "completions.jsonl")
    groups = [lines[start : start + 4] for start in range(0, len(lines), 4)]
    for group in groups:
        assert group[0]["advantage"] == 0.0
        finished = [line["reward"] for line in group[1:]]
        mean = sum(finished) / 3
        assert [line["advantage"] for line in group[1:]] == pytest.approx(
            [reward - mean for reward in finished]
        )
    finished = [line["reward"] for group in groups for line in group[1:]]
    assert record["reward"] == pytest.approx(np.mean(finished))


def _breaks_the_contract(completion: Completion) -> Completion:
    return replace(completion, policy_version=7)


def _fails(completion: Completion) -> Completion:
    raise EngineError("the server is gone")


def _has_a_bug(completion: Completion) -> Completion:
    raise KeyError("choices")


def _diverges(completion: Completion) -> Completion:
    broken = np.full_like(completion.rollout_logprobs, np.nan)
    return replace(completion, rollout_logprobs=broken)


@pytest.mark.parametrize(
    ("what", "during", "kind", "told"),
    [
        (_breaks_the_contract, "rollout", EngineError, "policy version 7, the trainer is at 0"),
        (_diverges, "eval", DivergedError, "rollout_logprobs are NaN"),
        (_fails, "eval", EngineError, "the server is gone"),
        (_has_a_bug, "rollout", MoeReplayError, "KeyError: 'choices'"),
    ],
)
def test_t3_what_the_engine_of_one_rank_does_is_an_error_of_all(
    what: Callable[[Completion], Completion],
    kind: type[MoeReplayError],
    told: str,
    during: str,
    recipe: Recipes,
    workspace: Path,
) -> None:
    eval_keys = {"data__eval": workspace / "train.jsonl", "data__eval_size": 2}
    failing = recipe(run__max_steps=1, **(eval_keys if during == "eval" else {}))

    def on_rank_1(request: Request, number: int, completion: Completion) -> Completion:
        return what(completion) if torch.distributed.get_rank() == 1 else completion

    def call() -> BaseException:
        try:
            _train(failing, on_rank_1, 2)
        except Exception as error:  # noqa: BLE001 - of whatever kind
            lines = traceback.format_exception(error)
            error.add_note("its own place" if what.__name__ in "".join(lines) else "")
            return error
        raise AssertionError("nothing was raised")

    other, own = run_ranks(call, 2)
    assert type(other) is kind
    assert str(other).startswith("on rank 1: ") and told in str(other)
    # The rank itself says it in full: the very error, and where it was raised.
    assert "on rank 1" not in str(own)
    assert isinstance(own, KeyError if what is _has_a_bug else kind)
    assert own.__notes__ == ["" if what in (_breaks_the_contract, _diverges) else "its own place"]


class _RefusesOnRank1(OwnEngine):
    """Breaks off the first push to rank 1 after a few of its tensors."""

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int
    ) -> None:
        """Pass the weights on, or fail."""
        if torch.distributed.get_rank() == 1:
            for _ in zip(range(3), weights, strict=False):
                pass
            raise EngineError("out of memory")
        super().load_weights(weights, policy_version=policy_version)


def test_e24_a_push_that_the_engine_of_one_rank_refuses_ends_the_run_on_all(
    recipe: Recipes,
) -> None:
    failing = recipe(run__max_steps=2)

    def call() -> BaseException:
        with pytest.raises(EngineError) as caught:
            _train(failing, lambda request, number, completion: completion, 2, _RefusesOnRank1)
        return caught.value

    other, own = run_ranks(call, 2)
    assert (str(other), str(own)) == ("on rank 1: out of memory", "out of memory")
    assert not (failing.run.output_dir / "metrics.jsonl").exists()


def _ends_before_its_first_token(
    request: Request, number: int, completion: Completion
) -> Completion:
    if number >= 2:
        return completion
    trace, length = completion.trace, len(request.prompt_ids)
    if trace is not None:
        # The engine may have fed the prompt by then, or nothing at all.
        fed = length - 1 if number == 0 else 0
        trace = replace(trace.crop(0, length), valid=np.arange(length) < fed)
    return replace(
        completion,
        token_ids=completion.token_ids[:0],
        rollout_logprobs=completion.rollout_logprobs[:0],
        trace=trace,
        finish_reason=FinishReason.ABORTED,
    )


@pytest.mark.parametrize(("mode", "world_size"), [("disabled", 1), ("R2", 1), ("R3", 1), ("R3", 2)])
def test_e16_completions_aborted_before_their_first_token_are_counted_and_dropped(
    mode: str, world_size: int, recipe: Recipes, workspace: Path
) -> None:
    aborted = recipe(
        run__max_steps=1,
        replay__router_replay_mode=mode,
        rollout__dtype="float32",
        megatron__tensor_model_parallel_size=world_size,
        # Some microbatches then hold no sampled token.
        batch__max_tokens_per_microbatch=42,
        data__eval=workspace / "train.jsonl",
        data__eval_size=2,
        # It looks at the first token, so it must never see such a completion.
        rewards=f"[{{function = '{workspace}/reward.py:likes_low_ids'}}]",
    )
    (record,) = run(aborted, _ends_before_its_first_token, world_size=world_size)
    assert record["completions/aborted_ratio"] == 0.5
    assert record["completions/unscored_ratio"] == 0.5
    assert record["completions/min_length"] == 0
    assert record["grad_norm"] > 0
    if mode == "R3":
        assert record["replay/coverage"] < 0.95
        assert record["replay/agreement"] == 1.0
    lines = records(aborted, "completions.jsonl")
    assert [line["num_tokens"] == 0 for line in lines[:4]] == [True, True, False, False]
    assert (lines[0]["reward"], lines[0]["advantage"], lines[0]["completion"]) == (None, 0.0, "")
    # A held-out prompt has one completion.
    assert all(line["eval/unscored_ratio"] == 1.0 for line in records(aborted, "eval.jsonl"))


def _all_end_before_their_first_token(
    request: Request, number: int, completion: Completion
) -> Completion:
    return _ends_before_its_first_token(request, 1, completion)


def test_e16_a_step_of_which_everything_was_aborted_at_once_goes_on(recipe: Recipes) -> None:
    (record,) = run(recipe(run__max_steps=1), _all_end_before_their_first_token)
    assert record["completions/aborted_ratio"] == record["update/num_skipped"] == 1
    assert record["replay/coverage"] == 0.0
