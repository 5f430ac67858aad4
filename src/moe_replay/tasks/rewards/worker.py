"""The reward process: user code runs here, where it can only affect itself.

Sync functions run on the main thread, so that time limits based on signals work. Async functions
share one event loop in its own thread, which never stops, so that clients and semaphores live for
the whole run.

In: frames (`wire`): functions to load, then batches to score. Out: frames: the outcome of each
function.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import faulthandler
import fcntl
import inspect
import math
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from numbers import Real
from typing import Any, Protocol

from moe_replay.errors import RecipeError
from moe_replay.tasks.chat_messages import excerpt
from moe_replay.tasks.rewards.call_arguments import CallBatch
from moe_replay.tasks.rewards.functions import MetricLog, Signature, load_function
from moe_replay.tasks.rewards.user_code import describe_error, user_line
from moe_replay.tasks.rewards.wire import decode_value, pack_frame, read_frame

_MAX_TRACE = 20_000
# SIGUSR1 belongs to faulthandler.
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


class Answers(Protocol):
    """What handles the requests of a process for user code."""

    def answer(self, request: Mapping[str, Any], blob: bytes) -> None:
        """Handle a request."""
        ...


def main(requests: int, answers: int, life: int, stacks: int) -> None:
    """Serve reward functions, see `serve`."""
    serve(requests, answers, life, stacks, make=_Worker)


def serve(
    requests: int, answers: int, life: int, stacks: int, *, make: Callable[[int], Answers]
) -> None:
    """Serve requests until their pipe is closed; the arguments are file descriptors.

    ``make`` takes the one for answers, which `send_event` writes to.

    ``life`` is a pipe that the trainer never writes to: when its other end closes, the trainer has
    ended. ``stacks`` is a file for the stack after a crash, or, on SIGUSR1, of a function that does
    not return.
    """
    for fd in (requests, answers, life, stacks):
        # Processes that user code starts must not keep them open.
        os.set_inheritable(fd, False)
    _die_with_the_trainer(life)
    _outlive_a_stop()
    faulthandler.enable(file=stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks)
    sys.argv[:] = ["moe-replay"]
    repair_streams(at_start=True)
    worker = make(answers)
    with os.fdopen(requests, "rb") as stream:
        while (frame := read_frame(stream)) is not None:
            worker.answer(*frame)
            # Frees the texts of a step during the next rollout.
            del frame
    # Runs the exit handlers of user code; tearing down its libraries would only take seconds.
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def _die_with_the_trainer(life: int) -> None:
    """Have the kernel kill this process and its children when the trainer ends for any reason."""
    if hasattr(fcntl, "F_SETSIG"):
        # Works even in a function that never releases the interpreter, such as an endless regex.
        fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
        ready = select.poll()
        ready.register(life, select.POLLIN)
        if ready.poll(0):
            # The trainer has already ended.
            os._exit(0)
    else:
        threading.Thread(target=_wait_for_the_end, args=(life,), daemon=True).start()


def _wait_for_the_end(life: int) -> None:
    os.read(life, 1)
    os.killpg(0, signal.SIGKILL)


def _outlive_a_stop() -> None:
    """Ignore stop signals of a scheduler: the trainer decides when the current step ends."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for signum in _STOPS:
        # A handler, not SIG_IGN, which programs started by user code would inherit.
        signal.signal(signum, lambda *_: None)
    os.register_at_fork(after_in_child=_stop_as_usual)


def _stop_as_usual() -> None:
    for signum in _STOPS:
        signal.signal(signum, signal.SIG_DFL)


