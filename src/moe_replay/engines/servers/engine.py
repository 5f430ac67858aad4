"""The engine that is one or more rollout servers: load spread over them, weights pushed to all, faults survived.

Where servers draw by the seed of the run, a completion depends on its seed, request and number, and not on the server, so
one that is sampled again elsewhere comes out the same. Where they do not, `Redraws` bounds what that does to the data.

In: URLs, requests, weights. Out: completions with routes.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from moe_replay.checkpoint.facts import ModelFacts, checkpoint_tensors
from moe_replay.engines.noise import check_requests, check_sampling
from moe_replay.engines.serve.messages import CHECKPOINT, PolicyName
from moe_replay.engines.servers.contract import PlainServer, RolloutServer, check_server
from moe_replay.engines.servers.http import CallError, Fault, GivenUpError
from moe_replay.engines.servers.own import ServerCalls
from moe_replay.engines.servers.push import push, push_bytes
from moe_replay.engines.servers.round import Redraws, Round, Task
from moe_replay.engines.servers.weights_folder import WeightsFolder
from moe_replay.engines.types import (
    EngineDescription,
    Request,
    RolloutGroup,
    RolloutProgress,
    SamplingParams,
)
from moe_replay.engines.weight_stream import checked_weights, lowered_weights
from moe_replay.errors import EngineError, MoeReplayError, RecipeError

_ANSWER_BYTES = 4 << 30
# Between two looks at whether calls that were given up have ended, and the longest wait for them.
_GIVE_UP_S, _LEAVE_S = 0.05, 30.0
_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ServerEngine:
    """Rollout servers as one engine.

    Every request is sent to the server that is free first. A call that fails is tried again, elsewhere if it can be, at
    most ``max_attempts`` times; what other calls returned is kept. `faults` counts what went wrong, by kind. An answer may
    take any time: ``timeout_s`` limits the silence of its server.
    ``connect`` makes the calls to one server, `ServerCalls` for those of `moe-replay serve`; servers that read pushed weights
    from files find them below ``weights_dir``. Weights travel in the number format ``dtype``.

    Of several ranks one pushes; ``share`` gives what each of them passes to all, in rank order, the pushing one first.

    Example:
        >>> engine = ServerEngine(["http://127.0.0.1:8000"], facts=facts, run="7f3a", dtype="bfloat16", record_routes=True)

    Raises:
        RecipeError: when a URL is no rollout server of this version, serves another model, or cannot return the routes
            that ``record_routes`` asks for.
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
        pushes: bool = True,
        share: Callable[[Any], list[Any]] | None = None,
        token: str | None = None,
        calls_per_server: int = 8,
        timeout_s: float = 600.0,
        max_attempts: int = 12,
    ) -> None:
        if not urls or len(set(urls)) != len(urls) or run == CHECKPOINT:
            raise RecipeError(f"servers are {list(urls)}, expected at least one URL, each once")
        if not pushes and share is None:
            raise RecipeError(
                "an engine that does not push needs `share`, to hear of the pushes of the one that does"
            )
        self._servers: list[RolloutServer] = []
        self._facts, self._dtype, self._pushes, self._share = facts, _FORMATS[dtype], pushes, share
        self._folder = WeightsFolder(weights_dir)
        self._calls_per_server, self._max_attempts = calls_per_server, max_attempts
        self._policy = PolicyName(run=run, policy_version=0)
        self._holders: frozenset[str] | None = None
        self._faults: Counter[Fault] = Counter()
        self._redraws = Redraws()
        self._num_sampled = 0
        self._lock = threading.Lock()
        self._round: Round | None = None
        self._is_closed = False
        try:
            for url in urls:
                self._servers.append(
                    connect(url, token=token, timeout_s=timeout_s, max_answer_bytes=_ANSWER_BYTES)
                )
            self._description = self._agreed_description(dtype, record_routes)
        except BaseException:
            self.close()
            raise

    @property
    def description(self) -> EngineDescription:
        """What these servers are and can return."""
        return self._description

    @property
    def policy_version(self) -> int:
        """Weight pushes received so far."""
        return self._policy.policy_version

    @property
    def faults(self) -> Mapping[str, int]:
        """Kind of fault -> calls that failed in this way so far; every one of them was made up for or has raised.

        ``redrawn`` counts completions that were drawn again by other noise, see `Redraws`.
        """
        return {kind.value: self._faults[kind] for kind in Fault} | {"redrawn": self._redraws.count}

    @property
    def progress(self) -> RolloutProgress:
        """How far the running call of `generate` is; tokens are those that came back, and those that servers tell of."""
        work = self._round
        return RolloutProgress() if work is None else work.progress()

    @property
    def busy(self) -> dict[str, str]:
        """URL -> run, of the servers that hold weights of another run, which may be at work there."""
        free = (CHECKPOINT, self._policy.run)
        held = {server.url: server.status().policy.run for server in self._servers}
        return {url: run for url, run in held.items() if run not in free}

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Complete every request; the groups come back in the order of ``requests``.

        Raises:
            RecipeError: when a sampling setting is out of range.
            EngineError: when a request is malformed, one failed too often, or no server is left.
        """
        self._check_open()
        check_sampling(sampling)
        check_requests(
            requests, sampling, description=self._description, vocab_size=self._facts.vocab_size
        )
        holders = {server.url for server in self._servers}
        if self._holders is not None:
            holders &= self._holders
        work = Round(requests, self._max_attempts, holders)
        self._round = work
        threads = ThreadPoolExecutor(len(self._servers) * self._calls_per_server)
        workers: list[Future[None]] = []
        try:
            workers += [
                threads.submit(self._serve, server, work, sampling)
                for _ in range(min(self._calls_per_server, len(requests)))
                for server in self._in_turn(requests)
            ]
            self._wait(workers, work)
        except BaseException as error:
            # Ctrl-C and its like: nothing new is asked, and what is under way is given up.
            work.stop(error)
            self._wait(workers, work)
            raise
        finally:
            self._round = None
            threads.shutdown(wait=False, cancel_futures=True)
        groups = work.results()
        self._num_sampled += sum(len(group.completions) for group in groups)
        return groups

    def _in_turn(self, requests: Sequence[Request]) -> list[RolloutServer]:
        """Return the servers in the order in which they are asked, so that few requests are spread over all of them.

        Ranks sample prompts of consecutive numbers, so each begins with another server: of 3 servers, the rank with request
        7 asks the second one first.
        """
        first = requests[0].request_id % len(self._servers) if requests else 0
        return self._servers[first:] + self._servers[:first]

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int
    ) -> None:
        """Push ``weights`` (Hugging Face checkpoint names) to every server, as ``policy_version``.

        A server that cannot be reached is left out until a later push reaches it. An engine made with ``pushes=False`` runs
        through ``weights`` and is told by the pushing one which servers took them.

        Raises:
            EngineError: when a name is unknown, missing, or of another shape, the version goes backwards, or no server
                took the push.
        """
        self._check_open()
        if policy_version < self._policy.policy_version:
            raise EngineError(
                f"policy_version {policy_version} was pushed after {self._policy.policy_version}; versions count pushes, so "
                "a stale trainer is pushing"
            )
        policy = PolicyName(run=self._policy.run, policy_version=policy_version)
        lowered = lowered_weights(weights, self._dtype, self._facts)
        self._deliver(checked_weights(lowered, self._facts), policy)
        self._policy = policy

    def restore(self, model_dir: str | Path) -> None:
        """Give every server the weights of the checkpoint, as policy version 0, and let each sample once by them.

        Whatever would keep a push from working is met here, and not after the first rollout; and no server answers by
        other weights of the same shape, with which it happened to be started.

        Raises:
            RecipeError: when what a server samples does not fit the model.
            EngineError: when a server does not take them.
        """
        tensors = checkpoint_tensors(model_dir) if self._pushes else iter(())
        weights = lowered_weights(tensors, self._dtype, self._facts)
        self._deliver(weights, self._policy, must_reach_all=True, then=self._check_servers)

    def _check_servers(self) -> None:
        for server in self._servers:
            held = server.status().policy
            if held != self._policy:
                raise EngineError(
                    f"{server.url} holds {held} after the weights of the checkpoint were pushed to it; another trainer "
                    "pushes to it: give each run servers of its own"
                )
            server.check()

    def close(self) -> None:
        """Close the connections; the servers stay. Calling it twice is allowed."""
        if not self._is_closed:
            self._is_closed = True
            for server in self._servers:
                server.close()
            self._folder.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineError("the server engine is closed; make a new one")

    def _agreed_description(self, dtype: str, record_routes: bool) -> EngineDescription:
        """Ask every server what it is, before anything is sampled."""
        told = {}
        for server in self._servers:
            description = server.status().description
            check_server(server, description, self._facts, dtype, record_routes)
            if self._pushes:
                # One rank is enough for a trial: 64 of them would sample for each other.
                server.check()
            told[server.url] = description
        different = set(told.values())
        if len(different) > 1:
            raise RecipeError(
                f"the servers differ: {told}; start all of them with the same model, number format and release"
            )
        return different.pop()

    def _wait(self, workers: Iterable[Future[None]], work: Round) -> None:
        """Wait until all workers are done; once the round is stopped, the calls under way are given up.

        A worker may have begun its call after the others were given up, so this is done until none is left.
        """
        pending, until = set(workers), None
        while pending and (until is None or time.monotonic() < until):
            if work.is_stopped:
                until = until or time.monotonic() + _LEAVE_S
                for server in self._servers:
                    server.give_up()
            pause_s = _GIVE_UP_S if work.is_stopped else None
            _, pending = wait(pending, timeout=pause_s, return_when=FIRST_COMPLETED)

    def _serve(self, server: RolloutServer, work: Round, sampling: SamplingParams) -> None:
        """Let one server work on a round until nothing is left to do, or it fails too often in a row."""
        while (task := work.take(server.url)) is not None:
            try:
                self._sample(server, task, work, sampling)
            except GivenUpError as error:
                work.stop(error)
                work.put_down(task)
            except CallError as error:
                with self._lock:
                    self._faults[error.fault] += 1
                if (stop := self._bias(server, task, work, error)) is not None:
                    work.stop(stop)
                work.give_back(task, server.url, error)
            except BaseException as error:
                work.stop(error)
                work.put_down(task)
                raise
            else:
                work.finish(task, server.url)

    def _sample(
        self, server: RolloutServer, task: Task, work: Round, sampling: SamplingParams
    ) -> None:
        keep, on_progress = partial(work.keep, task, server.url), partial(work.note, task)
        if isinstance(server, PlainServer):
            server.complete(
                task.request,
                task.numbers,
                sampling,
                policy=self._policy,
                description=self._description,
                keep=keep,
                on_progress=on_progress,
            )
            return
        (group,) = server.generate(
            [task.request],
            sampling,
            policy=self._policy,
            description=self._description,
            on_progress=on_progress,
        )
        for number, completion in enumerate(group.completions):
            keep(number, completion)

    def _bias(
        self, server: RolloutServer, task: Task, work: Round, error: CallError
    ) -> EngineError | None:
        """Return what ends the run if drawing a task again on this server, or another, went too far from its policy."""
        # What other weights sampled is not drawn again: those of this policy never drew it.
        if server.draws_by_seed or error.fault is Fault.STALE:
            return None
        is_silence = error.incident is not None
        if not is_silence and isinstance(server, PlainServer) and not server.is_up():
            return None
        return self._redraws.add(
            error,
            num_missing=work.num_missing(task),
            num_sampled=self._num_sampled + work.progress().num_finished,
            url=server.url,
        )

    def _deliver(
        self,
        weights: Iterator[tuple[str, torch.Tensor]],
        policy: PolicyName,
        *,
        must_reach_all: bool = False,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Push, or run through the weights; every rank then knows which servers took them, or why none did."""
        told: dict[str, Any] = {"holders": [], "error": None}
        mine: MoeReplayError | None = None
        try:
            if self._pushes:
                told["holders"] = push(
                    weights,
                    policy,
                    self._servers,
                    folder=self._folder,
                    num_bytes=push_bytes(self._facts, self._dtype),
                    must_reach_all=must_reach_all,
                    faults=self._faults,
                )
                then()
            else:
                for _ in weights:
                    continue
        except MoeReplayError as error:
            mine, told["error"] = error, str(error)
        if self._share is not None:
            told = self._share(told)[0]
        if mine is not None:
            raise mine
        if told["error"] is not None:
            raise EngineError(
                f"the rank that pushes policy version {policy.policy_version} failed: {told['error']}"
            )
        self._holders = frozenset(told["holders"])
