"""The work of one call to the server engine: what waits, runs and came back, and when to give up.

In: requests, completions and failures of servers. Out: groups in order, or why one is missing.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from moe_replay.engines.serve.messages import Progress
from moe_replay.engines.servers.contract import Ask
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.types import Completion, RolloutGroup, RolloutProgress
from moe_replay.errors import EngineError

# A server that fails this often in a row is not asked until the next round, unless it is the last.
_MAX_FAILURES_IN_A_ROW = 4
# First wait after a failure; each further one in a row doubles it.
_BACKOFF_S = 0.25
# Maximum of redraws by other noise in a run: this many, or this share of its completions.
_MAX_REDRAWS, _MAX_REDRAWN_FRAC = 8, 0.01


class Round:
    """What one call of `generate` asks for, one `Ask` a request. Threads work on it together."""

    def __init__(self, asks: Sequence[Ask], max_attempts: int, urls: AbstractSet[str]) -> None:
        self._asks = {ask.request.request_id: ask for ask in asks}
        self._max_attempts = max_attempts
        self._left = set(urls)
        self._waiting = deque(self._asks)
        self._num_out = 0
        self._tokens_under_way: dict[int, int] = {}
        self._completions: dict[int, dict[int, Completion]] = {id_: {} for id_ in self._asks}
        self._errors: dict[int, list[CallError]] = {}
        self._failures_in_a_row: Counter[str] = Counter()
        self._began: dict[str, CallError] = {}
        self._said: dict[str, CallError] = {}
        self._stopped: BaseException | None = None
        self._turn = threading.Condition()

    @property
    def is_stopped(self) -> bool:
        """Whether the rest of this round is no longer wanted."""
        return self._stopped is not None

    def take(self, url: str) -> Ask | None:
        """Return something to do for the server at ``url``; None if there is nothing more."""
        with self._turn:
            self._turn.wait_for(lambda: self._waiting or not self._num_out or self._stopped)
            if self._stopped or not self._waiting or url not in self._left:
                return None
            self._num_out += 1
            ask = self._asks[self._waiting.popleft()]
            have = self._completions[ask.request.request_id]
            return replace(ask, numbers=tuple(n for n in ask.numbers if n not in have))

    def keep(self, ask: Ask, url: str, number: int, completion: Completion) -> None:
        """Keep one completion, unless it came before."""
        with self._turn:
            known = self._completions[ask.request.request_id]
            known.setdefault(number, replace(completion, server=url))

    def note(self, ask: Ask, progress: Progress) -> None:
        """Record how far a running call is."""
        with self._turn:
            self._tokens_under_way[ask.request.request_id] = progress.num_tokens

    def num_missing(self, ask: Ask) -> int:
        """Return how many completions of a request have not come back."""
        with self._turn:
            return ask.request.num_generations - len(self._completions[ask.request.request_id])

    def finish(self, ask: Ask, url: str) -> None:
        """Record that a request has all of its completions."""
        assert self.num_missing(ask) == 0
        with self._turn:
            self._failures_in_a_row[url] = 0
            self._back(ask)

    def give_back(self, ask: Ask, url: str, error: CallError) -> None:
        """Queue again what failed, or stop if it failed too often; return after a pause."""
        with self._turn:
            self._back(ask)
            if not self._failures_in_a_row[url]:
                self._began[url] = error
            if error.fault is not Fault.UNREACHABLE:
                self._said[url] = error
            self._failures_in_a_row[url] += 1
            # Weights do not come back by asking again.
            is_stale = error.fault is Fault.STALE
            too_often = self._failures_in_a_row[url] >= _MAX_FAILURES_IN_A_ROW
            if is_stale or (too_often and self._left != {url}):
                self._left.discard(url)
            errors = self._errors.setdefault(ask.request.request_id, [])
            errors.append(error)
            if len(errors) >= self._max_attempts:
                self._stop(
                    EngineError(
                        f"request {ask.request.request_id} failed {len(errors)} times, last: {error}"
                        f"{self._cause(url, error)}; the run can be resumed when the servers work"
                    )
                )
            else:
                self._waiting.append(ask.request.request_id)
            self._turn.notify_all()
            failures = min(self._failures_in_a_row[url], _MAX_FAILURES_IN_A_ROW)
            if not is_stale:
                pause_s = _BACKOFF_S * 2 ** (failures - 1)
                self._turn.wait_for(lambda: self._stopped is not None, timeout=pause_s)

    def _cause(self, url: str, error: CallError) -> str:
        """Return what made a server fail, if ``error``, its last failure, does not say it."""
        cause = str(self._cause_of_row(url))
        return "" if cause == str(error) else f"; its server failed first of: {cause}"

    def _cause_of_row(self, url: str) -> CallError:
        """Return the failure of a server that explains those after it.

        That is the first of a row. A server that reports the end of its engine cannot be reached a
        moment later, which alone explains nothing; and a call that another replica of its engine
        still answers may come between the two, so what it reported counts then.
        """
        began = self._began[url]
        return self._said.get(url, began) if began.fault is Fault.UNREACHABLE else began

    def put_down(self, ask: Ask, error: BaseException) -> None:
        """Record that a call was given up, and end the round."""
        with self._turn:
            self._stop(error)
            self._back(ask)

    def _back(self, ask: Ask) -> None:
        self._num_out -= 1
        self._tokens_under_way.pop(ask.request.request_id, None)
        # Threads in `take` wait for the last one: woken each time, n would wake n * n / 2 times.
        if not self._num_out:
            self._turn.notify_all()

    def stop(self, error: BaseException) -> None:
        """End the round with an error that no retry would fix; the first one is kept."""
        with self._turn:
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        self._stopped = self._stopped or error
        self._turn.notify_all()

    def progress(self) -> RolloutProgress:
        """Return how far this round is."""
        with self._turn:
            finished = [c for known in self._completions.values() for c in known.values()]
            under_way = sum(self._tokens_under_way.values())
        return RolloutProgress(
            num_finished=len(finished),
            num_total=sum(len(ask.numbers) for ask in self._asks.values()),
            num_tokens=under_way + sum(len(completion.token_ids) for completion in finished),
        )

    def results(self) -> list[RolloutGroup]:
        """Return all groups in order, or raise why one is missing."""
        if self._stopped is not None:
            raise self._stopped
        if self._waiting:
            causes = {str(errors[-1]) for errors in self._errors.values()}
            causes |= {
                str(self._cause_of_row(url))
                for url, count in self._failures_in_a_row.items()
                if count
            }
            raise EngineError(
                f"{len(self._waiting)} of {len(self._asks)} requests are left and no server is: "
                f"{'; '.join(sorted(causes))}; start the servers again and resume the run"
            )
        return [
            RolloutGroup(
                request=ask.request,
                completions=tuple(self._completions[id_][number] for number in ask.numbers),
            )
            for id_, ask in self._asks.items()
        ]


class Redraws:
    """Completions drawn again by other noise, after a failure that their content may have caused.

    What is drawn again is another completion, so training sees only those that did not fail. A time
    limit, a cut or a damaged answer affects long completions more often: of lengths 10 and 1000, if
    the long one always fails, only tens remain. If a share of x is drawn again, the distribution
    that training sees is off by at most x in total variation, hence the bound. A server that died
    is not counted: its death does not depend on one completion.
    """

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()
        self._incidents: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """How many there were."""
        return self._kinds.total()

    def add(
        self, error: CallError, *, num_missing: int, num_sampled: int, url: str
    ) -> EngineError | None:
        """Count what a failure cost; return the error that ends the run when it is too much.

        The silence of a server, which has an index, counts once and not for each call that it
        ended.
        """
        with self._lock:
            if error.incident is None:
                self._kinds[error.fault.value] += num_missing
            elif (url, error.incident) not in self._incidents:
                self._incidents.add((url, error.incident))
                self._kinds[error.fault.value] += 1
            if self._kinds.total() <= max(_MAX_REDRAWS, _MAX_REDRAWN_FRAC * num_sampled):
                return None
            kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self._kinds.items()))
        return EngineError(
            f"{self.count} completions were drawn again by other noise after failures ({kinds}), "
            f"{num_sampled} came back; expected at most {_MAX_REDRAWS}, or {_MAX_REDRAWN_FRAC:.0%}. "
            "Long completions fail more often, so going on would train on short ones. Last: "
            f"{error}. Let the servers draw by the run's seed, so that a completion drawn again is "
            "the same (vLLM: --logits-processors, SGLang: --enable-deterministic-inference, see "
            "docs/engines.md), or fix what fails: a proxy's time limit, too little room, a server "
            "that hangs; then resume the run"
        )
