"""Which Megatron-Core releases are supported, checked before the first import of it.

In: the installed distribution's metadata. Out: its version, or a refusal.
"""

from __future__ import annotations

from importlib import metadata

from moe_replay.errors import UnsupportedError

LOWEST = (0, 16)
BELOW = (0, 20)


def installed_version() -> tuple[int, int] | None:
    """Return (major, minor) of the installed megatron-core, or None where it is not installed."""
    try:
        text = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return None
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def check_installed() -> tuple[int, int]:
    """Return the installed version if it is one that replay was verified against.

    Raises:
        UnsupportedError: megatron-core is missing or outside `>=0.16,<0.20`.
    """
    version = installed_version()
    bound = f">={LOWEST[0]}.{LOWEST[1]},<{BELOW[0]}.{BELOW[1]}"
    if version is None:
        raise UnsupportedError(
            f"megatron-core is not installed; moe_replay.megatron needs {bound}. "
            f"Install it with: pip install 'megatron-core{bound}'"
        )
    check_version(version)
    return version


def check_version(version: tuple[int, int]) -> None:
    """Refuse a (major, minor) outside the supported range.

    Raises:
        UnsupportedError: the router replay hook of that release is absent or unverified.
    """
    if LOWEST <= version < BELOW:
        return
    bound = f">={LOWEST[0]}.{LOWEST[1]},<{BELOW[0]}.{BELOW[1]}"
    cause = "has no router replay hook" if version < LOWEST else "was never verified"
    raise UnsupportedError(
        f"megatron-core {version[0]}.{version[1]} is installed, expected {bound}: "
        f"that release {cause}. Install one in range: pip install 'megatron-core{bound}'"
    )
