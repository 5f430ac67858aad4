"""`moe-replay report`: a page of one or more runs, in a single HTML file that loads nothing."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

from moe_replay.errors import RunDirectoryError
from moe_replay.report.page import open_runs, page_of


def run_report(options: argparse.Namespace) -> int:
    """Write the page and say where it is.

    Raises:
        RunDirectoryError: a folder is not a run directory, or the page cannot be written.
        CheckpointError: a record file is damaged.
    """
    runs = open_runs(options.runs)
    out = Path(options.out) if options.out else Path(options.runs[0]) / "report.html"
    page = page_of(runs, written_at=datetime.now().astimezone())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write {out}: {error.strerror}; name another file with --out FILE.html"
        ) from error
    print(f"{out.absolute()} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser")
    return 0
