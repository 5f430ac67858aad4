"""Calls to one SGLang server, over SGLang's own HTTP API; weights are pushed as files that the server reads.

In: a URL, requests, weights. Out: groups, statuses; `CallError` for whatever goes wrong. Called by: rollout.server_engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_replay.errors import EngineError, RecipeError, TraceError
from moe_replay.rollout.http_calls import CallError, Fault
from moe_replay.rollout.plain_calls import PlainCalls
from moe_replay.rollout.server_contract import check_policy, join_groups
from moe_replay.rollout.server_messages import PROTOCOL, PolicyName, Status
from moe_replay.rollout.sglang_wire import (
    FLAG,
    generate_message,
    read_completion,
    read_description,
)
from moe_replay.rollout.types import (
    Completion,
    EngineDescription,
    Request,
    RolloutGroup,
    SamplingParams,
)
from moe_replay.rollout.weight_names import read_policy, weight_version

# A temperature at which the most likely token loses its lead over chance, and the least lead, in nats, that shows this.
_FLAT, _LEAST_LEAD = 100.0, 0.1


class SglangCalls(PlainCalls):
    """One SGLang server. Threads may call it at the same time.

    What is sampled depends on the server's noise: only one with ``--enable-deterministic-inference`` gives equal completions
    for equal seeds.
    """

    how_to_record: str = (
        f"it was started without {FLAG}, or its model has no routers; start it with that flag"
    )

    def status(self) -> Status:
        """Return what the server is and which weights it holds.

        Raises:
            RecipeError: when it refuses the token, is no SGLang server, or one that cannot return the routes of its tokens.
            CallError: when it does not answer.
        """
        if not self.has("/server_info") or not self.has("/model_info"):
            raise RecipeError(
                f"{self.url} answers, but knows no /server_info and /model_info; start an SGLang server there: "
                f"`python -m sglang.launch_server --model-path MODEL {FLAG}`"
            )
        description = read_description(self.call_json("GET", "/server_info"), self._facts, self.url)
        return Status(protocol=PROTOCOL, description=description, policy=self._policy())

    def check(self) -> None:
        """Try out how the server reports log-probabilities, and whether its routes fit the model.

        Raises:
            RecipeError: when log-probabilities ignore the temperature, or routes do not fit.
            CallError: when it does not answer.
        """
        description = self.status().description
        best = []
        for temperature in (1.0, _FLAT):
            sampling = SamplingParams(max_completion_length=1, temperature=temperature, top_k=1)

            def sample(request: Request, sampling: SamplingParams = sampling) -> Completion:
                (completion,), _ = self._complete([request], sampling, description)
                return completion

            best.append(float(self.try_out(sample).rollout_logprobs[0]))
        lead = best[0] + math.log(self._facts.vocab_size)
        if lead > _LEAST_LEAD and best[0] - best[1] < lead / 2:
            raise RecipeError(
                f"{self.url} gives the most likely token the log-probability {best[0]:.3f} at temperature 1 and "
                f"{best[1]:.3f} at {_FLAT:.0f}, expected a fall: its log-probabilities ignore the temperature, which the "
                "trainer's do not; start it without SGLANG_RETURN_ORIGINAL_LOGPROB"
            )

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        *,
        policy: PolicyName,
        description: EngineDescription,
    ) -> list[RolloutGroup]:
        """Return completions that keep the contract of every engine, sampled by exactly the weights of ``policy``.

        Raises:
            EngineError: when the server refuses the requests themselves.
            CallError: for every other failure.
        """
        completions, answered = self._complete(requests, sampling, description)
        groups = join_groups(requests, completions, description=description, url=self.url)
        for name in answered:
            check_policy(name, policy, self.url)
        return groups

    def commit_weights(self, policy: PolicyName) -> None:
        """Let the server load the files that it was given, as ``policy``, and empty its cache.

        Raises:
            EngineError: when it cannot read them, they are not those of its model, or it keeps cached prompts of the last
                policy.
            CallError: when it does not answer.
        """
        assert self._pushed is not None
        message = {
            "model_path": str(self._pushed),
            "load_format": "safetensors",
            "weight_version": weight_version(policy),
            "flush_cache": True,
        }
        told = self.call_json("POST", "/update_weights_from_disk", message)
        if not isinstance(told, dict) or told.get("success") is not True:
            raise EngineError(
                f"{self.url} did not take policy version {policy.policy_version}: {told}"
            )
        self.call("POST", "/flush_cache")
        held = self._policy()
        if held != policy:
            raise CallError(
                Fault.STALE,
                f"{self.url} holds {held} after it was pushed {policy}; another trainer pushes to it",
            )

    def _policy(self) -> PolicyName:
        told = self.call_json("GET", "/model_info")
        if not isinstance(told, dict) or "weight_version" not in told:
            raise RecipeError(
                f"{self.url}/model_info holds no weight_version; it is no SGLang server of a known release"
            )
        return read_policy(told["weight_version"])

    def _complete(
        self, requests: Sequence[Request], sampling: SamplingParams, description: EngineDescription
    ) -> tuple[tuple[Completion, ...], list[PolicyName]]:
        """Return the completions of all requests, and the weights that each was sampled with."""
        message = generate_message(
            requests,
            sampling,
            eos_ids=self._facts.eos_ids,
            record_routes=description.records_routes,
        )
        answers = self.call_json("POST", "/generate", message)
        asked = [(r, number) for r in requests for number in range(r.num_generations)]
        if not isinstance(answers, list) or len(answers) != len(asked):
            raise CallError(
                Fault.CORRUPT,
                f"{self.url}: {len(answers) if isinstance(answers, list) else type(answers).__name__} completions, asked for "
                f"{len(asked)}",
            )
        try:
            read = [
                read_completion(
                    answer,
                    request,
                    sampling,
                    facts=self._facts,
                    description=description,
                    where=f"{self.url}: request {request.request_id}, completion {number}",
                )
                for answer, (request, number) in zip(answers, asked, strict=True)
            ]
        except (TraceError, EngineError) as error:
            raise CallError(Fault.CORRUPT, str(error)) from error
        return tuple(completion for completion, _ in read), [policy for _, policy in read]
