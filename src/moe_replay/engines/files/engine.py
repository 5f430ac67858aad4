"""The engine that answers from rollouts on disk, so that a step can be trained again exactly.

In: rollouts on disk, one for each policy version; requests. Out: completions with routes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.checks import check_sampling
from moe_replay.engines.files.format import RolloutFile, find_manifests
from moe_replay.engines.lifecycle import VersionedEngine, other_model
from moe_replay.engines.types import Request, RolloutGroup, SamplingParams
from moe_replay.errors import EngineError, RecipeError


class FilesEngine(VersionedEngine):
    """Answers each request with what was sampled for it, or refuses.

    A request is bound to its answer by its id, its prompt and the number of completions, and a
    trace to its tokens by their digest. A folder may hold rollouts of several policy versions: that
    of the weights pushed last answers. If it lacks the request, ``allow_stale`` lets the newest
    older one answer, or else the oldest newer one; completions keep their own version.

    Examples:
        >>> engine = FilesEngine(Path("rollouts"), facts=facts, record_routes=True)

    Raises:
        RecipeError: when the rollouts do not fit the model or one another, or hold no routes
            although they are asked for.
        CodecError: when one is damaged or incomplete.
    """

    def __init__(
        self, path: Path, *, facts: ModelFacts, record_routes: bool, allow_stale: bool = False
    ) -> None:
        self._facts, self._allow_stale = facts, allow_stale
        self._path = path
        self._rollouts = _open_versions(path)
        first = next(iter(self._rollouts.values())).manifest.engine
        super().__init__(replace(first, name="files", version=f"{first.name} {first.version}"))
        for rollout in self._rollouts.values():
            self._check_fit(rollout, record_routes)

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Return what was sampled for every request, in the order of ``requests``.

        Raises:
            RecipeError: when a sampling setting is out of range, or other than that of the files;
                the seed may differ.
            EngineError: when a request was not sampled, or for another prompt, another number of
                completions or by another policy version.
            TraceError: when a trace is damaged, or belongs to other tokens.
        """
        self._check_state("ready")
        check_sampling(sampling)
        return [self._answer(request, sampling) for request in requests]

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int
    ) -> None:
        """Read ``weights``, which change nothing here, and adopt ``policy_version``.

        Raises:
            EngineError: when the version goes backwards.
        """
        self._check_push(policy_version)
        for _ in weights:
            continue
        self._policy_version = policy_version

    def _check_fit(self, rollout: RolloutFile, record_routes: bool) -> None:
        if difference := other_model(rollout.manifest.engine, self._facts):
            raise RecipeError(
                f"{rollout.path} was sampled from {difference}; use the model that it was sampled from"
            )
        if record_routes and not rollout.manifest.engine.records_routes:
            raise RecipeError(
                f"{rollout.path} holds no routes, which router_replay_mode = 'R3' replays; write it "
                "again by a recipe with that mode"
            )

    def _answer(self, request: Request, sampling: SamplingParams) -> RolloutGroup:
        rollout = self._choose(request.request_id)
        where = f"{rollout.path}: request {request.request_id}"
        sampled = rollout.manifest.sampling
        if replace(sampling, seed=0) != replace(sampled, seed=0):
            raise RecipeError(
                f"{rollout.path} was sampled with {sampled}, the recipe asks for {sampling}: "
                "log-probabilities and lengths would be those of other settings; use the recipe that "
                "wrote the files"
            )
        group = rollout.group(request.request_id)
        if not np.array_equal(group.request.prompt_ids, request.prompt_ids):
            raise EngineError(
                f"{where} was sampled for another prompt, {group.request.prompt_ids[:8].tolist()}..., "
                f"expected {request.prompt_ids[:8].tolist()}...; the dataset, its order (run.seed) or "
                "the tokenizer changed"
            )
        if group.request.num_generations != request.num_generations:
            raise EngineError(
                f"{where} was sampled {group.request.num_generations} times, expected "
                f"{request.num_generations}; set rollout.num_generations to the former"
            )
        versions = {completion.policy_version for completion in group.completions}
        if versions != {self._policy_version} and not self._allow_stale:
            raise EngineError(
                f"{where} was sampled by policy version {sorted(versions)}, the trainer is at "
                f"{self._policy_version}: {_STALE}"
            )
        return group

    def _choose(self, request_id: int) -> RolloutFile:
        """Return the rollout that answers a request.

        With versions 0, 2 and 5, all holding the request, and weights of version 3, that is 2 where
        stale ones are allowed.
        """
        holding = {v: rollout for v, rollout in self._rollouts.items() if request_id in rollout}
        if self._policy_version in holding:
            return holding[self._policy_version]
        if self._allow_stale and holding:
            older = [version for version in holding if version < self._policy_version]
            return holding[max(older) if older else min(holding)]
        there = "; ".join(
            f"{len(ids)} requests, {min(ids)} to {max(ids)}, of policy version {version}"
            for version, rollout in sorted(self._rollouts.items())
            for ids in [rollout.request_ids]
        )
        if holding:
            raise EngineError(
                f"{self._path}: request {request_id} was sampled by policy version {sorted(holding)}, "
                f"the trainer is at {self._policy_version}: {_STALE}. There are {there}"
            )
        raise EngineError(
            f"{self._path}: request {request_id} was not sampled; there are {there}: the prompts have "
            "run out, or are others; write more with --num-prompts, or lower run.max_steps"
        )


_STALE = (
    "a step is trained again from files of its own version; sample them with --policy-version, or "
    "set rollout.allow_stale = true to train off-policy"
)


def _open_versions(path: Path) -> dict[int, RolloutFile]:
    """Return the rollouts of a manifest or folder by policy version.

    Raises:
        RecipeError: when there is none, two are of one version, or they were sampled by engines of
            different kinds.
    """
    rollouts: dict[int, RolloutFile] = {}
    for manifest in find_manifests(path) or [path]:
        rollout = RolloutFile(manifest)
        version = rollout.manifest.policy_version
        other = rollouts.setdefault(version, rollout)
        first = next(iter(rollouts.values()))
        if other is not rollout or _kind(first) != _kind(rollout):
            clash = other if other is not rollout else first
            raise RecipeError(
                f"{path} holds {clash.path.name} and {rollout.path.name}, of policy versions "
                f"{clash.manifest.policy_version} and {version}, sampled by {_kind(clash)} and "
                f"{_kind(rollout)}; expected one engine, and each version once: name the manifest of "
                "one of them"
            )
    return rollouts


def _kind(rollout: RolloutFile) -> str:
    engine = rollout.manifest.engine
    routes = "routes" if engine.records_routes else "no routes"
    return f"{engine.name} {engine.version} in {engine.dtype} with {routes}"
