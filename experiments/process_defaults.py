"""Sets what torch and vLLM read from the environment when they are imported: import this first."""

from __future__ import annotations

import os

from moe_replay.cli.environment import set_defaults

set_defaults(os.environ)
