"""How servers that are not ours are told, and tell, which weights they hold: by one string.

In: policy names, strings of a server. Out: strings, policy names.
"""

from __future__ import annotations

from typing import Any

from moe_replay.engines.serve.messages import CHECKPOINT, PolicyName

# What both vLLM and SGLang say before anything was pushed.
_UNPUSHED = "default"


def weight_version(policy: PolicyName) -> str:
    """Return the name under which a server keeps the weights of ``policy``."""
    return f"{policy.run}:{policy.policy_version}"


def read_policy(version: Any) -> PolicyName:
    """Return the weights that a server's ``weight_version`` names; those that nobody pushed are `CHECKPOINT`.

    Example:
        >>> read_policy("7f3a:2")
        PolicyName(run='7f3a', policy_version=2)
    """
    text = str(version)
    if text == _UNPUSHED:
        return PolicyName(run=CHECKPOINT, policy_version=0)
    run, _, number = text.rpartition(":")
    if run and number.isascii() and number.isdigit():
        return PolicyName(run=run[:64], policy_version=int(number))
    return PolicyName(run=text[:64], policy_version=0)
