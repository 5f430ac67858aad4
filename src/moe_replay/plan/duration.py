"""Seconds of a step, from stated rates: an estimate of where time goes, not a measurement.

In: a MemoryPlan, the recipe, the machine with its rates. Out: seconds by station.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_replay.megatron.families.family import ModelShape
from moe_replay.plan.host import gives_back
from moe_replay.plan.machine import Machine
from moe_replay.plan.memory import MemoryPlan
from moe_replay.plan.rollout import EngineBytes, engine_weights
from moe_replay.plan.trainer.settings import NUMBER_BYTES, Settings
from moe_replay.plan.trainer.weights import LatentSizes, Weight, stage_weights
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.rollout import SamplingEngineSection, ServersEngineSection
from moe_replay.recipe.sections.training import ParallelLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step."""

    parts: Mapping[str, float]
    """Station -> seconds; without ``rollout`` where the engine's GPUs are unknown."""
    overlaps: bool
    """Whether rollouts run beside the trainer."""

    @property
    def total(self) -> float:
        """Seconds of all stations; of the longer of two that run side by side."""
        rollout = self.parts.get("rollout", 0.0)
        push = self.parts.get("push", 0.0)
        train = sum(self.parts.values()) - rollout - push
        return (max(rollout, train) if self.overlaps else rollout + train) + push


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a token costs."""

    dense: int
    """Parameters that every token uses, without the embedding."""
    experts: int
    """Parameters of all routed experts."""
    active_frac: float
    """Part of the experts that a token uses."""
    attention: float
    """Operations a token for each token before it."""

    @classmethod
    def of(cls, shape: ModelShape) -> Work:
        """Count them."""
        weights = stage_weights(shape, ParallelLayout(), range(shape.num_layers), 0)
        dense = [w for w in weights if not w.is_expert and w.name != "embedding"]
        query = value = shape.head_dim
        if shape.megatron_fields.get("multi_latent_attention"):
            sizes = LatentSizes.of(shape)
            query, value = sizes.query, sizes.value
        return cls(
            dense=_total(dense),
            experts=_total([w for w in weights if w.is_expert]),
            active_frac=shape.topk / shape.num_experts if shape.num_experts else 0.0,
            attention=2.0 * shape.num_layers * shape.num_attention_heads * (query + value),
        )

    @property
    def active(self) -> float:
        """Parameters that a token uses, which are two operations each."""
        return self.dense + self.experts * self.active_frac

    def forward(self, length: float) -> float:
        """Return the operations of a token of a sequence, of which half comes before it."""
        return 2 * self.active + self.attention * length / 2

    def touched(self, batch: float) -> float:
        """Return the parameters that a batch of tokens reads, if routers choose evenly."""
        return self.dense + self.experts * (1 - (1 - self.active_frac) ** batch)


def plan_time(recipe: Recipe, shape: ModelShape, machine: Machine, memory: MemoryPlan) -> StepTime:
    """Compute the seconds of every station of a step."""
    work, rates, settings = Work.of(shape), machine.rates, memory.settings
    mean = rates.length_frac * recipe.max_sequence_length
    tokens = recipe.samples_per_step * mean
    speed = machine.num_gpus * rates.tflops * 1e12 * rates.flops_frac
    passes = tokens * work.forward(mean) / speed
    forward = (passes + _layers_time(shape, settings, machine, tokens)) * _bubble(settings)
    again = _recomputed_frac(settings)
    parts: dict[str, float] = {}
    if memory.engine is not None and isinstance(recipe.rollout, SamplingEngineSection):
        engines = machine.servers if not memory.engine.shares_gpu else machine
        if engines is not None:
            parts["rollout"] = _rollout(recipe, work, engines, memory.engine)
    if recipe.why_old_pass is not None:
        parts["old log-probabilities"] = forward
    if recipe.grpo.beta > 0:
        parts["reference log-probabilities"] = forward
    # Frozen weights need no gradient of their own, which is a third of the work.
    parts["update"] = forward * ((2 if recipe.lora.is_on else 3) + again)
    parts["optimizer"] = _optimizer(recipe, machine, memory)
    parts["push"] = _push(recipe, shape, machine, memory)
    overlaps = recipe.rollout.max_staleness > 0
    return StepTime(parts=parts, overlaps=overlaps)


def _total(weights: list[Weight]) -> int:
    return sum(weight.total for weight in weights)


def _rollout(recipe: Recipe, work: Work, machine: Machine, engine: EngineBytes) -> float:
    """Return seconds: steps of decoding, each limited by memory or by arithmetic, and prefill.

    The longest completion takes its maximum length, however few others still run.
    """
    section, rates = recipe.rollout, machine.rates
    assert isinstance(section, SamplingEngineSection)
    engines = machine.num_gpus / engine.num_ranks
    samples = recipe.samples_per_step / engines
    longest = section.max_completion_length
    mean = rates.length_frac * longest
    length = recipe.data.max_prompt_length * rates.length_frac + mean / 2
    held = engine.sequences(int(length) + 1)
    batch = max(1.0, min(samples, section.max_batch_size, held))
    number = NUMBER_BYTES[section.dtype]
    read = work.touched(batch) / engine.num_ranks * number + batch * length * engine.token_bytes
    arithmetic = 2 * work.active * batch / engine.num_ranks
    speed = rates.tflops * 1e12 * rates.flops_frac
    seconds = max(read / (rates.hbm_gb_s * 1e9 * rates.hbm_frac), arithmetic / speed)
    steps = max(longest, samples * mean / batch)
    prompts = recipe.prompts_per_step / engines * recipe.data.max_prompt_length * rates.length_frac
    return steps * seconds + prompts * 2 * work.active / engine.num_ranks / speed


def _layers_time(shape: ModelShape, settings: Settings, machine: Machine, tokens: float) -> float:
    """Return seconds of the messages inside the layers of one forward pass."""
    layout, rates = settings.layout, machine.rates
    stages = layout.pipeline_model_parallel_size
    rows = tokens * stages / settings.num_ranks
    hidden = shape.hidden_size * settings.dtype_bytes
    tensor, experts = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    # Attention and MLP each gather rows and scatter sums.
    of_tensor = 4 * (tensor - 1) * rows * hidden * shape.num_layers / stages
    moe = shape.num_moe_layers / stages
    of_experts = 2 * rows * shape.topk * hidden * moe * (experts - 1) / experts
    spans = experts * layout.expert_tensor_size > machine.gpus_per_node
    rate = rates.network_gb_s if spans else rates.link_gb_s
    return of_tensor / (rates.link_gb_s * 1e9) + of_experts / (rate * 1e9)


def _bubble(settings: Settings) -> float:
    layout = settings.layout
    chunks = layout.virtual_pipeline_model_parallel_size or 1
    idle = layout.pipeline_model_parallel_size - 1
    return 1 + idle / (settings.num_microbatches * chunks)


def _recomputed_frac(settings: Settings) -> float:
    """Return the part of a forward pass that runs again in the backward pass."""
    megatron = settings.megatron
    if megatron.recompute_granularity == "full":
        return 1.0
    modules = megatron.recompute_modules or ()
    return 0.7 if megatron.recompute_granularity == "selective" and "moe" in modules else 0.0


def _optimizer(recipe: Recipe, machine: Machine, memory: MemoryPlan) -> float:
    """Return seconds: gradients summed, weights gathered, state moved or kept on the host."""
    rates = machine.rates
    worst = max(memory.trainer, key=lambda found: found.resident.total).resident
    spans = machine.num_nodes > 1
    rate = (rates.network_gb_s if spans else rates.link_gb_s) * 1e9
    shared = memory.settings.replicas > 1
    messages = (worst.weights + worst.gradients) / rate if shared else 0.0
    reads = 2 * (worst.optimizer + worst.gradients) / (rates.hbm_gb_s * 1e9)
    # The host reads and writes what it holds; gradients go there, weights come back.
    host = 2 * worst.host / (rates.host_gb_s * 1e9)
    moved = 2 * worst.optimizer / (rates.host_gb_s * 1e9) if gives_back(recipe) >= 2 else 0.0
    return recipe.batch.steps_per_generation * (messages + reads + host) + moved


def _push(recipe: Recipe, shape: ModelShape, machine: Machine, memory: MemoryPlan) -> float:
    section = recipe.rollout
    if not isinstance(section, SamplingEngineSection):
        return 0.0
    whole = engine_weights(shape, 1, NUMBER_BYTES[section.dtype])
    here = memory.engine is not None and memory.engine.shares_gpu and machine.num_nodes == 1
    if isinstance(section, ServersEngineSection) and section.weight_transfer == "auto":
        # Each server is sent its own copy.
        whole *= len(section.urls)
    return whole / ((machine.rates.link_gb_s if here else machine.rates.network_gb_s) * 1e9)
