"""The engine that is one or more rollout servers: it spreads load and tolerates faults.

If servers draw by the seed of the run, a completion depends on its seed, request and index, and not
on the server, so one that is sampled again elsewhere comes out the same. If they do not, `Redraws`
bounds what that does to the data.

In: URLs, requests, weights. Out: completions with routes.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from moe_replay.checkpoint.facts import ModelFacts, checkpoint_tensors
from moe_replay.engines.checks import check_requests, check_sampling
from moe_replay.engines.lifecycle import VersionedEngine
from moe_replay.engines.registry import Ranks
from moe_replay.engines.serve.messages import CHECKPOINT, PolicyName
from moe_replay.engines.servers.broadcast import Broadcast
from moe_replay.engines.servers.contract import Ask, RolloutServer
from moe_replay.engines.servers.faults import CallError, Fault, GivenUpError
from moe_replay.engines.servers.opening import agreed_description, wait_until_loaded
from moe_replay.engines.servers.own import ServerCalls
from moe_replay.engines.servers.push import Pushed, push, push_bytes
from moe_replay.engines.servers.push_files import WeightsFolder
from moe_replay.engines.servers.round import Redraws, Round
from moe_replay.engines.types import (
    Request,
    RolloutGroup,
    RolloutProgress,
    SamplingParams,
)
from moe_replay.engines.weight_stream import checked_weights, drain, lowered_weights
from moe_replay.errors import EngineError, MoeReplayError, RecipeError

_ANSWER_BYTES = 4 << 30
# Time between two attempts to end calls that were given up, and the maximum wait for them.
_GIVE_UP_S, _LEAVE_S = 0.05, 30.0
_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ServerEngine(VersionedEngine):
    """Rollout servers as one engine.

    Every request goes to the server that is free first. A call that fails is tried again, elsewhere
    if possible, at most ``max_attempts`` times; what other calls returned is kept. `faults` counts
    failures by kind. An answer may take any time: ``timeout_s`` limits the silence of its server.
    ``connect`` makes the calls to one server, `ServerCalls` for those of `moe-replay serve`;
    servers that read pushed weights from files find them below ``weights_dir``. Weights travel in
    the number format ``dtype``, in parts of about ``bucket_bytes``, of which two are in memory: to
    each server by itself, or with ``weight_transfer`` "gloo" or "nccl" to all at once.

    ``waits_for_loading`` lets a start wait for servers that still load their model, and
    ``says_waiting`` logs it every minute, which one rank does for all.
    Of several ``ranks`` the first one pushes, and the others hear which servers took it.

    Examples:
        >>> engine = ServerEngine(
        ...     ["http://127.0.0.1:8000"],
        ...     facts=facts,
        ...     run="7f3a",
        ...     dtype="bfloat16",
        ...     record_routes=True,
        ... )

    Raises:
        RecipeError: when a URL is not a rollout server of this version, serves another model, or
            cannot return what ``record_routes`` or ``keeps_candidates`` asks for.
        EngineError: when no server answers.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        facts: ModelFacts,
        run: str,
        dtype: Literal["float32", "bfloat16"],
        record_routes: bool,
        connect: Callable[..., RolloutServer] = ServerCalls,
        weights_dir: Path | None = None,
        ranks: Ranks | None = None,
        token: str | None = None,
        calls_per_server: int = 8,
        timeout_s: float = 600.0,
        max_attempts: int = 12,
        waits_for_loading: bool = False,
        says_waiting: bool = True,
        bucket_bytes: int = 512 << 20,
        weight_transfer: Literal["auto", "gloo", "nccl"] = "auto",
        crosses_pushes: bool = False,
        keeps_candidates: bool = False,
    ) -> None:
        if not urls or len(set(urls)) != len(urls) or run == CHECKPOINT:
            raise RecipeError(f"servers are {list(urls)}, expected at least one URL, each once")
        self._servers: list[RolloutServer] = []
        self._facts, self._dtype = facts, _FORMATS[dtype]
        self._ranks, self._pushes = ranks, ranks is None or ranks.rank == 0
        self._folder, self._bucket_bytes = WeightsFolder(weights_dir), bucket_bytes
        self._pushed_bytes = self._num_sampled = 0
        self._broadcast: Broadcast | None = None
        self._calls_per_server, self._max_attempts = calls_per_server, max_attempts
        self._crosses, self._run = crosses_pushes, run
        self._holders: frozenset[str] | None = None
        self._faults, self._redraws = Counter[Fault](), Redraws()
        self._lock = threading.Lock()
        self._round: Round | None = None
        try:
            for url in urls:
                self._servers.append(
                    connect(url, token=token, timeout_s=timeout_s, max_answer_bytes=_ANSWER_BYTES)
                )
            if waits_for_loading:
                wait_until_loaded(self._servers, says_so=says_waiting)
            if weight_transfer != "auto" and self._pushes:
                self._broadcast = Broadcast(weight_transfer, self._servers, self._faults)
            super().__init__(
                agreed_description(
                    self._servers,
                    facts,
                    dtype=dtype,
                    record_routes=record_routes,
                    # One rank is enough for a trial.
                    tries=self._pushes,
                    crosses_pushes=self._crosses,
                    keeps_candidates=keeps_candidates,
                )
            )
        except BaseException:
            self._disconnect()
            raise

    @property
    def faults(self) -> Mapping[str, int]:
        """Kind of fault -> calls that have failed; each was retried successfully or has raised.

        ``redrawn`` counts completions that were drawn again by other noise, see `Redraws`.
        """
        return {kind.value: self._faults[kind] for kind in Fault} | {"redrawn": self._redraws.count}

    @property
    def pushed_bytes(self) -> int:
        """Bytes of the last push, as they went to each server; the same on every rank."""
        return self._pushed_bytes

    @property
    def progress(self) -> RolloutProgress:
        """How far the running call of `generate` is, with tokens that servers report in between."""
        work = self._round
        return RolloutProgress() if work is None else work.progress()

    @property
    def busy(self) -> dict[str, str]:
        """URL -> run, of the servers that hold weights of another run, which may be using them."""
        free = (CHECKPOINT, self._run)
        held = {server.url: server.status().policy.run for server in self._servers}
        return {url: run for url, run in held.items() if run not in free}

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Complete every request; the groups come back in the order of ``requests``.

        Raises:
            RecipeError: when a sampling setting is out of range.
            EngineError: when a request is malformed, one failed too often, or no server is left.
        """
        self._check_state("ready")
        check_sampling(sampling)
        check_requests(
            requests, sampling, description=self._description, vocab_size=self._facts.vocab_size
        )
        holders = {server.url for server in self._servers}
        if self._holders is not None:
            holders &= self._holders
        asks = [
            Ask(
                request=request,
                numbers=range(request.num_generations),
                sampling=request.sampling(sampling),
                policy=self._policy,
                description=self._description,
                crosses=self._crosses,
            )
            for request in requests
        ]
        work = Round(asks, self._max_attempts, holders)
        self._round = work
        threads = ThreadPoolExecutor(len(self._servers) * self._calls_per_server)
        workers: list[Future[None]] = []
        try:
            workers += [
                threads.submit(self._serve, server, work)
                for _ in range(min(self._calls_per_server, len(requests)))
                for server in self._in_turn(requests)
            ]
            self._wait(workers, work)
        except BaseException as error:
            # Such as Ctrl-C: no new calls are made, and running ones are given up.
            work.stop(error)
            self._wait(workers, work)
            raise
        finally:
            self._round = None
            threads.shutdown(wait=False, cancel_futures=True)
        groups = work.results()
        self._num_sampled += sum(len(group.completions) for group in groups)
        return groups

    def cancel(self) -> None:
        """End the running call of `generate`, which then raises; nothing where none runs."""
        work = self._round
        if work is not None:
            work.stop(EngineError("the rollout was cancelled: its run has stopped or failed"))
            for server in self._servers:
                server.give_up()

    def _in_turn(self, requests: Sequence[Request]) -> list[RolloutServer]:
        """Return the servers in the order in which this call asks them, to spread few requests.

        Ranks sample consecutive prompts, so each begins with another server: of 3 servers, the rank
        with request 7 asks the second one first.
        """
        first = requests[0].request_id % len(self._servers) if requests else 0
        return self._servers[first:] + self._servers[:first]

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int
    ) -> None:
        """Push ``weights`` (Hugging Face checkpoint names) to every server, as ``policy_version``.

        A server that cannot be reached is skipped until a later push reaches it. The engine of a
        later rank only reads ``weights`` and learns from the pushing one which servers loaded them.

        Raises:
            EngineError: when a name is unknown, missing, or of another shape, the version goes
                backwards, or no server loaded the push.
        """
        self._check_push(policy_version)
        policy = PolicyName(run=self._run, policy_version=policy_version)
        lowered = lowered_weights(weights, self._dtype, self._facts)
        self._deliver(checked_weights(lowered, self._facts), policy)
        self._policy_version = policy_version

    def restore(self, model_dir: str | Path) -> None:
        """Push the checkpoint to every server, as policy version 0, and let each sample once by it.

        Whatever would prevent a push shows here, and not after the first rollout; and no server
        answers by other weights of the same shape, with which it happened to be started.

        Raises:
            RecipeError: when what a server samples does not fit the model.
            EngineError: when a server does not load them.
        """
        tensors = checkpoint_tensors(model_dir) if self._pushes else iter(())
        weights = lowered_weights(tensors, self._dtype, self._facts)
        self._deliver(weights, self._policy, at_start=True)

    def _check_servers(self) -> None:
        for server in self._servers:
            held = server.status().policy
            if held != self._policy:
                raise EngineError(
                    f"{server.url} holds {held} after the weights of the checkpoint were pushed to it; "
                    "another trainer pushes to it: give each run servers of its own"
                )
            server.check()

    def close(self) -> None:
        """Close the connections; the servers stay. Calling it twice is allowed."""
        if self._state != "closed":
            super().close()
            self._disconnect()

    def _disconnect(self) -> None:
        if self._broadcast is not None:
            self._broadcast.close()
        for server in self._servers:
            server.close()
        self._folder.close()

    @property
    def _policy(self) -> PolicyName:
        """The weights that were pushed last."""
        return PolicyName(run=self._run, policy_version=self._policy_version)

    def _wait(self, workers: Iterable[Future[None]], work: Round) -> None:
        """Wait until all workers are done; once the round is stopped, running calls are given up.

        A worker may begin its call after the others were given up, so this repeats until none runs.
        """
        pending, until = set(workers), None
        while pending and (until is None or time.monotonic() < until):
            if work.is_stopped:
                until = until or time.monotonic() + _LEAVE_S
                for server in self._servers:
                    server.give_up()
            pause_s = _GIVE_UP_S if work.is_stopped else None
            _, pending = wait(pending, timeout=pause_s, return_when=FIRST_COMPLETED)

    def _serve(self, server: RolloutServer, work: Round) -> None:
        """Let one server work on a round until nothing is left, or it fails too often in a row."""
        while (ask := work.take(server.url)) is not None:
            if ask.crosses:
                # A push may have come since the round began.
                ask = replace(ask, policy=self._policy)
            try:
                server.complete(
                    ask,
                    keep=partial(work.keep, ask, server.url),
                    on_progress=partial(work.note, ask),
                )
            except GivenUpError as error:
                work.put_down(ask, error)
            except CallError as error:
                with self._lock:
                    self._faults[error.fault] += 1
                if (stop := self._bias(server, ask, work, error)) is not None:
                    work.stop(stop)
                work.give_back(ask, server.url, error)
            except BaseException as error:
                work.put_down(ask, error)
                raise
            else:
                work.finish(ask, server.url)

    def _bias(
        self, server: RolloutServer, ask: Ask, work: Round, error: CallError
    ) -> EngineError | None:
        """Return what ends the run if completions drawn again would change its data too much."""
        if not server.biases(error):
            return None
        return self._redraws.add(
            error,
            num_missing=work.num_missing(ask),
            num_sampled=self._num_sampled + work.progress().num_finished,
            url=server.url,
        )

    def _deliver(
        self,
        weights: Iterator[tuple[str, torch.Tensor]],
        policy: PolicyName,
        *,
        at_start: bool = False,
    ) -> None:
        """Push, or only read the weights; then tell all ranks which servers loaded them.

        At the start all must do so, and show that they sample by them.
        """
        pushed = Pushed(urls=(), num_bytes=0)
        mine: MoeReplayError | None = None
        try:
            if self._pushes:
                pushed = push(
                    weights,
                    policy,
                    self._servers,
                    folder=self._folder,
                    num_bytes=push_bytes(self._facts, self._dtype),
                    bucket_bytes=self._bucket_bytes,
                    must_reach_all=at_start,
                    faults=self._faults,
                    broadcast=self._broadcast,
                )
                if at_start:
                    self._check_servers()
            else:
                for _ in weights:
                    continue
        except MoeReplayError as error:
            # Other ranks help to make each tensor, and hear of it when they are through.
            drain(weights, error)
            mine = error
        failure = None if mine is None else str(mine)
        if self._ranks is not None:
            pushed, failure = self._ranks.gather((pushed, failure))[0]
        if mine is not None:
            raise mine
        if failure is not None:
            raise EngineError(
                f"the rank that pushes policy version {policy.policy_version} failed: {failure}"
            )
        self._holders, self._pushed_bytes = frozenset(pushed.urls), pushed.num_bytes
