"""Everything that touches Megatron-Core: it lives here so that no other package has to import it.

Importing this package, or any module of it, checks the installed Megatron-Core version and repairs
what Megatron misses on this machine (`moe_replay.megatron.upstream.repairs`).
"""

from __future__ import annotations

import importlib

from moe_replay.megatron.upstream import repairs, version
from moe_replay.megatron.upstream.warnings import quiet_megatron

version.check_installed()
repairs.install()
with quiet_megatron():
    for _name in ("distributed", "models.gpt.gpt_layer_specs", "optimizer", "pipeline_parallel"):
        importlib.import_module(f"megatron.core.{_name}")
