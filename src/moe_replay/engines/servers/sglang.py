"""Calls to one SGLang server over SGLang's HTTP API, which reads pushed weights from files."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from contextlib import suppress
from typing import Any

from moe_replay.engines.serve.messages import PROTOCOL, PolicyName, Status
from moe_replay.engines.servers.contract import Ask, check_policy
from moe_replay.engines.servers.plain import PlainCalls
from moe_replay.engines.servers.sglang_wire import (
    generate_message,
    read_completion,
    read_description,
)
from moe_replay.engines.types import Completion, SamplingParams
from moe_replay.engines.vllm.wire import FLAG
from moe_replay.errors import EngineError, RecipeError

# A temperature at which the most likely token loses its lead over chance, and the minimum lead in
# nats that shows this.
_FLAT, _MIN_LEAD = 100.0, 0.1
# Maximum wait for a server to hear that a request was given up; it also sees the closed connection.
_ABORT_S = 2.0


class SglangCalls(PlainCalls):
    """One SGLang server. Threads may call it at the same time.

    What is sampled depends on the server's noise: only one with
    ``--enable-deterministic-inference`` gives equal completions for equal seeds.
    """

    generate_path: str = "/generate"
    weights_path: str = "/model_info"

    async def _shows_life(self) -> bool:
        # Answered once the server's scheduler gives any output, also that of other requests.
        code, _ = await self._answer("GET", "/health_generate", silence_s=self._timeout_s)
        return code == 200

    def status(self) -> Status:
        """Return what the server is and which weights it holds.

        Raises:
            RecipeError: when it refuses the token or is not an SGLang server.
            UnsupportedError: when it cannot return the routes of its tokens.
            CallError: when it does not answer.
        """
        if not self.has("/server_info") or not self.has("/model_info"):
            raise RecipeError(
                f"{self.url} answers, but has no /server_info and /model_info; start an SGLang "
                f"server there: `python -m sglang.launch_server --model-path MODEL {FLAG}`"
            )
        told = self.call_json("GET", "/server_info")
        description = read_description(told, self._facts, self.url)
        self.draws_by_seed = told.get("enable_deterministic_inference") is True
        return Status(protocol=PROTOCOL, description=description, policy=self._policy())

    def check(self) -> None:
        """Test how the server reports log-probabilities, and whether its routes fit the model.

        Raises:
            RecipeError: when log-probabilities ignore the temperature, or routes do not fit.
            CallError: when it does not answer.
        """
        status = self.status()
        best = []
        for temperature in (1.0, _FLAT):
            sampling = SamplingParams(max_completion_length=1, temperature=temperature, top_k=1)
            best.append(float(self._try_out(sampling, status).rollout_logprobs[0]))
        # Of 1,000 tokens chance gives each -6.9 nats. Probability 0.9 is a lead of 6.8, most of
        # which must be gone at temperature 100.
        lead = best[0] + math.log(self._facts.vocab_size)
        if lead > _MIN_LEAD and best[0] - best[1] < lead / 2:
            raise RecipeError(
                f"{self.url} gives the most likely token the log-probability {best[0]:.3f} at "
                f"temperature 1 and {best[1]:.3f} at {_FLAT:.0f}, expected a fall: its "
                "log-probabilities ignore the temperature, which the trainer's do not; start it "
                "without SGLANG_RETURN_ORIGINAL_LOGPROB"
            )

    def commit_weights(self, policy: PolicyName) -> None:
        """Make the server load the files that it was given, as ``policy``, and empty its cache.

        Raises:
            CallError: when it does not answer, cannot read them, they are not those of its model,
                or it keeps cached prompts of the last policy.
        """
        assert self._pushed is not None
        message = {
            "model_path": str(self._pushed),
            "load_format": "safetensors",
            "weight_version": policy.weight_version,
            "flush_cache": True,
        }
        try:
            told = self.call_json(
                "POST", "/update_weights_from_disk", message, silence_s=self._load_s
            )
            if not isinstance(told, dict) or told.get("success") is not True:
                raise EngineError(str(told))
            self.call("POST", "/flush_cache")
        except EngineError as error:
            raise self._not_loaded(policy, error) from error
        self._check_held(policy)

    def _message(self, ask: Ask, number: int) -> dict[str, Any]:
        return generate_message(ask, number, facts=self._facts, rid=secrets.token_hex(16))

    def _completion(self, answer: Any, ask: Ask, *, where: str) -> Completion:
        completion, sampled_by = read_completion(
            answer, ask, facts=self._facts, layer_order=self._layer_order, where=where
        )
        check_policy(sampled_by, ask.policy, self.url)
        return completion

    async def _answer_to(self, message: dict[str, Any]) -> bytes:
        """Return the answer to a message; the server aborts one that nobody waits for."""
        try:
            return await super()._answer_to(message)
        except asyncio.CancelledError:
            abort = json.dumps({"rid": message["rid"]}).encode()
            said = self._answer("POST", "/abort_request", abort, silence_s=_ABORT_S)
            with suppress(EngineError):
                await self._say_anyway(said)
            raise
