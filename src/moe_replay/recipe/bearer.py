"""Secrets of rollout servers: the file with the bearer token, and texts without credentials."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from moe_replay.errors import RecipeError

_MIN_LENGTH = 16
MASK = "***"
"""What stands for a secret in everything that is printed or written."""
# user:password@ of an address; a slash or a quote ends the part that can hold them.
_USER = re.compile(r"(?<=://)[^\s/'\"]+(?=@)")
_QUERY = re.compile(
    r"([?&][^=&\s]*(?:key|token|secret|password|signature)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE
)


def read_token(path: Path | None) -> str | None:
    """Return the bearer token in a file; None without a file.

    Raises:
        RecipeError: when the file cannot be read, or its token is too short or has spaces in it.
    """
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the bearer token cannot be read: {error}") from error
    if len(token) < _MIN_LENGTH or not token.isascii() or len(token.split()) != 1:
        raise RecipeError(
            f"{path} holds a bearer token of {len(token)} characters, expected at least "
            f"{_MIN_LENGTH} ASCII characters without spaces, such as the output of "
            "`openssl rand -hex 32`"
        )
    return token


def exposure(path: Path | None) -> str | None:
    """Return a warning when other users can read the token file; None when only its owner can."""
    try:
        mode = 0 if path is None else path.stat().st_mode
    except OSError:
        return None  # `read_token` says what is wrong.
    if not mode & (stat.S_IRGRP | stat.S_IROTH):
        return None
    return (
        f"warning: {path} holds a bearer token and has mode {stat.S_IMODE(mode):04o}, so other "
        f"users of this machine can read it: chmod 600 {path}"
    )


def without_secrets(text: str) -> str:
    """Return ``text`` with the credentials of every address in it masked.

    Examples:
        >>> without_secrets("http://me:pa55@host:8000 does not answer")
        'http://***@host:8000 does not answer'
    """
    return _QUERY.sub(rf"\1{MASK}", _USER.sub(MASK, text))
