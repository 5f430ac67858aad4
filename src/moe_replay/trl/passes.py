"""One pass of TRL over samples: which routing its forwards take, and what they show.

In: samples and the batches that hold them. Out: scopes around the forwards, samples with routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import trl
from jaxtyping import Integer
from torch import nn
from trl.trainer.utils import pad

from moe_replay.errors import UnsupportedError
from moe_replay.routing import Origin, Routing, RoutingTrace
from moe_replay.transformers import RouteRecorder, record_routes, replay_routes
from moe_replay.trl.samples import PlacedRoutes, RoutedSample, in_rows, placed, sample_gaps
from moe_replay.trl.watch import PassWatch

Scored = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Log-probabilities and entropies ``[batch, completion]``, and the load-balancing loss."""
Batch = tuple[torch.Tensor, torch.Tensor, int]
"""Token ids and attention mask ``[batch, length]``, and how many of the last are completion."""
Score = Callable[..., Scored]
"""TRL's ``_get_per_token_logps_and_entropies``."""
_OF_IMAGES = ("pixel_values", "num_images", "num_tiles", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplePass:
    """A pass over samples, in the order of the batches that TRL gives to it."""

    samples: list[RoutedSample]
    """What the pass scores; those of a recording pass get their routes."""
    routing: Routing
    """What the routers of the policy do."""
    watch: PassWatch | None = None
    """Takes what the pass shows; None where nobody asks."""
    open: ExitStack | None = None
    """Keeps the scopes of a forward with gradients open until its backward pass has run."""

    def score(
        self,
        call: Score,
        model: Any,
        policy: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None,
        **options: Any,
    ) -> Scored:
        """Score a batch in TRL's parts of ``batch_size``, each under the routes of its samples.

        ``policy`` is ``model`` without wrappers. With live routing TRL cuts the parts itself.
        Raises as `in_rows` and `placed` do, and `UnsupportedError` for images under routes.
        """
        if self.routing is Routing.LIVE:
            whole = call(model, input_ids, attention_mask, logits_to_keep, batch_size, **options)
            self._add_gaps(in_rows(self.samples, input_ids, attention_mask), whole)
            return whole
        given = [name for name in _OF_IMAGES if options.get(name) is not None]
        if given:
            raise UnsupportedError(
                f"TRL passes {given} with the batch; routes are replayed in text alone, so use "
                "router_replay_mode='disabled' for models with images"
            )
        parts = []
        for start in range(0, len(input_ids), batch_size or len(input_ids)):
            at = slice(start, start + (batch_size or len(input_ids)))
            with ExitStack() as closed:
                until = self.open if torch.is_grad_enabled() and self.open else closed
                with self._scope(until, policy, at, input_ids[at], attention_mask[at]) as held:
                    part = call(
                        model, input_ids[at], attention_mask[at], logits_to_keep, None, **options
                    )
                self._add_gaps(held, part)
            parts.append(part)
        logprobs, entropies, losses = zip(*parts, strict=True)
        return (
            torch.cat(logprobs),
            None if entropies[0] is None else torch.cat(entropies),
            None if losses[0] is None else torch.stack(losses).mean(),
        )

    def _add_gaps(self, held: Sequence[RoutedSample], scored: Scored) -> None:
        if self.watch is not None:
            self.watch.add_gaps(sample_gaps(held, scored[0].detach().float().cpu()))

    @contextmanager
    def _scope(
        self, until: ExitStack, policy: nn.Module, at: slice, input_ids: Any, mask: Any
    ) -> Iterator[list[RoutedSample]]:
        """Open the scopes of one forward on ``until``, and take what they saw after it."""
        held = in_rows(self.samples[at], input_ids, mask)
        routes: PlacedRoutes | None = None
        recorder: RouteRecorder | None = None
        if self.routing is Routing.RECORD or self.watch is not None:
            # Around the replay, so that it sees what the routers would choose live.
            recorder = until.enter_context(record_routes(policy))
        if self.routing is Routing.REPLAY:
            routes = placed(held, input_ids, mask)
            until.enter_context(
                replay_routes(policy, routes.expert_ids, routes.valid, layers=routes.layers)
            )
        yield held
        if recorder is None:
            return
        live = recorder.take().cpu().numpy()
        if routes is None:
            rows = live.reshape(*mask.shape, *live.shape[1:])
            self.samples[at] = [
                _with_routes(sample, rows[number, mask[number].cpu().bool()], recorder)
                for number, sample in enumerate(held)
            ]
        elif self.watch is not None:
            columns = [recorder.layers.index(layer) for layer in routes.layers]
            self.watch.add_routes(routes, live[:, columns])


def padded(samples: Sequence[RoutedSample], fill: int) -> Batch:
    """Return a batch of these samples as TRL makes one: prompts on the left, completions right."""
    prompts = [torch.tensor(s.token_ids[: s.num_prompt_tokens]) for s in samples]
    completions = [torch.tensor(s.token_ids[s.num_prompt_tokens :]) for s in samples]
    ids, mask = [], []
    for rows, side in ((prompts, "left"), (completions, "right")):
        ids.append(pad(rows, padding_value=fill, padding_side=side))
        ones = [torch.ones_like(row) for row in rows]
        mask.append(pad(ones, padding_value=0, padding_side=side))
    return torch.cat(ids, dim=1), torch.cat(mask, dim=1), ids[1].shape[1]


def _with_routes(
    sample: RoutedSample, rows: Integer[torch.Tensor, "tokens layers topk"], recorder: RouteRecorder
) -> RoutedSample:
    num_tokens = len(sample.token_ids)
    trace = RoutingTrace.record(
        rows,
        token_ids=sample.token_ids,
        # Nothing is predicted from the last token, and engines give no route for it either.
        valid=np.arange(num_tokens) < num_tokens - 1,
        layers=recorder.layers,
        num_experts=recorder.num_experts,
        origin=Origin.single(
            engine="trl",
            engine_version=trl.__version__,
            policy_version=sample.step,
            num_rows=num_tokens,
        ),
    )
    return replace(sample, trace=trace)
