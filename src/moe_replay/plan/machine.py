"""The machine of a plan: how many GPUs of what size, and the rates that seconds are computed from.

In: words such as ``gpus=8x80GB``. Out: Machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from moe_replay.errors import RecipeError

GPUS_PER_NODE = 8
"""Where a plan names no nodes."""
USABLE_FRAC = 0.95
"""Of a card's nominal memory that a plan fills: 76 GB of 80."""
_GPUS = re.compile(r"(?:(\d+)x)?(\d+)x(\d+(?:\.\d+)?)GB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the seconds of a plan rest on: assumptions, printed with every plan."""

    tflops: float = 989.0
    """Of a GPU in bfloat16, in 10^12 operations a second."""
    flops_frac: float = 0.3
    """Part of that which passes of the trainer reach."""
    hbm_gb_s: float = 3350.0
    """Of a GPU's memory, in GB/s."""
    hbm_frac: float = 0.5
    """Part of that which decoding reaches."""
    link_gb_s: float = 300.0
    """Between GPUs of a node, each direction, in GB/s that messages reach."""
    network_gb_s: float = 35.0
    """Between nodes, for each GPU, in GB/s that messages reach."""
    host_gb_s: float = 25.0
    """Between a GPU and host memory, and of the host's memory for each GPU, in GB/s."""
    host_gb: float = 2000.0
    """Memory of a node's host, in GB."""
    length_frac: float = 0.5
    """Mean length of a completion, in parts of rollout.max_completion_length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """GPUs in nodes, and their rates."""

    num_nodes: int
    """Nodes."""
    gpus_per_node: int
    """GPUs of each."""
    gpu_gb: float
    """Nominal memory of each, in GB."""
    rates: Rates = field(default_factory=Rates)
    """What seconds are computed from."""
    servers: Machine | None = None
    """GPUs of the rollout servers, which are not among these."""

    @property
    def num_gpus(self) -> int:
        """GPUs in all."""
        return self.num_nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """Of a GPU, for a plan to fill."""
        return self.gpu_gb * 1e9 * USABLE_FRAC

    def describe(self) -> str:
        """Return the machine in words: ``16 x 80 GB in 2 nodes``."""
        words = f"{self.num_gpus} x {self.gpu_gb:g} GB"
        return words if self.num_nodes == 1 else f"{words} in {self.num_nodes} nodes"


def read_machine(words: Sequence[str]) -> Machine:
    """Read a machine from the words behind ``--plan``.

    Example: ``["nodes=2x8x80GB", "network_gb_s=20"]``, or ``["gpus=8x80GB", "servers=8x80GB"]``.
    ``gpus=64x80GB`` are 8 nodes of 8.

    Raises:
        RecipeError: a word is not of such a form, is unknown or missing, or makes no sense.
    """
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name in given:
            raise RecipeError(
                f"--plan got {word!r}, expected NAME=VALUE, each name once, such as gpus=8x80GB"
            )
        given[name] = value
    size = given.pop("nodes", None)
    gpus = given.pop("gpus", None)
    if (size is None) == (gpus is None):
        raise RecipeError(
            f"--plan got {' '.join(words) or 'nothing'}, expected exactly one of gpus=8x80GB (the "
            "trainer's GPUs) and nodes=2x8x80GB (nodes, GPUs of each, memory of each)"
        )
    machine = _read_gpus("gpus", gpus) if gpus is not None else _read_gpus("nodes", size or "")
    servers = given.pop("servers", None)
    if servers is not None:
        machine = replace(machine, servers=_read_gpus("servers", servers))
    known = {field.name for field in fields(Rates)}
    if unknown := sorted(given.keys() - known):
        raise RecipeError(
            f"--plan got {', '.join(unknown)}, expected gpus, nodes, servers, or one of the rates "
            f"{', '.join(sorted(known))}"
        )
    rates = Rates(**{name: _read_number(name, value) for name, value in given.items()})
    return replace(machine, rates=rates)


def _read_gpus(name: str, text: str) -> Machine:
    match = _GPUS.fullmatch(text)
    if match is None or (match[1] is not None) != (name == "nodes"):
        example = "nodes=2x8x80GB" if name == "nodes" else f"{name}=8x80GB"
        raise RecipeError(f"--plan got {name}={text}, expected a form like {example}")
    count, gb = int(match[2]), float(match[3])
    nodes = int(match[1]) if match[1] else -(-count // GPUS_PER_NODE)
    if min(nodes, count, gb) <= 0:
        raise RecipeError(f"--plan got {name}={text}, expected numbers above 0")
    if match[1] is None and nodes > 1:
        if count % GPUS_PER_NODE:
            raise RecipeError(
                f"--plan got {name}={text}, which is not a number of full nodes of {GPUS_PER_NODE} GPUs; say "
                "how they lie with nodes=NODESxGPUSxMEMORY"
            )
        count = GPUS_PER_NODE
    return Machine(num_nodes=nodes, gpus_per_node=count, gpu_gb=gb)


def _read_number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    is_share = name.endswith("_frac")
    if not 0 < value < 1e12 or (is_share and value > 1):
        wanted = "above 0 and at most 1" if is_share else "above 0"
        raise RecipeError(f"--plan got {name}={text}, expected a number {wanted}")
    return value
