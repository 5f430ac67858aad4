"""The bearer token that a rollout server and its trainers share, kept in a file so that no command line shows it.

In: a path. Out: a token. Called by: cli.serve, grpo.engines.
"""

from __future__ import annotations

from pathlib import Path

from moe_replay.errors import RecipeError

_LEAST_LENGTH = 16


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
    if len(token) < _LEAST_LENGTH or not token.isascii() or len(token.split()) != 1:
        raise RecipeError(
            f"{path} holds a bearer token of {len(token)} characters, expected at least {_LEAST_LENGTH} ASCII "
            "characters without spaces, such as the output of `openssl rand -hex 32`"
        )
    return token
