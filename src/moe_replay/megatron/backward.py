"""Backward passes over microbatches, and the search for the one that breaks a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_replay.batch import Microbatch
from moe_replay.megatron.ranks.messages import all_ranks
from moe_replay.megatron.replay import RouterScope
from moe_replay.megatron.scorer import MegatronScorer, opened
from moe_replay.routing import Routing

TokenLoss = Callable[..., torch.Tensor]
"""``(microbatch, new_logprobs of its predicting rows) -> its part of the loss``, a scalar; where
entropies learn, they are the third argument."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardWork:
    """What one gradient is made of."""

    microbatches: Sequence[Microbatch]
    """Of this rank; every rank has equally many."""
    loss: TokenLoss
    """Its part for each of them."""
    temperature: float
    """At which log-probabilities are computed."""
    routing: Routing
    """Whose choice of experts."""
    entropies_learn: bool = False
    """Give the loss entropies too, differentiable; the backward pass is slower then."""


class MegatronLearner(MegatronScorer):
    """A scorer whose model has gradients and an optimizer."""

    # The actor sets both.
    _optimizer: MegatronOptimizer
    config: TransformerConfig
    _holds_back = False

    @property
    def optimizer(self) -> MegatronOptimizer:
        """Megatron's optimizer; its state, and the weights that it holds views of, come back."""
        self.memory.take_back("optimizer", "weights")
        return self._optimizer

    def accumulate(
        self,
        work: BackwardWork,
        scope: RouterScope | None,
        *,
        outputs: dict[int, torch.Tensor] | None = None,
        inspect: Callable[[Microbatch, torch.Tensor], None] | None = None,
    ) -> None:
        """Put the gradient of the loss into the model's buffers; all ranks call this together.

        ``outputs`` receives log-probabilities and entropies of each microbatch under its key.
        ``inspect`` sees each microbatch with its log-probabilities before the loss does.
        """
        # The optimizer's state may stay away: only its step reads it.
        self.memory.take_back("weights", "gradients")
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        num_tokens = torch.tensor([sum(map(_num_tokens, work.microbatches))], device=self.device)
        dist.all_reduce(
            num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        total_tokens = int(num_tokens)

        def step(batches: Iterator[Microbatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            microbatch = next(batches)
            output = self._statistics(
                chunk,
                microbatch,
                scope,
                temperature=work.temperature,
                with_entropies=outputs is not None or work.entropies_learn,
                entropies_learn=work.entropies_learn,
            )

            def scaled_loss(
                statistics: torch.Tensor,
            ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
                logprobs = statistics[0, :, 0]
                if outputs is not None:
                    outputs[microbatch.key] = statistics[0].detach()
                if inspect is not None:
                    inspect(microbatch, logprobs)
                # Megatron divides the summed gradient by the summed count, which is meant for
                # losses that are sums over tokens: its auxiliary loss is one, `loss` is an average
                # already.
                learned = (statistics[0, :, 1],) if work.entropies_learn else ()
                part = work.loss(microbatch, logprobs, *learned) * total_tokens
                count = torch.tensor(_num_tokens(microbatch), dtype=torch.int, device=self.device)
                return part, count, {}

            return output, scaled_loss

        with opened(scope), ExitStack() as held_back:
            for chunk in self.chunks if self._holds_back else ():
                held_back.enter_context(chunk.no_sync())
            self._schedule(step, work.microbatches, forward_only=False)

    def find_broken(self, work: BackwardWork) -> list[str]:
        """Run the backward pass again, microbatch by microbatch, and say which are not finite.

        Collective, and costs as much as the pass did: called when a run is about to stop. With an
        interleaved schedule the unit is a round of microbatches, because Megatron-Core runs no
        fewer.
        """
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        size = stages if len(self.chunks) > 1 else 1
        found: list[str] = []
        for start in range(0, len(work.microbatches), size):
            part = work.microbatches[start : start + size]
            suspects = _Suspects()
            scope = self._scope(part, work.routing, None)
            alone = replace(work, microbatches=part)
            # What is not reduced over replicas still shows whose microbatch it came from.
            with self._unreduced():
                self.accumulate(alone, scope, inspect=suspects.inspect)
            found += suspects.sentences(part, _broken_parameter(self.chunks))
        everyone = all_ranks().gather(found)
        return [f"rank {rank}: {text}" for rank, texts in enumerate(everyone) for text in texts]

    @contextmanager
    def _unreduced(self) -> Iterator[None]:
        """Leave the gradients of backward passes in the buffers of their ranks."""
        before = self.config.finalize_model_grads_func, self.config.no_sync_func
        self.config.finalize_model_grads_func = lambda *_, **__: None
        # The schedule then does not switch it off for the last microbatch.
        self.config.no_sync_func = None
        self._holds_back = True
        try:
            yield
        finally:
            self.config.finalize_model_grads_func, self.config.no_sync_func = before
            self._holds_back = False


def sum_over_context(values: torch.Tensor) -> torch.Tensor:
    """Add up values over the context-parallel ranks, which hold the other rows of the same samples.

    Collective over them, and without gradient.
    """
    total = values.detach().clone()
    dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
    return total


def _num_tokens(microbatch: Microbatch) -> int:
    """Return the rows of this rank that hold a token."""
    return int(microbatch.index.is_token.sum())


class _Suspects:
    """Samples whose log-probabilities, or the gradient that the loss gives them, are not finite."""

    def __init__(self) -> None:
        self._samples: dict[int, str] = {}

    def inspect(self, microbatch: Microbatch, new_logprobs: torch.Tensor) -> None:
        """Look at the log-probabilities of a microbatch now, at their gradient when it comes."""
        owners = microbatch.sample_ids[microbatch.predicts_sampled].tolist()

        def look(values: torch.Tensor, what: str) -> None:
            for sample_id, finite in zip(owners, torch.isfinite(values).tolist(), strict=True):
                if not finite:
                    self._samples.setdefault(sample_id, what)

        look(new_logprobs.detach(), "new_logprobs")
        if new_logprobs.requires_grad:
            new_logprobs.register_hook(lambda gradient: look(gradient, "gradient of the loss"))

    def sentences(self, part: Sequence[Microbatch], parameter: str | None) -> list[str]:
        """Say what is broken, or nothing."""
        if not self._samples and parameter is None:
            return []
        keys = ", ".join(str(microbatch.key) for microbatch in part)
        held = sorted(sample.sample_id for microbatch in part for sample in microbatch.samples)
        blamed = "; ".join(
            f"sample {sample_id}: {what} not finite"
            for sample_id, what in sorted(self._samples.items())
        )
        where = blamed or f"one of samples {', '.join(map(str, held))}"
        gradient = f", first broken gradient: {parameter}" if parameter else ""
        return [f"microbatch {keys}: {where}{gradient}"]


def _broken_parameter(chunks: Sequence[Any]) -> str | None:
    """Return the first parameter of this rank whose gradient is not finite."""
    for chunk in chunks:
        buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
        # Minimum and maximum show NaN and infinity, and need no memory of the gradient's size.
        if all(_is_finite(buffer.grad_data) for buffer in buffers):
            continue
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad and not _is_finite(parameter.main_grad):
                return name.removeprefix("module.")
    return None


def _is_finite(values: torch.Tensor) -> bool:
    if not values.numel():
        return True
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(values))
