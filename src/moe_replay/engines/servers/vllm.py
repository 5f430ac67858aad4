"""Calls to one plain vLLM server over vLLM's HTTP API, which reads pushed weights from files."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.serve.messages import (
    PROTOCOL,
    PolicyName,
    Progress,
    Status,
    TransferStart,
)
from moe_replay.engines.servers.contract import Ask, RolloutServer, check_policy
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.own import ServerCalls
from moe_replay.engines.servers.plain import PlainCalls
from moe_replay.engines.servers.push_files import WeightPart
from moe_replay.engines.servers.vllm_wire import (
    generate_message,
    read_completion,
    read_server,
)
from moe_replay.engines.types import Completion, EngineDescription, SamplingParams
from moe_replay.errors import EngineError, RecipeError

# Name of the weights of a server that is loading a push, or in which a push has failed.
_LOADING = "moe-replay is loading"
_GENERATE = "/inference/v1/generate"
# Counters that grow while a server works.
_WORK = (b"vllm:prompt_tokens_total", b"vllm:generation_tokens_total")
# Paths that a plain server has -> how it must be started to have them.
_PATHS = {
    "/version": "start a server there: `moe-replay serve MODEL`",
    "/server_info": "start it with VLLM_SERVER_DEV_MODE=1 in its environment, on an address that "
    "only trainers reach: weights are pushed that way",
    "/weight_info": "install vLLM 0.30",
    _GENERATE: "start it with --enable-scale-out",
}


def connect_vllm(
    url: str, *, facts: ModelFacts, token: str | None, ca_file: Path | None = None, **limits: Any
) -> RolloutServer:
    """Return the calls to a server of `moe-replay serve`, or to a plain vLLM server.

    What the server answers decides. ``limits`` are those of `HttpCalls`.

    Raises:
        RecipeError: when the file of certificates cannot be used.
        CallError: when nothing answers.
    """
    ours = ServerCalls(url, token=token, ca_file=ca_file, **limits)
    try:
        is_plain = not ours.has("/status") and ours.has("/version")
    except BaseException:
        ours.close()
        raise
    if not is_plain:
        return ours
    ours.close()
    return VllmCalls(url, token=token, ca_file=ca_file, facts=facts, **limits)


class VllmCalls(PlainCalls):
    """One plain vLLM server. Threads may call it at the same time."""

    generate_path: str = _GENERATE
    weights_path: str = "/weight_info"

    takes_tensors: bool = True

    _description: EngineDescription | None = None
    _work: tuple[bytes, ...] = ()
    _joining: Future[tuple[int, bytes]] | None = None
    _taking: Future[tuple[int, bytes]] | None = None
    _is_updating: bool = False

    async def _shows_life(self) -> bool:
        _, text = await self._answer("GET", "/metrics", silence_s=self._timeout_s)
        before = self._work
        self._work = tuple(line for line in text.splitlines() if line.startswith(_WORK))
        return self._work != before

    def status(self) -> Status:
        """Return what the server is and which weights it holds.

        Raises:
            RecipeError: when it refuses the token or was started without a flag that replay needs.
            CallError: when it does not answer.
        """
        if self._description is None:
            for path, remedy in _PATHS.items():
                if not self.has(path):
                    raise RecipeError(f"{self.url} is a plain vLLM server without {path}; {remedy}")
            version = self.call_json("GET", "/version")
            told = self.call_json("GET", "/server_info?config_format=json")
            self._description, self.draws_by_seed = read_server(
                version, told, self._facts, self.url
            )
        return Status(protocol=PROTOCOL, description=self._description, policy=self._policy())

    def check(self) -> None:
        """Sample once, to find out whether what comes back fits the model.

        Raises:
            RecipeError: when it does not.
            CallError: when the server does not answer.
        """
        self._try_out(
            SamplingParams(max_completion_length=2),
            self.status(),
            hint=" (compiled, vLLM's CPU build returns zeros for routes: start it with "
            "--enforce-eager)",
        )
        self.result(self.begin(self._shows_life()))
        if not self._work:
            raise RecipeError(
                f"{self.url}/metrics counts no tokens, so a server that hangs could not be "
                "distinguished from one with a long queue; start it without --disable-log-stats"
            )

    def complete(
        self,
        ask: Ask,
        *,
        keep: Callable[[int, Completion], None],
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """Sample what is asked for; no progress is reported.

        Answers do not name their weights, so the server is asked before and after, and nothing is
        kept in between.

        Raises:
            RecipeError, EngineError, CallError: as `PlainCalls.complete`.
        """
        check_policy(self._policy(), ask.policy, self.url)
        sampled: dict[int, Completion] = {}
        failure: CallError | None = None
        try:
            super().complete(ask, keep=sampled.__setitem__)
        except CallError as error:
            failure = error
        if sampled:
            check_policy(self._policy(), ask.policy, self.url)
            for number, completion in sampled.items():
                keep(number, completion)
        if failure is not None:
            raise failure

    def num_ranks(self) -> int:
        """Return the number of its workers.

        Raises:
            CallError: when it does not answer.
        """
        told = self.call_json("GET", "/get_world_size")
        return int(told["world_size"])

    def join_transfer(self, start: TransferStart) -> None:
        """Let the server's workers join vLLM's own group with this trainer, which takes a while.

        Raises:
            RecipeError: when it was started without weight transfer over NCCL.
            CallError: when it does not answer.
        """
        told = self.call_json("GET", "/server_info?config_format=json")
        config = told["vllm_config"].get("weight_transfer_config")
        if (config or {}).get("backend") != start.backend:
            raise RecipeError(
                f"{self.url} was started with weight_transfer_config {config}, which takes no weights "
                f"over {start.backend}; start it with --weight-transfer-config "
                "'{\"backend\": \"nccl\"}', or set rollout.weight_transfer to 'auto'"
            )
        self._joining = self._post(
            "/init_weight_transfer_engine",
            {
                "init_info": {
                    "master_address": start.address,
                    "master_port": start.port,
                    "rank_offset": start.rank,
                    "world_size": start.size,
                }
            },
        )

    def announce(self, part: WeightPart, transfer: str) -> None:
        """Let the server's workers wait for the tensors of a part, in its order.

        With part 0 it stops sampling, and its weights lose their name until the push is committed.

        Raises:
            CallError: when it does not accept it.
        """
        if self._joining is not None:
            joining, self._joining = self._joining, None
            self._good(*self.result(joining), "/init_weight_transfer_engine")
        if part.number == 0:
            self._stop_sampling()
            self._is_updating = True
            self.call("POST", "/start_weight_update")
        tensors = part.tensors
        self._taking = self._post(
            "/update_weights",
            {
                "update_info": {
                    "names": list(tensors),
                    "dtype_names": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
                    "shapes": [list(tensor.shape) for tensor in tensors.values()],
                }
            },
        )

    def await_part(self, part: WeightPart) -> None:
        """Return once all workers have loaded the announced tensors.

        Raises:
            CallError: when they did not.
        """
        assert self._taking is not None
        self._good(*self.result(self._taking), "/update_weights")

    def put_weights(self, part: WeightPart) -> None:
        """Remember where the push was written; the server reads it when the push is committed.

        Raises:
            CallError: when its weights are replaced in part, by tensors of this push.
        """
        if self._is_updating and part.number > 0:
            raise CallError(
                Fault.FAILED,
                f"{self.url} has replaced some of its weights, and lost the group with its trainer: "
                "start the server again",
            )
        if self._is_updating and self._policy().run == _LOADING:
            raise self._is_torn()
        self._is_updating = False
        super().put_weights(part)

    def commit_weights(self, policy: PolicyName) -> None:
        """Make the server load the files that it was given, as ``policy``, and empty its cache.

        Until everything has worked the server's weights have no policy's name, so a push that
        failed half-way is never sampled from. After a failed push a server accepts no other until
        it is restarted: a worker that raises leaves the later answers of vLLM's workers one call
        behind, so that the next push could seem to have worked.

        Raises:
            CallError: when it does not answer, fails to load, or has failed before.
        """
        if not self._is_updating:
            self._stop_sampling()
        try:
            if self._is_updating:
                self.call_json("POST", "/finish_weight_update", silence_s=self._load_s)
            else:
                assert self._pushed is not None
                self._load(self._pushed)
            self._empty_cache()
        except EngineError as error:
            raise self._not_loaded(
                policy,
                error,
                then=". Start the server again before the next push: its workers are out of step now",
            ) from error
        self._name_weights(policy.weight_version)
        self._is_updating = False
        self.call("POST", "/resume")
        self._check_held(policy)

    def _stop_sampling(self) -> None:
        """Abort what runs, and take the name of the weights, which will be others.

        Raises:
            CallError: when a push before this one has failed.
        """
        if self._policy().run == _LOADING:
            raise self._is_torn()
        self.call("POST", "/pause?" + urlencode({"mode": "abort"}))
        self._name_weights(_LOADING)

    def _is_torn(self) -> CallError:
        return CallError(
            Fault.FAILED,
            f"{self.url} is loading another push, or has failed to, after which vLLM's workers "
            "are out of step: start the server again, and give each run servers of its own",
        )

    def _post(self, path: str, message: dict[str, Any]) -> Future[tuple[int, bytes]]:
        """Begin a call that ends only with the help of the trainer."""
        body = json.dumps(message, allow_nan=False).encode()
        return self.begin(self._answer("POST", path, body, silence_s=self._load_s))

    def _load(self, folder: Path) -> None:
        message = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self.call_json("POST", "/collective_rpc", message, silence_s=self._load_s)

    def _empty_cache(self) -> None:
        told = self.call_json("POST", "/reset_prefix_cache")
        if told != {"success": True}:
            raise EngineError(
                f"it did not empty its prefix cache ({told}), so prompts would be answered from the "
                "last policy"
            )

    def _name_weights(self, name: str) -> None:
        self.call_json("POST", "/update_weight_version", {"new_version": name})

    def _message(self, ask: Ask, number: int) -> dict[str, Any]:
        return generate_message(ask, number, facts=self._facts, draws=self.draws_by_seed)

    def _completion(self, answer: Any, ask: Ask, *, where: str) -> Completion:
        return read_completion(
            answer, ask, facts=self._facts, layer_order=self._layer_order, where=where
        )
