"""The plan of a recipe on a machine: bytes, seconds, what does not fit, and what would.

Computed from config.json and the recipe: no weights are read, and nothing runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_replay.megatron.families.family import ModelShape
from moe_replay.megatron.model import read_model_shape
from moe_replay.plan.advice import Remedy, recipe_lines, remedies
from moe_replay.plan.duration import StepTime, plan_time
from moe_replay.plan.machine import USABLE_FRAC, Machine
from moe_replay.plan.memory import UNMODELLED_FRAC, MemoryPlan, check_layout, plan_memory
from moe_replay.plan.options import check_options
from moe_replay.plan.trainer.activations import has_sinks
from moe_replay.plan.trainer.candidates import candidates_in_words
from moe_replay.recipe.recipe import Recipe

_SINKS = (
    "attention with sinks keeps no weights, as a fused kernel of Transformer Engine; one that is not "
    "fused keeps heads x rows x rows"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a recipe needs of a machine."""

    machine: Machine
    """The machine."""
    shape: ModelShape
    """The model, as its config.json says."""
    layout: str
    """How the ranks are divided, in words."""
    memory: MemoryPlan
    """Bytes."""
    time: StepTime
    """Seconds."""
    remedies: Sequence[Remedy]
    """Changes with which it fits; empty if it does, or if none was found."""
    candidates: str | None
    """What is assumed of truncated sampling, in words; None without it."""

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        memory = self.memory
        engine = memory.engine
        return {
            "machine": self.machine.describe(),
            "assumptions": self.assumptions(),
            "layout": self.layout,
            "stages": [list(layers) for layers in memory.stages],
            "fits": memory.fits,
            "short": memory.short,
            "headroom_bytes": int(memory.headroom),
            "tight_phase": memory.tight and memory.tight.name,
            "usable_bytes": int(memory.usable),
            "phases": [
                {
                    "phase": phase.name,
                    "stage": phase.stage,
                    "total_bytes": int(phase.total),
                    "bytes": {name: int(size) for name, size in phase.parts.items()},
                }
                for phase in memory.phases
            ],
            "logits_bytes": int(max(found.logits for found in memory.trainer)),
            "host_bytes_per_node": int(memory.host.total),
            "host_bytes_of_a_save": int(memory.host.save),
            "engine": None
            if engine is None
            else {
                "gpus": engine.num_ranks,
                "weights_bytes": int(engine.weights),
                "cache_bytes": int(engine.cache),
                "cache_bytes_per_token": int(engine.token_bytes),
                "sequences_at_once": engine.sequences(memory.settings.max_sequence_length),
            },
            "step_s": {"total": round(self.time.total, 1)}
            | {name: round(seconds, 1) for name, seconds in self.time.parts.items()},
            "remedies": [
                {
                    "keys": dict(remedy.keys),
                    "recipe_lines": recipe_lines(remedy.keys),
                    "peak": remedy.memory.peak.name,
                    "peak_bytes": int(remedy.memory.peak.total),
                }
                for remedy in self.remedies
            ],
        }

    def assumptions(self) -> dict[str, str]:
        """Return what the figures rest on, in words."""
        rates, kernels = asdict(self.machine.rates), self.memory.kernels
        return {
            "computed": "from config.json and the recipe; nothing ran on a GPU",
            "usable": f"{USABLE_FRAC:.0%} of a card's nominal memory",
            "unmodelled": f"{UNMODELLED_FRAC:.0%} is added to all but parameters and the cache",
            "kernels": f"{kernels.name}; {kernels.other_bytes / 1e9:g} GB for CUDA and NCCL",
            "experts": "tokens are dealt evenly over the ranks of the experts",
            "host": "state, and what a save gathers, at once; of the state alone a published run "
            "took 1.8 times as much",
            "lengths": "bytes: every completion has its maximum length; seconds: "
            f"{rates['length_frac']:.0%} of it, the longest one all of it",
            **({"sinks": _SINKS} if has_sinks(self.shape) else {}),
            **({"candidates": self.candidates} if self.candidates else {}),
        } | {name: f"{value:g}" for name, value in rates.items()}


def make_plan(recipe: Recipe, machine: Machine) -> Plan:
    """Compute the plan of a recipe on GPUs; of its checkpoint only config.json has to exist.

    Raises:
        RecipeError: config.json is missing or damaged, or the batch does not divide, or
            Megatron-Core has no such option.
        UnsupportedError: the model is not supported, or cannot be cut like that, or replay cannot
            be exact with an option.
    """
    recipe, shape = recipe.on_device("cuda"), read_model_shape(recipe.model.path)
    check_layout(recipe, shape, machine)
    check_options(recipe, shape, machine)
    memory = plan_memory(recipe, shape, machine)
    return Plan(
        machine=machine,
        shape=shape,
        layout=recipe.megatron.describe(),
        memory=memory,
        time=plan_time(recipe, shape, machine, memory),
        remedies=[] if memory.fits else remedies(recipe, shape, machine),
        candidates=candidates_in_words(recipe.rollout, memory.settings, shape.vocab_size),
    )
