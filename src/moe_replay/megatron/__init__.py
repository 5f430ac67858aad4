"""Everything that touches Megatron-Core: it lives here so that no other package has to import it.

Importing this package checks the installed Megatron-Core version and, on a machine without CUDA, calls
`moe_replay.megatron.cpu.install`, which must happen before the first import of `megatron.core`.

In: a Hugging Face checkpoint directory and a `ParallelLayout`. Out: Megatron model chunks, their weights
in Hugging Face naming, replay scopes, training steps. Called by: `moe_replay.grpo`, `moe_replay.cli`.
"""

from __future__ import annotations

from moe_replay.megatron import cpu, version

version.check_installed()
cpu.install()
