"""The engine that is one or more rollout servers: load spread over them, weights pushed to all, faults survived.

A completion depends on its seed, request and number, not on the server that samples it, so a request that is sampled
again elsewhere gives what it would have given.

In: URLs, requests, weights. Out: completions with routes. Called by: grpo.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from moe_replay.errors import EngineError, RecipeError
from moe_replay.rollout.http_calls import CallError, Fault
from moe_replay.rollout.model_facts import ModelFacts, checkpoint_tensors
from moe_replay.rollout.sampling import check_requests, check_sampling
from moe_replay.rollout.server_calls import ServerCalls
from moe_replay.rollout.server_contract import RolloutServer, check_server, weight_parts
from moe_replay.rollout.server_messages import CHECKPOINT, PolicyName
from moe_replay.rollout.types import (
    EngineDescription,
    Request,
    RolloutGroup,
    RolloutProgress,
    SamplingParams,
)
from moe_replay.rollout.weight_stream import checked_weights

# A server that fails this often in a row is left alone until the next round, unless it is the last.
_MAX_FAILURES_IN_A_ROW = 4
# First wait after a failure; each further one in a row doubles it.
_BACKOFF_S = 0.25
_ANSWER_BYTES = 4 << 30


class ServerEngine:
    """Rollout servers as one engine.

    Every request is sent to the server that is free first. A call that fails is tried again, elsewhere if it can be, at
    most ``max_attempts`` times; what other calls returned is kept. `faults` counts what went wrong, by kind.
    ``connect`` makes the calls to one server, `ServerCalls` for those of `moe-replay serve`; servers that read pushed weights
    from files find them below ``weights_dir``.

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
        token: str | None = None,
        calls_per_server: int = 8,
        timeout_s: float = 600.0,
        max_attempts: int = 12,
    ) -> None:
        if not urls or len(set(urls)) != len(urls) or run == CHECKPOINT:
            raise RecipeError(f"servers are {list(urls)}, expected at least one URL, each once")
        self._servers: list[RolloutServer] = []
        self._facts, self._pushes, self._timeout_s = facts, pushes, timeout_s
        self._weights_dir = weights_dir
        self._calls_per_server, self._max_attempts = calls_per_server, max_attempts
        self._policy = PolicyName(run=run, policy_version=0)
        self._faults: Counter[Fault] = Counter()
        self._lock = threading.Lock()
        self._round: _Round | None = None
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
        """Kind of fault -> calls that failed in this way so far; every one of them was made up for or has raised."""
        return {kind.value: self._faults[kind] for kind in Fault}

    @property
    def progress(self) -> RolloutProgress:
        """How far the running call of `generate` is; tokens are those of the requests that were answered."""
        work = self._round
        return RolloutProgress() if work is None else work.progress()

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
        work = _Round(requests, self._max_attempts, {server.url for server in self._servers})
        self._round = work
        threads = ThreadPoolExecutor(len(self._servers) * self._calls_per_server)
        try:
            workers = [
                threads.submit(self._serve, server, work, sampling)
                for server in self._servers
                for _ in range(min(self._calls_per_server, len(requests)))
            ]
            wait(workers)
        except BaseException as error:
            # Ctrl-C and its like: a call that waits for a server is not waited for, and nothing new is asked.
            work.abandon(error)
            raise
        finally:
            self._round = None
            threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.result()
        return work.results()

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int
    ) -> None:
        """Push ``weights`` (Hugging Face checkpoint names) to every server, as ``policy_version``.

        A server that cannot be reached is left out: it answers the next round as stale, until a later push reaches it.
        An engine made with ``pushes=False`` runs through ``weights`` and waits until the pushing one is done.

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
        stream = checked_weights(weights, self._facts)
        if self._pushes:
            self._push(stream, policy)
        else:
            for _ in stream:
                continue
            self._await(policy)
        self._policy = policy

    def restore(self, model_dir: str | Path) -> None:
        """Give every server the weights of the checkpoint, as policy version 0.

        Whatever would keep a push from working is met here, and not after the first rollout.

        Raises:
            EngineError: when a server does not take them.
        """
        if not self._pushes:
            self._await(self._policy)
            return
        self._push(checkpoint_tensors(model_dir), self._policy)
        if behind := [s.url for s in self._servers if s.status().policy != self._policy]:
            raise EngineError(
                f"{', '.join(behind)} did not take the weights of {model_dir} at the start, so no later push would work "
                "either; start it again, and see that it reaches the trainer and rollout.weights_dir"
            )

    def close(self) -> None:
        """Close the connections; the servers stay. Calling it twice is allowed."""
        if not self._is_closed:
            self._is_closed = True
            for server in self._servers:
                server.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineError("the server engine is closed; make a new one")

    def _agreed_description(self, dtype: str, record_routes: bool) -> EngineDescription:
        """Ask every server what it is, before anything is sampled."""
        told = {}
        for server in self._servers:
            description = server.status().description
            check_server(server, description, self._facts, dtype, record_routes)
            server.check()
            told[server.url] = description
        different = set(told.values())
        if len(different) > 1:
            raise RecipeError(
                f"the servers differ: {told}; start all of them with the same model, number format and release"
            )
        return different.pop()

    def _serve(self, server: RolloutServer, work: _Round, sampling: SamplingParams) -> None:
        """Let one server work on a round until nothing is left to do, or it fails too often in a row."""
        while (place := work.take(server.url)) is not None:
            try:
                (group,) = server.generate(
                    [work.requests[place]],
                    sampling,
                    policy=self._policy,
                    description=self._description,
                )
            except CallError as error:
                with self._lock:
                    self._faults[error.fault] += 1
                time.sleep(work.give_back(place, server.url, error))
            except BaseException as error:
                work.stop(error)
                raise
            else:
                named = tuple(replace(c, server=server.url) for c in group.completions)
                work.finish(place, server.url, replace(group, completions=named))

    def _push(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        policy: PolicyName,
        servers: Sequence[RolloutServer] | None = None,
    ) -> None:
        left = list(self._servers if servers is None else servers)
        errors: list[CallError] = []
        with (
            weight_parts(weights, folder=self._weights_dir) as parts,
            ThreadPoolExecutor(len(left)) as threads,
        ):

            def at_all(call: str, *args: object) -> None:
                calls = [(s, threads.submit(getattr(s, call), *args)) for s in list(left)]
                for server, result in calls:
                    try:
                        result.result()
                    except CallError as error:
                        self._faults[error.fault] += 1
                        errors.append(error)
                        left.remove(server)

            for part in parts:
                at_all("put_weights", part)
            at_all("commit_weights", policy)
        if not left:
            raise EngineError(
                f"no server took policy version {policy.policy_version}: {'; '.join(map(str, errors))}; start them again "
                "and resume the run"
            )

    def _await(self, policy: PolicyName) -> None:
        """Wait until a server holds the weights that another rank pushes."""
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            for server in self._servers:
                try:
                    if server.status().policy == policy:
                        return
                except CallError as error:
                    self._faults[error.fault] += 1
            time.sleep(_BACKOFF_S)
        raise EngineError(
            f"no server held policy version {policy.policy_version} within {self._timeout_s:.0f} s; the rank that pushes "
            "has failed"
        )


class _Round:
    """The requests of one call: which wait, which are out, what came back."""

    def __init__(
        self, requests: Sequence[Request], max_attempts: int, urls: AbstractSet[str]
    ) -> None:
        self.requests = requests
        self._max_attempts = max_attempts
        self._left = set(urls)
        self._waiting = deque(range(len(requests)))
        self._num_out = 0
        self._groups: dict[int, RolloutGroup] = {}
        self._errors: dict[int, list[CallError]] = {}
        self._failures_in_a_row: Counter[str] = Counter()
        self._stopped: BaseException | None = None
        self._turn = threading.Condition()

    def take(self, url: str) -> int | None:
        """Return the place of a request for the server at ``url``; None when there is nothing more for it to do."""
        with self._turn:
            self._turn.wait_for(lambda: self._waiting or not self._num_out or self._stopped)
            if self._stopped or not self._waiting or url not in self._left:
                return None
            self._num_out += 1
            return self._waiting.popleft()

    def finish(self, place: int, url: str, group: RolloutGroup) -> None:
        """Keep what came back."""
        with self._turn:
            self._groups[place] = group
            self._failures_in_a_row[url] = 0
            self._num_out -= 1
            self._turn.notify_all()

    def give_back(self, place: int, url: str, error: CallError) -> float:
        """Let another call try a request that failed, unless it failed too often; return the seconds to wait."""
        with self._turn:
            self._num_out -= 1
            self._failures_in_a_row[url] += 1
            # Weights do not come back by asking again.
            is_stale = error.fault is Fault.STALE
            too_often = self._failures_in_a_row[url] >= _MAX_FAILURES_IN_A_ROW
            if is_stale or (too_often and self._left != {url}):
                self._left.discard(url)
            errors = self._errors.setdefault(place, [])
            errors.append(error)
            if len(errors) >= self._max_attempts:
                self._stopped = EngineError(
                    f"request {self.requests[place].request_id} failed {len(errors)} times, last: {error}; the run can be "
                    "resumed when the servers work"
                )
            else:
                self._waiting.append(place)
            self._turn.notify_all()
            failures = min(self._failures_in_a_row[url], _MAX_FAILURES_IN_A_ROW)
            return 0.0 if is_stale else _BACKOFF_S * 2 ** (failures - 1)

    def abandon(self, error: BaseException) -> None:
        """End the round for a caller that no longer waits for it."""
        with self._turn:
            self._stopped = error
            self._turn.notify_all()

    def stop(self, error: BaseException) -> None:
        """End the round with an error that no other server would mend."""
        with self._turn:
            self._num_out -= 1
            self._stopped = error
            self._turn.notify_all()

    def progress(self) -> RolloutProgress:
        """Return how far this round is."""
        with self._turn:
            finished = [c for group in self._groups.values() for c in group.completions]
        return RolloutProgress(
            num_finished=len(finished),
            num_total=sum(request.num_generations for request in self.requests),
            num_tokens=sum(len(completion.token_ids) for completion in finished),
        )

    def results(self) -> list[RolloutGroup]:
        """Return all groups in order, or raise what kept one of them away."""
        if self._stopped is not None:
            raise self._stopped
        if self._waiting:
            last = {str(errors[-1]) for errors in self._errors.values()}
            raise EngineError(
                f"{len(self._waiting)} of {len(self.requests)} requests are left and no server is: {'; '.join(sorted(last))}; "
                "start the servers again and resume the run"
            )
        return [self._groups[place] for place in range(len(self.requests))]
