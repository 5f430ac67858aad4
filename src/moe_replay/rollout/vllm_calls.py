"""Calls to one plain vLLM server, over vLLM's own HTTP API; weights are pushed as files that the server reads.

A server is told apart from one of `moe-replay serve` by what it answers to.

In: a URL, requests, weights. Out: groups, statuses; `CallError` for whatever goes wrong. Called by: grpo.engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

from moe_replay.errors import EngineError, RecipeError, TraceError
from moe_replay.rollout.http_calls import CallError, Fault
from moe_replay.rollout.model_facts import ModelFacts
from moe_replay.rollout.plain_calls import PlainCalls
from moe_replay.rollout.server_calls import ServerCalls
from moe_replay.rollout.server_contract import (
    RolloutServer,
    check_policy,
    join_groups,
)
from moe_replay.rollout.server_messages import PROTOCOL, PolicyName, Status
from moe_replay.rollout.types import (
    Completion,
    EngineDescription,
    Request,
    RolloutGroup,
    SamplingParams,
)
from moe_replay.rollout.vllm_http import (
    NativeServer,
    generate_message,
    read_completion,
    read_server,
)
from moe_replay.rollout.vllm_wire import FLAG
from moe_replay.rollout.weight_names import read_policy, weight_version

_LOADING = "moe-replay is loading"
_ROUTE_BYTES = 1 << 30
# Paths that a plain server has -> how it must be started to have them.
_PATHS = {
    "/version": "start a server there: `moe-replay serve MODEL`",
    "/server_info": "start it with VLLM_SERVER_DEV_MODE=1 in its environment, on an address that only trainers reach: weights "
    "are pushed that way",
    "/weight_info": "install vLLM 0.30",
    "/inference/v1/generate": "start it with --enable-scale-out",
}


def connect_vllm(
    url: str, *, token: str | None, timeout_s: float, max_answer_bytes: int, facts: ModelFacts
) -> RolloutServer:
    """Return the calls to a server of `moe-replay serve`, or to a plain vLLM server.

    Raises:
        CallError: when nothing answers.
    """
    ours = ServerCalls(url, token=token, timeout_s=timeout_s, max_answer_bytes=max_answer_bytes)
    try:
        is_plain = not ours.has("/status") and ours.has("/version")
    except BaseException:
        ours.close()
        raise
    if not is_plain:
        return ours
    ours.close()
    return VllmCalls(
        url, token=token, timeout_s=timeout_s, max_answer_bytes=max_answer_bytes, facts=facts
    )


class VllmCalls(PlainCalls):
    """One plain vLLM server. Threads may call it at the same time."""

    how_to_record: str = (
        f"it was started without {FLAG}, or its model has no routers; start it with that flag"
    )

    _server: NativeServer | None = None

    def status(self) -> Status:
        """Return what the server is and which weights it holds.

        Raises:
            RecipeError: when it refuses the token or was started without what replay needs; the message names the flag.
            CallError: when it does not answer.
        """
        if self._server is None:
            for path, remedy in _PATHS.items():
                if not self.has(path):
                    raise RecipeError(f"{self.url} is a plain vLLM server without {path}; {remedy}")
            version = self.call_json("GET", "/version")
            told = self.call_json("GET", "/server_info?config_format=json")
            self._server = read_server(version, told, self._facts, self.url)
        return Status(
            protocol=PROTOCOL, description=self._server.description, policy=self._policy()
        )

    def check(self) -> None:
        """Sample once, to see whether what comes back fits the model.

        Raises:
            RecipeError: when it does not.
            CallError: when the server does not answer.
        """
        description = self.status().description

        def sample(request: Request) -> Completion:
            completion = self._complete(
                request, 0, SamplingParams(max_completion_length=2), 0, description
            )
            join_groups([request], [completion], description=description, url=self.url)
            return completion

        self.try_out(
            sample,
            hint=" (compiled, vLLM's CPU build returns zeros for routes: start it with --enforce-eager)",
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

        Answers do not name their weights, so the server is asked before and after.

        Raises:
            RecipeError: when this server cannot sample so that log-probabilities are the policy's.
            EngineError: when the server refuses the requests themselves.
            CallError: for every other failure.
        """
        check_policy(self._policy(), policy, self.url)
        each = [(r, number) for r in requests for number in range(r.num_generations)]
        with ThreadPoolExecutor(len(each)) as threads:
            calls = [
                threads.submit(
                    self._complete, request, number, sampling, policy.policy_version, description
                )
                for request, number in each
            ]
        completions = [call.result() for call in calls]
        groups = join_groups(requests, completions, description=description, url=self.url)
        check_policy(self._policy(), policy, self.url)
        return groups

    def commit_weights(self, policy: PolicyName) -> None:
        """Let the server load the files that it was given, as ``policy``, and empty its cache.

        Until everything has worked the server holds no policy by name, so that a push that failed half-way is no policy.

        Raises:
            EngineError: when the server keeps cached prompts of the last policy.
            CallError: when it does not answer, or fails to load.
        """
        assert self._pushed is not None
        self.call("POST", "/pause?" + urlencode({"mode": "abort"}))
        self._name_weights(_LOADING)
        message = {"method": "reload_weights", "kwargs": {"weights_path": str(self._pushed)}}
        self.call_json("POST", "/collective_rpc", message)
        told = self.call_json("POST", "/reset_prefix_cache")
        if told != {"success": True}:
            raise EngineError(
                f"{self.url} did not empty its prefix cache after a weight push ({told}), so prompts would be answered from "
                "the last policy; start it again and resume the run"
            )
        self._name_weights(weight_version(policy))
        self.call("POST", "/resume")

    def _name_weights(self, name: str) -> None:
        self.call_json("POST", "/update_weight_version", {"new_version": name})

    def _policy(self) -> PolicyName:
        told = self.call_json("GET", "/weight_info")
        if not isinstance(told, dict) or "weight_version" not in told:
            raise CallError(Fault.CORRUPT, f"{self.url}/weight_info answers {told}")
        return read_policy(told["weight_version"])

    def _complete(
        self,
        request: Request,
        number: int,
        sampling: SamplingParams,
        policy_version: int,
        description: EngineDescription,
    ) -> Completion:
        assert self._server is not None
        message = generate_message(
            request,
            number,
            sampling,
            eos_ids=self._facts.eos_ids,
            draws=self._server.draws,
            num_known_ids=self._facts.num_known_ids,
        )
        answer = self.call_json("POST", "/inference/v1/generate", message)
        try:
            return read_completion(
                answer,
                request,
                sampling,
                facts=self._facts,
                description=description,
                policy_version=policy_version,
                max_bytes=_ROUTE_BYTES,
                where=f"{self.url}: request {request.request_id}, completion {number}",
            )
        except (TraceError, EngineError) as error:
            raise CallError(Fault.CORRUPT, str(error)) from error
