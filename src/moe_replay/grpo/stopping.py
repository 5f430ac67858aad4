"""A run that is asked to stop: by a signal, Ctrl-C, its time limit, or the calling program.

Signals are received at once, also while the main thread is inside a long call of torch. What they
do waits for a safe point: between two steps, or at once while nothing but sampling and rewards is
under way, which is then dropped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
"""Requests to stop: schedulers send the first or last, a lost terminal the second."""
# Wakes the main thread for a request that came from another one. Nothing else here uses it.
_WAKE = signal.SIGUSR2
# A launcher passes on what the whole group of processes has received already.
_SAME_REQUEST_S = 10.0


class StopRequested(KeyboardInterrupt):
    """Breaks off sampling; a kind of Ctrl-C, so libraries clean up and no retry swallows it."""


class StepDropped(Exception):
    """All ranks have agreed to drop the step in flight; the state is that of the step before."""


class StopRequest:
    """Whether a run should stop, and why. Any thread may ask; the main thread runs the run."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._reason: str | None = None
        self._may_break_off = False
        self._is_listening = False
        self._timer: threading.Timer | None = None

    @property
    def reason(self) -> str | None:
        """What asked, such as ``SIGTERM``; None while nothing has."""
        return self._reason

    def ask(self, reason: str) -> None:
        """Ask the run to stop; the first reason is kept."""
        self._reason = self._reason or reason
        main = threading.main_thread()
        if self._is_listening and threading.current_thread() is not main and main.ident:
            signal.pthread_kill(main.ident, _WAKE)

    def ask_after(self, seconds: float, reason: str) -> None:
        """Ask it to stop ``seconds`` after this object was made."""
        left = max(0.0, self._started + seconds - time.monotonic())
        self._timer = threading.Timer(left, self.ask, [reason])
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """Forget the time limit."""
        if self._timer is not None:
            self._timer.cancel()

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Let a request break off what is inside, at any moment, by `StopRequested`.

        Nothing inside may be needed afterwards, be collective, or belong to another thread than the
        main one.
        """
        self._may_break_off = True
        try:
            self.break_off()
            yield
        finally:
            self._may_break_off = False

    def break_off(self) -> None:
        """Raise `StopRequested` if there is a request and it may break off; for signal handlers."""
        if self._may_break_off and self._reason is not None:
            # Once: what cleans up after the exception must not be broken off in its turn.
            self._may_break_off = False
            raise StopRequested(self._reason)

    @contextmanager
    def listening(self, *, forwards: bool, say: Callable[[str], None]) -> Iterator[None]:
        """Take `SIGNALS` as requests; the second ends the process at once. Main thread only.

        ``forwards`` tells that a launcher is above this process: what comes shortly after the first
        signal is then the same request, passed on.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = {number: signal.getsignal(number) for number in (*SIGNALS, _WAKE)}
        earlier_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        owner = os.getpid()

        def handle(number: int, _: object) -> None:
            if os.getpid() != owner:
                return
            if number != _WAKE:
                self.ask(signal.Signals(number).name)
            self.break_off()

        def leave() -> None:
            """Let a process that was forked from this one be reached by its own signals only."""
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)

        for number in before:
            signal.signal(number, handle)
        os.register_at_fork(after_in_child=lambda: leave() if self._is_listening else None)
        watcher = threading.Thread(
            target=self._watch, args=(reader, forwards, say), name="stop-signals", daemon=True
        )
        watcher.start()
        self._is_listening = True
        try:
            yield
        finally:
            self._is_listening = False
            signal.set_wakeup_fd(earlier_fd)
            for number, handler in before.items():
                signal.signal(number, handler)
            writer.close()
            watcher.join()
            reader.close()

    def _watch(self, reader: socket.socket, forwards: bool, say: Callable[[str], None]) -> None:
        """Count the signals, also while the main thread cannot run its handlers."""
        first: float | None = None
        while received := reader.recv(64):
            for number in received:
                if number not in SIGNALS:
                    continue
                now, name = time.monotonic(), signal.Signals(number).name
                if first is None:
                    first = now
                    self.ask(name)
                    say(
                        f"{name}: stopping, and saving what is finished; a second signal ends the process at once"
                    )
                elif not (forwards and now - first < _SAME_REQUEST_S):
                    end_at_once(
                        number, f"{name}: ended at once, unsaved; earlier checkpoints are complete"
                    )


def end_at_once(number: int, message: str) -> None:
    """End this process as a signal would, from any thread; only the terminal is cleaned up."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h\n")
        os.write(2, f"{message}\n".encode())
    os._exit(128 + number)
