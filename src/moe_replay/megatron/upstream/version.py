"""Which Megatron-Core releases are supported, checked before the first import of it."""

from __future__ import annotations

from importlib import metadata

from moe_replay.errors import UnsupportedError

LOWEST, BELOW = (0, 16), (0, 20)
_BOUND = ">=0.16,<0.20"


def check_installed() -> tuple[int, int]:
    """Return the installed (major, minor) version if replay was verified against it.

    Raises:
        UnsupportedError: megatron-core is missing or outside `>=0.16,<0.20`.
    """
    try:
        major, minor = metadata.version("megatron-core").split(".")[:2]
    except metadata.PackageNotFoundError:
        raise UnsupportedError(
            f"megatron-core is not installed; moe_replay.megatron needs {_BOUND}. "
            f"Install it with: pip install 'megatron-core{_BOUND}'"
        ) from None
    return check_version((int(major), int(minor)))


def check_version(version: tuple[int, int]) -> tuple[int, int]:
    """Return a (major, minor) version of the supported range.

    Raises:
        UnsupportedError: the router replay hook of that release is absent or unverified.
    """
    if LOWEST <= version < BELOW:
        return version
    cause = "has no router replay hook" if version < LOWEST else "was never verified"
    raise UnsupportedError(
        f"megatron-core {version[0]}.{version[1]} is installed, expected {_BOUND}: "
        f"that release {cause}. Install one in range: pip install 'megatron-core{_BOUND}'"
    )
