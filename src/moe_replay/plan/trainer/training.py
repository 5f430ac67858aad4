"""The trainer's bytes on a rank: what it holds always, and the peaks of scoring and of an update.

In: ModelShape, Settings, the layers of each pipeline stage, Kernels. Out: TrainerBytes of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from moe_replay.megatron.families.family import ModelShape
from moe_replay.plan.trainer.activations import LayerBytes, kept_by, layer_bytes
from moe_replay.plan.trainer.adapters import adapter_weights
from moe_replay.plan.trainer.kernels import Kernels
from moe_replay.plan.trainer.settings import Settings
from moe_replay.plan.trainer.weights import Weight, buffer_size, stage_weights
from moe_replay.routing import expert_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """What a rank holds between passes, in bytes."""

    weights: float
    """The policy's, in Megatron's buffers."""
    reference: float
    """The frozen copy's."""
    gradients: float
    """Their buffers."""
    optimizer: float
    """Main weights and moments that this rank owns, on the device."""
    host: float
    """Of the same, in host memory."""

    @property
    def total(self) -> float:
        """On the device."""
        return self.weights + self.reference + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """Trained parameters whose optimizer state the same ranks share."""

    size: int
    """Numbers of the parameters, on each of these ranks."""
    replicas: int
    """Ranks that share their state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passing:
    """What a pass takes beside that, at its peak, in bytes."""

    activations: float
    """Kept for the backward pass, recomputed, or in passing."""
    logits: float
    """Chunks of logits, and the gradients of the rows and the layer behind them."""
    routes: float
    """Replayed experts on the device."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.activations + self.logits + self.routes


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerBytes:
    """What a rank of a pipeline stage needs."""

    stage: int
    """Its number."""
    resident: Resident
    """Always held."""
    buffers: tuple[Buffer, Buffer]
    """What it trains: dense parameters, then those of experts."""
    scoring: Passing
    """While old log-probabilities are computed."""
    update: Passing
    """While a gradient is computed."""
    logits: float
    """What chunks of logits take in an update, at their own moment, which need not be the peak."""
    largest_push: float
    """Bytes of the largest parameter that an export merges."""


def trainer_bytes(
    shape: ModelShape,
    settings: Settings,
    stages: Sequence[Sequence[int]],
    kernels: Kernels,
) -> list[TrainerBytes]:
    """Return what a rank of each stage needs; ``stages`` holds the decoder layers of each."""
    return [_stage_bytes(shape, settings, stages, stage, kernels) for stage in range(len(stages))]


def resident_bytes(
    frozen: Sequence[Weight],
    trained: Sequence[Weight],
    buffers: Sequence[Buffer],
    settings: Settings,
) -> Resident:
    """Return what a rank holds of these parameters, of which ``buffers`` hold the trained ones."""
    in_buffers = sum(buffer.size for buffer in buffers)
    owned = sum(
        min(_total(w for w in trained if w.is_expert == is_expert), buffer.size / buffer.replicas)
        for is_expert, buffer in zip((False, True), buffers, strict=True)
    )
    adam = settings.adam
    # The reference of adapters is the model without them, whose weights are there.
    copied = 0 if frozen else _total(trained) * settings.has_reference
    return Resident(
        weights=(_total(frozen) + in_buffers) * settings.dtype_bytes,
        reference=copied * settings.dtype_bytes,
        gradients=in_buffers * adam.gradient_bytes,
        optimizer=owned * adam.device_bytes,
        host=owned * adam.host_bytes,
    )


def _buffers(trained: Sequence[Weight], settings: Settings) -> tuple[Buffer, Buffer]:
    dense, experts = (
        Buffer(
            size=buffer_size((w for w in trained if w.is_expert == is_expert), replicas),
            replicas=replicas,
        )
        for is_expert, replicas in (
            (False, settings.replicas),
            (True, settings.expert_replicas),
        )
    )
    return dense, experts


def _total(weights: Iterable[Weight]) -> int:
    return sum(weight.total for weight in weights)


def _stage_bytes(
    shape: ModelShape,
    settings: Settings,
    stages: Sequence[Sequence[int]],
    stage: int,
    kernels: Kernels,
) -> TrainerBytes:
    layout = settings.layout
    held = stage_weights(shape, layout, stages[stage], stage)
    adapters: list[Weight] = []
    if settings.lora.is_on:
        adapters = adapter_weights(shape, layout, settings.lora, stages[stage])
    trained, frozen = (adapters, held) if adapters else (held, [])
    buffers = _buffers(trained, settings)
    scoring = replace(settings, max_tokens=settings.scoring_tokens or settings.max_tokens)
    layers, scored = (
        [
            layer_bytes(shape, each, kernels, is_moe=layer in shape.moe_layers)
            for layer in stages[stage]
        ]
        for each in (settings, scoring)
    )
    is_last = stage == len(stages) - 1
    merged = max((w.size for w in held if not w.is_expert), default=0) * (
        layout.tensor_model_parallel_size
    )
    # The experts of an expert-parallel rank are merged together, one matrix of a layer.
    experts = shape.num_experts // layout.expert_model_parallel_size
    merged = max(merged, 2 * experts * shape.expert_ffn_size * shape.hidden_size)
    return TrainerBytes(
        stage=stage,
        resident=resident_bytes(frozen, trained, buffers, settings),
        buffers=buffers,
        scoring=_scoring(shape, scoring, scored, kernels, is_last=is_last),
        update=_update(shape, settings, layers, kernels, stage=stage, is_last=is_last),
        logits=_logits(shape, settings, kernels, learns=True)[1] if is_last else 0.0,
        # An adapter is merged in float32.
        largest_push=merged * (settings.dtype_bytes + 4 * bool(adapters)),
    )


