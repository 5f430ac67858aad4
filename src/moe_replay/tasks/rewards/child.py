"""The trainer's handle of the reward process: its pipes, its end, and its output."""

from __future__ import annotations

import codecs
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from moe_replay.errors import RewardError
from moe_replay.tasks.rewards.user_code import user_line
from moe_replay.tasks.rewards.wire import take_frame

_BOOT = (
    "import sys; sys.path[:] = sys.argv[6:]; from importlib import import_module; "
    "import_module(sys.argv[5]).main(*map(int, sys.argv[1:5]))"
)
GRACE_S = 5.0
"""Extra seconds for an exit, and for an async function, which its own process stops at the
limit."""
_LOOK_MS = 500
"""Interval of checks on a silent process."""
_CHUNK = 1 << 20


class ChildGone(Exception):
    """The process has ended, in the way that the message says."""


class ChildSilent(Exception):
    """The process has missed a deadline."""


class Child:
    """A running process for user code, of reward functions unless told otherwise, and its pipes."""

    def __init__(self, module: str = "moe_replay.tasks.rewards.worker") -> None:
        """Start ``main`` of a module, which serves as `tasks.rewards.worker` does."""
        self._owner = os.getpid()
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        life, self._life = os.pipe()
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill
        passed = (requests, answers, life, self._stacks.fileno())
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, *map(str, passed), module, *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=passed,
                # Ctrl-C and signals to the trainer's group do not reach it, and it can be killed
                # with its children.
                start_new_session=True,
            )
        except OSError as error:
            raise RewardError(f"the reward process cannot be started: {error}") from error
        finally:
            for fd in (requests, answers, life):
                os.close(fd)
        os.set_blocking(self._requests, False)
        os.set_blocking(self._answers, False)
        self._buffer = bytearray()
        assert self._process.stdout is not None and self._process.stderr is not None
        streams = {"stdout": self._process.stdout, "stderr": self._process.stderr}
        self._printer = threading.Thread(target=_pass_on, args=(streams,), daemon=True)
        self._printer.start()

    def send(self, parts: Sequence[bytes], deadline: float) -> None:
        """Write a frame."""
        for part in parts:
            view = memoryview(part)
            while view:
                try:
                    view = view[os.write(self._requests, view[:_CHUNK]) :]
                except BlockingIOError:
                    self._wait(writes=True, deadline=deadline)
                except BrokenPipeError:
                    raise ChildGone(self._how_it_ended()) from None

    def receive(self, deadline: float) -> dict[str, Any]:
        """Return the next event."""
        while (event := self._take()) is None:
            try:
                read = os.read(self._answers, _CHUNK)
            except BlockingIOError:
                self._wait(writes=False, deadline=deadline)
                continue
            if not read:
                raise ChildGone(self._how_it_ended())
            self._buffer += read
        return event

    def _take(self) -> dict[str, Any] | None:
        try:
            return take_frame(self._buffer)
        except ValueError:
            raise ChildGone("wrote to a file descriptor that it did not open") from None

    def _wait(self, *, writes: bool, deadline: float) -> None:
        """Wait for the pipe, unless the process has ended and only a child of it holds the pipe."""
        ended = self._has_ended()
        # Not select, which cannot handle descriptors above 1023.
        ready = select.poll()
        ready.register(
            *((self._requests, select.POLLOUT) if writes else (self._answers, select.POLLIN))
        )
        if ready.poll(0 if ended else _LOOK_MS):
            return
        if ended:
            raise ChildGone(self._how_it_ended())
        if time.monotonic() > deadline:
            raise ChildSilent

    def _has_ended(self) -> bool:
        # Leaves the exit status, so that its pid is not reused before its group is killed.
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        with suppress(ChildProcessError):
            return os.waitid(os.P_PID, self._process.pid, options) is not None
        return True

    def _how_it_ended(self) -> str:
        self._wait_for_exit(GRACE_S)
        if not self._has_ended():
            return "closed the pipes of its process"
        stack = self._stack()
        code = self._end_group()
        at = f", at {where}" if (where := _line_of(stack)) else ""
        if code >= 0:
            return f"ended its process with exit code {code}{at}"
        name = signal.Signals(-code).name
        memory = " (often: the machine is out of memory)" if -code == signal.SIGKILL else ""
        return f"had its process killed by {name}{memory}{at}"

    def where_it_stands(self) -> str:
        """Return the line of user code that the process is running."""
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGUSR1)
        until = time.monotonic() + GRACE_S
        while not (line := _line_of(self._stack())) and time.monotonic() < until:
            if self._has_ended():
                break
            time.sleep(0.05)
        return line

    def _stack(self) -> str:
        self._stacks.seek(0)
        return self._stacks.read().decode(errors="replace")

    def close(self) -> None:
        """Let the process exit, which runs the exit handlers of user code, then kill it."""
        if os.getpid() == self._owner and not self._stacks.closed:
            self._close_pipe("_requests")
            self._wait_for_exit(GRACE_S)
            self.kill()

    def kill(self) -> None:
        """Kill the process and its children; may be called twice."""
        # A fork of the trainer has a copy of this object, but does not own the process.
        if os.getpid() != self._owner or self._stacks.closed:
            return
        self._end_group()
        for name in ("_requests", "_answers", "_life"):
            self._close_pipe(name)
        self._stacks.close()
        self._printer.join(GRACE_S)

    def interrupt(self) -> None:
        """Kill the process and its children, and leave the pipes to the thread that reads them."""
        if os.getpid() == self._owner and self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _close_pipe(self, name: str) -> None:
        if (fd := getattr(self, name)) >= 0:
            os.close(fd)
            setattr(self, name, -1)

    def _wait_for_exit(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._has_ended() and time.monotonic() < until:
            time.sleep(0.01)

    def _end_group(self) -> int:
        """Kill the process and its remaining children; return its exit code."""
        self.interrupt()
        return self._process.wait()


def _pass_on(streams: Mapping[str, IO[bytes]]) -> None:
    """Copy the output of user code to the trainer's current stdout and stderr."""
    decoder = codecs.getincrementaldecoder("utf-8")
    names = {stream.fileno(): (name, decoder("replace")) for name, stream in streams.items()}
    ready = select.poll()
    for fd in names:
        ready.register(fd, select.POLLIN)
    while names:
        for fd, _ in ready.poll():
            name, text = names[fd]
            read = os.read(fd, _CHUNK)
            with suppress(OSError, ValueError):
                getattr(sys, name).write(text.decode(read, final=not read))
                getattr(sys, name).flush()
            if not read:
                ready.unregister(fd)
                del names[fd]
    for stream in streams.values():
        stream.close()


def _line_of(stack: str) -> str:
    """Return the innermost line of user code in a faulthandler dump, innermost frame first."""
    frames = re.findall(r'^  File "(.*)", line (\d+)', stack, flags=re.MULTILINE)
    return user_line([(name, int(line)) for name, line in reversed(frames)])
