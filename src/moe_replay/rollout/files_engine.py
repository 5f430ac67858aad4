"""The engine that samples nothing: it answers from a rollout on disk, so that a step can be trained again exactly.

In: a rollout on disk, requests. Out: completions with routes. Called by: grpo.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from moe_replay.errors import EngineError, RecipeError
from moe_replay.rollout.model_facts import ModelFacts
from moe_replay.rollout.rollout_files import RolloutFile
from moe_replay.rollout.sampling import check_sampling
from moe_replay.rollout.types import EngineDescription, Request, RolloutGroup, SamplingParams


class FilesEngine:
    """Answers each request with what was sampled for it, or refuses.

    A request is bound to its answer by its id, its prompt and the number of completions, and a trace to its tokens by their
    digest. ``allow_stale`` takes completions of another policy version than that of the weights pushed last; they keep
    their own.

    Example:
        >>> engine = FilesEngine(Path("rollouts"), facts=facts, record_routes=True)

    Raises:
        RecipeError: when the rollout does not fit the model, or holds no routes although they are asked for.
        CodecError: when it is damaged.
    """

    def __init__(
        self, path: Path, *, facts: ModelFacts, record_routes: bool, allow_stale: bool = False
    ) -> None:
        self._facts, self._allow_stale = facts, allow_stale
        self._policy_version = 0
        self._is_closed = False
        self._file = RolloutFile(path)
        recorded = self._file.manifest.engine
        self._description = replace(
            recorded, name="files", version=f"{recorded.name} {recorded.version}"
        )
        self._check_fit(record_routes)

    @property
    def description(self) -> EngineDescription:
        """What sampled these files."""
        return self._description

    @property
    def policy_version(self) -> int:
        """Weight pushes received so far."""
        return self._policy_version

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Return what was sampled for every request; the groups come back in the order of ``requests``.

        Raises:
            RecipeError: when a sampling setting is out of range, or other than that of the files; the seed may differ.
            EngineError: when a request was not sampled, or for another prompt, another number of completions or by another
                policy version.
            TraceError: when a trace is damaged, or belongs to other tokens.
        """
        self._check_open()
        check_sampling(sampling)
        sampled = self._file.manifest.sampling
        if replace(sampling, seed=0) != replace(sampled, seed=0):
            raise RecipeError(
                f"{self._file.path} was sampled with {sampled}, asked for is {sampling}: log-probabilities and lengths would "
                "be those of another setting; use the recipe that the files were written by"
            )
        return [self._answer(request) for request in requests]

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int
    ) -> None:
        """Run through ``weights``, which change nothing here, and adopt ``policy_version``.

        Raises:
            EngineError: when the version goes backwards.
        """
        self._check_open()
        if policy_version < self._policy_version:
            raise EngineError(
                f"policy_version {policy_version} was pushed after {self._policy_version}; versions count pushes"
            )
        for _ in weights:
            continue
        self._policy_version = policy_version

    def close(self) -> None:
        """Refuse further work. Calling it twice is allowed."""
        self._is_closed = True

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineError("the files engine is closed; make a new one")

    def _check_fit(self, record_routes: bool) -> None:
        recorded, routed = self._file.manifest.engine, self._facts.routed
        ours = (routed.moe_layers, routed.num_experts, routed.topk) if routed else ((), 0, 0)
        theirs = (recorded.moe_layers, recorded.num_experts, recorded.topk)
        if theirs != ours:
            raise RecipeError(
                f"{self._file.path} was sampled from a model with (MoE layers, experts, top-k) {theirs}, the recipe's has "
                f"{ours}; use the model that it was sampled from"
            )
        if record_routes and not recorded.records_routes:
            raise RecipeError(
                f"{self._file.path} holds no routes, which router_replay_mode = 'R3' replays; write it again by a recipe with "
                "that mode"
            )

    def _answer(self, request: Request) -> RolloutGroup:
        where = f"{self._file.path}: request {request.request_id}"
        try:
            group = self._file.group(request.request_id)
        except KeyError:
            known = self._file.request_ids
            raise EngineError(
                f"{where} was not sampled; the files hold {len(known)} requests, {min(known)} to {max(known)}: they have run "
                "out, or were sampled for other prompts; write more with --num-prompts, or lower run.max_steps"
            ) from None
        if not np.array_equal(group.request.prompt_ids, request.prompt_ids):
            raise EngineError(
                f"{where} was sampled for another prompt, {group.request.prompt_ids[:8].tolist()}..., asked for is "
                f"{request.prompt_ids[:8].tolist()}...; the dataset, its order (run.seed) or the tokenizer changed"
            )
        if group.request.num_generations != request.num_generations:
            raise EngineError(
                f"{where} was sampled {group.request.num_generations} times, asked for are {request.num_generations}; set "
                "rollout.num_generations to the former"
            )
        versions = {completion.policy_version for completion in group.completions}
        if versions != {self._policy_version} and not self._allow_stale:
            raise EngineError(
                f"{where} was sampled by policy version {sorted(versions)}, the trainer is at {self._policy_version}: a step "
                "is trained again from files of its own version; set rollout.allow_stale = true to train off-policy"
            )
        return group