def _update(
    shape: ModelShape,
    settings: Settings,
    layers: Sequence[LayerBytes],
    kernels: Kernels,
    *,
    stage: int,
    is_last: bool,
) -> Passing:
    """Return the largest of three moments: end of the forward pass, logits, backward pass."""
    found = kept_by(list(layers), settings.megatron)
    flight = in_flight(settings, stage)
    kept = found.kept * flight
    routes = _routes(shape, settings, layers) * flight
    passing = max((layer.dispatched for layer in layers), default=0) * (
        kernels.dispatch_copies + _exchanges(settings, kernels)
    )
    largest = max(layers, key=lambda layer: layer.whole, default=None)
    backward = 0.0
    if largest is not None:
        backward = largest.whole * kernels.backward_frac
        backward += largest.hidden * kernels.gradient_copies
        if found.recomputed:
            backward += found.recomputed + passing - found.kept + found.kept_then
    forward = kept + passing
    if not is_last:
        return Passing(activations=max(forward, kept + backward), logits=0, routes=routes)
    final, logits = _logits(shape, settings, kernels, learns=True)
    if kept + final + logits > max(forward, kept + backward):
        return Passing(activations=kept + final, logits=logits, routes=routes)
    return Passing(activations=max(forward, kept + backward), logits=0, routes=routes)


def _scoring(
    shape: ModelShape,
    settings: Settings,
    layers: Sequence[LayerBytes],
    kernels: Kernels,
    *,
    is_last: bool,
) -> Passing:
    """Return the larger of two moments: inside a layer, and the logits."""
    routes = _routes(shape, settings, layers)
    copies = kernels.scored_dispatch_copies + _exchanges(settings, kernels)
    # Without a graph the rows that were sent are still held while those that came are sorted.
    layout = settings.layout
    exchanges = layout.expert_model_parallel_size > 1 or layout.expert_tensor_size > 1
    copies += kernels.exchange_copies * exchanges
    # Residual, its norm, and what enters and leaves the experts; attention has one fewer.
    inside = [layer.dispatched * copies + 4 * layer.hidden for layer in layers]
    inside += [
        layer.attention + layer.core + 3 * layer.hidden
        if not layer.attended
        else layer.attention + layer.attended * kernels.scored_attention_weights + 2 * layer.hidden
        for layer in layers
    ]
    within = max(inside, default=0.0) + sum(layer.dispatcher for layer in layers)
    # Megatron's schedules hold the rows that they sent last while the next microbatch runs.
    if not is_last and settings.num_microbatches > 1:
        within += max((layer.hidden for layer in layers), default=0.0)
    final, logits = _logits(shape, settings, kernels, learns=False) if is_last else (0.0, 0.0)
    if final + logits > within:
        return Passing(activations=final, logits=logits, routes=routes)
    return Passing(activations=within, logits=0, routes=routes)


def _exchanges(settings: Settings, kernels: Kernels) -> float:
    """Return the copies of dispatched rows that are on their way between ranks."""
    layout = settings.layout
    cut = layout.expert_tensor_size
    received = layout.expert_model_parallel_size > 1
    return kernels.exchange_copies * (received + (1 / cut if cut > 1 else 0))


def _logits(
    shape: ModelShape, settings: Settings, kernels: Kernels, *, learns: bool
) -> tuple[float, float]:
    """Return bytes of the last hidden rows, and of what `token_statistics` holds."""
    layout, number = settings.layout, settings.dtype_bytes
    rows = settings.max_tokens / layout.context_parallel_size
    vocab = shape.vocab_size / layout.tensor_model_parallel_size
    hidden = rows * shape.hidden_size * number
    chunk = min(settings.chunk_rows, rows) * vocab
    # Lower precision first gives logits in its own format.
    rounded = number if number < 4 else 0
    if not learns:
        # Residual rows and their norm on this rank, gathered, and those that are picked.
        seen = 2 * hidden / layout.tensor_model_parallel_size + 2 * hidden
        return seen, chunk * (2 * 4 + rounded)
    buffers = 2 if settings.update_has_entropies else 1
    last = hidden / layout.tensor_model_parallel_size * kernels.norm_copies
    # A gradient of the rows; of the weight one that nobody reads, in lower precision one product.
    products = vocab * shape.hidden_size * number * (2 if rounded else 1)
    return last + hidden, chunk * (buffers * 4 + rounded) + hidden + products


def _routes(shape: ModelShape, settings: Settings, layers: Sequence[LayerBytes]) -> float:
    if not settings.replays or not shape.num_experts:
        return 0
    layout = settings.layout
    rows = settings.max_tokens / layout.tensor_model_parallel_size / layout.context_parallel_size
    routed = sum(layer.dispatched > 0 for layer in layers)
    return rows * routed * shape.topk * expert_dtype(shape.num_experts).itemsize


def in_flight(settings: Settings, stage: int) -> float:
    """Return how many microbatches a stage keeps at once, of all its layers.

    Example: of 4 stages the first keeps 4, the last 1. With 2 chunks a stage the first keeps those
    of 1 + 3 / 8 times as many.
    """
    layout = settings.layout
    stages = layout.pipeline_model_parallel_size
    chunks = layout.virtual_pipeline_model_parallel_size
    if chunks is None:
        return min(stages - stage, settings.num_microbatches)
    # Megatron's interleaved schedule: forward passes of chunks before the first backward.
    warm_up = (stages - stage - 1) * 2 + (chunks - 1) * stages + 1
    return min(warm_up, settings.num_microbatches * chunks) / chunks
