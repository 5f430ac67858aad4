"""docs/errors.md has a row for every error class, and for no other."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from moe_replay import errors

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"


def test_every_error_has_a_row():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    classes = [
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind)
        and issubclass(kind, errors.MoeReplayError)
        and kind is not errors.MoeReplayError
    ]
    assert rows == classes
