"""The trainer as a recorder of the routes that its model takes for given tokens, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from moe_replay.batch import Sample, build_microbatch
from moe_replay.checkpoint.facts import read_facts
from moe_replay.engines.recording import GivenTokens
from moe_replay.errors import RecipeError
from moe_replay.megatron.actor import build_scorer
from moe_replay.megatron.layout import initialize, shutdown
from moe_replay.megatron.recorded import gather_traces
from moe_replay.megatron.scorer import MegatronScorer
from moe_replay.recipe.recipe import Recipe
from moe_replay.routing import RouteForm, Routing, RoutingTrace


@contextmanager
def trainer_recorder(
    recipe: Recipe,
) -> Iterator[Callable[[Sequence[GivenTokens]], Iterator[tuple[str, RoutingTrace]]]]:
    """Build the trainer's model from its checkpoint, and return what records its routes.

    Raises:
        RecipeError: when the model is dense, or ``[megatron]`` asks for more than one process.
    """
    recipe.data_parallel_size(1)
    routed = read_facts(recipe.model.path).routed
    if routed is None:
        raise RecipeError(f"{recipe.model.path} is a dense model: it has no routes to record")
    form = RouteForm(layers=routed.moe_layers, num_experts=routed.num_experts, topk=routed.topk)
    initialize(recipe.megatron, seed=recipe.run.seed)
    try:
        scorer = build_scorer(
            recipe.model.path,
            recipe.megatron,
            dtype=getattr(torch, recipe.model.dtype),
            grouped_experts=recipe.model.grouped_experts,
            chunk_rows=recipe.batch.logprob_chunk_size,
        )
        yield lambda samples: _record(scorer, form, samples)
    finally:
        shutdown()


def _record(
    scorer: MegatronScorer, form: RouteForm, samples: Sequence[GivenTokens]
) -> Iterator[tuple[str, RoutingTrace]]:
    """Run all samples as one microbatch, as in the pass that computes old log-probabilities."""
    packed = [
        Sample(
            sample_id=number,
            token_ids=sample.token_ids,
            # One token counts as sampled, so that one row of logits a sample is looked at.
            prompt_length=len(sample.token_ids) - 1,
            rollout_logprobs=np.zeros(1, dtype=np.float32),
            advantage=0.0,
            trains=False,
        )
        for number, sample in enumerate(samples)
    ]
    microbatch = build_microbatch(0, packed, place=scorer.place)
    scores = scorer.score([microbatch], temperature=1.0, routing=Routing.RECORD)
    traces = gather_traces(
        [microbatch], scores.routes, form, policy_version=0, device=scorer.device
    )
    for number, sample in enumerate(samples):
        yield sample.name, traces[number]
