"""Where user code is and how it failed, in words."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

_NOT_USER_CODE = (
    *(path for name, path in sysconfig.get_paths().items() if name.endswith("lib")),
    str(Path(__file__).parents[1]),
    "<frozen",
)


def describe_error(error: BaseException) -> str:
    """Return type and message of an exception, and the line of user code that raised it."""
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - the seam: the user's exception
        message = "(its message cannot be read)"
    if isinstance(error, SystemExit):
        message = f"{message} (it tried to exit the program)"
    where = user_line(
        [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    )
    text = f"{type(error).__name__}: {message[:2000]}" if message else type(error).__name__
    return f"{text} ({where})" if where else text


def user_line(frames: list[tuple[str, int]]) -> str:
    """Return ``file.py, line N`` of the innermost frame of user code, or ""."""
    for filename, line in reversed(frames):
        if not filename.startswith(_NOT_USER_CODE):
            return f"{filename}, line {line}"
    return ""
