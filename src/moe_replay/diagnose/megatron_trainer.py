"""Megatron-Core as a trainer: its own scoring pass, over one sequence at a time, in one process.

In: a checkpoint. Out: `megatron_trainer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32

from moe_replay.batch import Microbatch, Sample, build_microbatch
from moe_replay.checkpoint.facts import read_facts
from moe_replay.diagnose.passes import Distributions, Pass, log_softmax
from moe_replay.megatron.actor import build_scorer
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.layout import initialize, shutdown
from moe_replay.megatron.recorded import gather_traces
from moe_replay.megatron.scorer import MegatronScorer
from moe_replay.recipe.sections.training import MegatronSection
from moe_replay.routing import RouteForm, Routing, RoutingTrace, slice_routes


@contextmanager
def megatron_trainer(model_dir: Path, *, dtype: str) -> Iterator[MegatronTrainer]:
    """Build Megatron's model of a checkpoint for the time of a block.

    Raises:
        UnsupportedError: when Megatron cannot hold this model.
    """
    routed = read_facts(model_dir).routed
    layout = MegatronSection()
    initialize(layout, seed=0)
    try:
        scorer = build_scorer(model_dir, layout, dtype=getattr(torch, dtype), grouped_experts=True)
        form = None
        if routed is not None:
            form = RouteForm(
                layers=routed.moe_layers, num_experts=routed.num_experts, topk=routed.topk
            )
        yield MegatronTrainer(scorer, form)
    finally:
        shutdown()


class MegatronTrainer:
    """Runs sequences through a `MegatronScorer`, as the pass of old log-probabilities does."""

    def __init__(self, scorer: MegatronScorer, form: RouteForm | None) -> None:
        self.scorer = scorer
        """The model, for passes over several sequences at once."""
        self._form = form

    @property
    def form(self) -> RouteForm | None:
        """Layers, experts and top-k of its routers; None for a dense model."""
        return self._form

    def run(
        self,
        token_ids: Int32[np.ndarray, " tokens"],
        prompt_length: int,
        *,
        temperature: float,
        replayed: RoutingTrace | None,
    ) -> Pass:
        """Run the sequence; with ``replayed`` under its routes, rows without one live.

        Raises:
            TraceError: when the routes are not of this model.
        """
        microbatch = _microbatch(token_ids, prompt_length, self.scorer)
        routing = Routing.LIVE if self._form is None else Routing.RECORD
        if replayed is not None:
            routes = slice_routes(
                [replayed], microbatch.router_index, layers=sorted(self.scorer.routers)
            )
            microbatch, routing = replace(microbatch, routes=routes), Routing.REPLAY
        with _hidden_rows(self.scorer, microbatch) as hidden:
            scores = self.scorer.score(
                [microbatch],
                temperature=temperature,
                routing=routing,
                with_margins=routing is Routing.RECORD,
            )
        live, margins = None, None
        if routing is Routing.RECORD:
            assert self._form is not None
            live = gather_traces(
                [microbatch],
                scores.routes,
                self._form,
                policy_version=0,
                device=self.scorer.device,
            )[0]
            margins = scores.margins[0][: len(token_ids)]
        return Pass(
            token_logprobs=scores.samples[0].token_logprobs,
            live=live,
            margins=margins,
            distributions=_distributions(hidden, self.scorer.vocab_size),
        )


def _microbatch(
    token_ids: Int32[np.ndarray, " tokens"], prompt_length: int, scorer: MegatronScorer
) -> Microbatch:
    sample = Sample(
        sample_id=0,
        token_ids=token_ids,
        prompt_length=prompt_length,
        rollout_logprobs=np.zeros(len(token_ids) - prompt_length, dtype=np.float32),
        advantage=0.0,
        trains=False,
    )
    return build_microbatch(0, [sample], place=scorer.place)


@contextmanager
def _hidden_rows(scorer: MegatronScorer, microbatch: Microbatch) -> Iterator[list[torch.Tensor]]:
    """Keep what the output layer gets in the rows that predict sampled tokens, and its weight."""
    layer = unwrap(scorer.chunks[-1]).output_layer
    rows = torch.from_numpy(np.flatnonzero(microbatch.predicts_sampled)).to(scorer.device)
    kept: list[torch.Tensor] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["input_"]
        weight = kwargs.get("weight")
        kept.extend([hidden.flatten(0, 1)[rows], module.weight if weight is None else weight])

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield kept
    finally:
        handle.remove()


def _distributions(kept: list[torch.Tensor], num_words: int) -> Distributions:
    hidden, weight = kept

    @torch.no_grad()
    def distributions(tokens: slice, temperature: float) -> torch.Tensor:
        # Rounded first, as the layer itself does.
        return log_softmax((hidden[tokens] @ weight.t())[:, :num_words], temperature)

    return distributions
