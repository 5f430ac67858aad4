"""What a test of an engine leaves open is closed, also where it failed: the next starts afresh."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .server_case import OPENED


@pytest.fixture(autouse=True)
def closes_engines() -> Iterator[None]:
    yield
    while OPENED:
        # Twice is allowed.
        OPENED.pop().close()