def repair_streams(*, at_start: bool = False) -> None:
    """Reopen stdout and stderr if a function has closed them."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if at_start or stream is None or stream.closed:
            opened = open(  # noqa: SIM115 - lives as long as the process
                fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
            )
            setattr(sys, name, opened)


class _Worker:
    """The functions of a run, and the event loop of async ones."""

    def __init__(self, answers: int) -> None:
        self._answers = answers
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._specs: list[dict[str, Any]] = []
        self._functions: list[tuple[Callable[..., Any], Signature] | None] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def answer(self, request: Mapping[str, Any], blob: bytes) -> None:
        """Handle a request."""
        if request["op"] == "load":
            self._load(request)
        else:
            self._score(request, blob)

    def _load(self, request: Mapping[str, Any]) -> None:
        """Import every function, and report its signature or why it cannot be loaded."""
        for folder in reversed(request["folders"]):
            sys.path.insert(0, folder)
        self._specs = request["functions"]
        self._functions = []
        for number, spec in enumerate(self._specs):
            self._say(event="started", function=number)
            repair_streams()
            spec["args"] = decode_value(spec["args"])
            try:
                loaded = load_function(spec["function"], spec["args"])
            except RecipeError as error:
                self._functions.append(None)
                trace = trace_of(error.__cause__)
                self._say(event="refused", function=number, text=str(error), trace=trace)
            else:
                self._functions.append(loaded)
                signature = loaded[1]._asdict()
                self._say(event="loaded", function=number, signature=signature)
            self._leave_if_forked()
        self._say(event="finished")

    def _score(self, request: Mapping[str, Any], blob: bytes) -> None:
        """Call functions on a batch: async ones start first, and continue while the others run."""
        batch = CallBatch(request, blob)
        waiting: list[Future[None]] = []
        for number in sorted(request["functions"], key=lambda n: not self._is_async(n)):
            self._say(event="started", function=number)
            repair_streams()
            loaded, spec = self._functions[number], self._specs[number]
            assert loaded is not None, "a run does not start with a refused function"
            function, signature = loaded
            log = MetricLog()
            part = batch.of_function(number)
            try:
                result = function(**part.arguments(signature, spec["args"], log))
            except BaseException as error:  # noqa: BLE001 - the seam: the user's code
                self._say_raised(number, error)
            else:
                if inspect.isawaitable(result):
                    waiting.append(self._submit(number, result, part.size, log))
                else:
                    self._say_scores(number, result, part.size, log)
            self._leave_if_forked()
        for future in waiting:
            future.result()
        self._say(event="finished")

    def _is_async(self, number: int) -> bool:
        loaded = self._functions[number]
        return loaded is not None and inspect.iscoroutinefunction(loaded[0])

    def _submit(
        self, number: int, awaitable: Awaitable[Any], size: int, log: MetricLog
    ) -> Future[None]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_run_for_ever, args=(self._loop,), daemon=True).start()
        # From here on this process enforces the time limit.
        self._say(event="waiting", function=number)
        finishing = self._finish(number, awaitable, size, log)
        return asyncio.run_coroutine_threadsafe(finishing, self._loop)

    async def _finish(
        self, number: int, awaitable: Awaitable[Any], size: int, log: MetricLog
    ) -> None:
        """Wait for an async function within its time limit, and report its outcome."""
        task = asyncio.ensure_future(awaited(awaitable))
        await asyncio.wait({task}, timeout=self._specs[number]["timeout_s"])
        if not task.done():
            self._say(event="late", function=number, where=_where_it_waits(awaitable))
            task.cancel()
            return
        error, result = task.result()
        if error is not None:
            self._say_raised(number, error)
        else:
            self._say_scores(number, result, size, log)

    def _say_raised(self, number: int, error: BaseException) -> None:
        self._say(
            event="raised", function=number, text=describe_error(error), trace=trace_of(error)
        )

    def _say_scores(self, number: int, result: Any, size: int, log: MetricLog) -> None:
        try:
            scores = checked_scores(result, size)
        except WrongAnswer as wrong:
            self._say(event="wrong", function=number, text=wrong.text, sample=wrong.sample)
        # Reading a foreign object runs its code.
        except BaseException as error:  # noqa: BLE001 - the seam: the user's code
            self._say_raised(number, error)
        else:
            self._say(event="scores", function=number, scores=scores, logged=log.sums)

    def _say(self, **event: Any) -> None:
        self._leave_if_forked()
        with self._lock:
            send_event(self._answers, event)

    def _leave_if_forked(self) -> None:
        """End a fork of this process that user code left running: it would send second answers."""
        if os.getpid() != self._pid:
            os._exit(1)


def send_event(answers: int, event: Mapping[str, Any]) -> None:
    """Write an event to the trainer."""
    for part in pack_frame(event):
        view = memoryview(part)
        while view:
            view = view[os.write(answers, view) :]


class WrongAnswer(Exception):
    """A reward function did not return one number or None for each completion."""

    def __init__(self, text: str, sample: int | None = None) -> None:
        super().__init__(text, sample)
        self.text = text
        self.sample = sample


def checked_scores(result: Any, size: int) -> list[float | None]:
    """Return the result of a function as floats and None.

    Raises:
        WrongAnswer: it is anything but ``size`` finite numbers or None.
    """
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        raise WrongAnswer(
            f"returned {_excerpt(result)} ({type(result).__name__}), expected a list of {size} numbers"
        )
    if len(values) != size:
        raise WrongAnswer(f"returned {len(values)} scores for {size} completions")
    return [_checked_score(value, sample) for sample, value in enumerate(values)]


def _checked_score(value: Any, sample: int) -> float | None:
    if value is None:
        return None
    plain = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(plain, Real):
        raise WrongAnswer(f"returned {_excerpt(value)}", sample)
    try:
        score = float(plain)
    except OverflowError:
        raise WrongAnswer("returned an integer too large for a float", sample) from None
    if not math.isfinite(score):
        raise WrongAnswer(f"returned {_excerpt(value)}", sample)
    return score


async def awaited(awaitable: Awaitable[Any]) -> tuple[BaseException | None, Any]:
    """Return the exception or result of an awaitable: a SystemExit would end the event loop."""
    try:
        return None, await awaitable
    except BaseException as error:  # noqa: BLE001 - the seam: the user's code
        return error, None


def _run_for_ever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        # A SystemExit in a task that user code started ends the loop, so run it again.
        try:
            loop.run_forever()
        except BaseException:  # noqa: BLE001 - the seam: the user's code
            traceback.print_exc()


def _where_it_waits(awaitable: Any) -> str:
    """Return the line of user code at which a coroutine waits."""
    frames: list[tuple[str, int]] = []
    while awaitable is not None and (frame := getattr(awaitable, "cr_frame", None)) is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno))
        awaitable = awaitable.cr_await
    return user_line(frames)


def trace_of(error: BaseException | None) -> str:
    """Return the traceback of an error, its end where it is long; ``""`` without one."""
    return "".join(traceback.format_exception(error))[-_MAX_TRACE:] if error is not None else ""


def _excerpt(value: object) -> str:
    try:
        return excerpt(value)
    except Exception:  # noqa: BLE001 - the seam: the user's object
        return f"a {type(value).__name__} that cannot be shown"
