"""The page of one or more runs: a single HTML file that loads nothing."""

from moe_replay.report.page.runs import RunView, open_runs
from moe_replay.report.page.write import page_of

__all__ = ["RunView", "open_runs", "page_of"]
