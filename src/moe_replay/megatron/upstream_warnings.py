"""The warnings that Megatron-Core raises about itself, and that say nothing to whoever uses it here.

In: nothing. Out: warning filters, one for each message, never a whole category.
Called by: the modules of `moe_replay.megatron`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

# Each is about what is not installed here on purpose, or about Megatron calling its own deprecated functions.
_MESSAGES = (
    ".*Apex (is|are) not installed.*",
    "The following imports from `dynamic_context.py`.*",
    ".*'megatron.core.transformer.custom_layers.transformer_engine'",
    "`torch.jit.script.*",
    "MLP requires ffn_hidden_size, but it was not provided.*",
    "full scope is deprecated.*",
    "Warning: tp_group is None, using default tp group.*",
)


def ignore_upstream_warnings() -> None:
    """Ignore them until the filters are reset."""
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)


@contextlib.contextmanager
def quiet_megatron() -> Iterator[None]:
    """Ignore them inside a `with` block."""
    with warnings.catch_warnings():
        ignore_upstream_warnings()
        yield
