"""Routes and log-probabilities of completions that transformers' ``generate`` samples.

In: a model inside ``generate``. Out: what was fed to it, step by step, with the routes of each
token and the log-probability of each sampled one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float32, Integer
from torch import nn

from moe_replay.errors import ReplayScopeError, TokenMismatchError, UnsupportedError
from moe_replay.routing import Origin, RoutingTrace
from moe_replay.transformers.record import RouteRecorder, record_routes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generated:
    """What was recorded of one sequence."""

    trace: RoutingTrace | None
    """Routes of prompt and completion; None if they were not recorded."""
    rollout_logprobs: Float32[np.ndarray, " completion"]
    """``[completion]``, of the tokens as sampled, in nats."""


class GenerationRecorder:
    """What one call of ``generate`` fed to its model, and what it got."""

    def __init__(self, routes: RouteRecorder | None, temperature: float) -> None:
        self._routes, self._temperature = routes, temperature
        self._fed: list[torch.Tensor] = []
        self._logprobs: list[torch.Tensor] = []
        self._latest: torch.Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the tokens of a forward; a pre-hook of the model."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            raise UnsupportedError(
                "generate feeds embeddings instead of token ids, so routes cannot be bound to "
                "tokens; generate from token ids"
            )
        if self._fed and tokens.shape != (len(self._fed[0]), 1):
            raise UnsupportedError(
                f"generate fed {list(tokens.shape)} tokens after the prompts, expected "
                f"[{len(self._fed[0])}, 1]: one new token a sequence. Beams, assistants, prefill in "
                "chunks and use_cache=False feed others; expected sampling with a cache"
            )
        if self._fed:
            self._score(tokens[:, 0])
        self._fed.append(tokens.detach())

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Keep the distribution of the next token; a hook of the model."""
        self._latest = (output.logits[:, -1].detach().float() / self._temperature).log_softmax(-1)

    def _score(self, chosen: torch.Tensor) -> None:
        assert self._latest is not None
        self._logprobs.append(self._latest.gather(1, chosen[:, None].to(self._latest.device))[:, 0])

    def sequences(
        self,
        token_ids: Sequence[Sequence[int]],
        num_prompt_tokens: Sequence[int],
        *,
        policy_version: int = 0,
    ) -> list[Generated]:
        """Return what was recorded of each sequence, prompt and completion, of the batch.

        ``token_ids`` are without padding, and end where the completion does. Prompts are padded on
        the left, as ``generate`` wants them.

        Raises:
            ReplayScopeError: when generation did not run, or ran for other sequences.
            TokenMismatchError: when other tokens were fed than the sequences hold.
        """
        batch = len(token_ids)
        if not self._fed or len(self._fed[0]) != batch:
            got = len(self._fed[0]) if self._fed else 0
            raise ReplayScopeError(
                f"generate fed {got} sequences to the recorded model, {batch} are asked for; "
                "expected one each: record the model that generates, and one call of generate"
            )
        width, num_steps = self._fed[0].shape[1], len(self._fed)
        # The last token of the longest sequences was never fed.
        last = [
            [*ids[start + num_steps - 1 :], 0][0]
            for ids, start in zip(token_ids, num_prompt_tokens, strict=True)
        ]
        self._score(torch.tensor(last, device=self._fed[0].device))
        fed = torch.cat(self._fed, dim=1).cpu().numpy()
        logprobs = torch.stack(self._logprobs, dim=1).cpu().numpy()
        routes = None if self._routes is None else self._rows(batch, width, num_steps)
        done = []
        for row, (ids, start) in enumerate(zip(token_ids, num_prompt_tokens, strict=True)):
            held = slice(width - start, width - start + len(ids) - 1)
            if fed[row, held].tolist() != list(ids)[:-1]:
                raise TokenMismatchError(
                    f"sequence {row} of the batch: generate fed other tokens to the model than its "
                    f"{len(ids)} tokens before the last one; the text was changed after it was "
                    "sampled, or prompts are not padded on the left"
                )
            trace = None
            if routes is not None:
                trace = self._trace(np.asarray(ids), routes[row, held], policy_version)
            done.append(Generated(trace=trace, rollout_logprobs=logprobs[row, : len(ids) - start]))
        return done

    def _trace(
        self,
        token_ids: Integer[np.ndarray, " tokens"],
        rows: Integer[np.ndarray, "fed layers topk"],
        policy_version: int,
    ) -> RoutingTrace:
        assert self._routes is not None
        num_tokens = len(token_ids)
        return RoutingTrace.record(
            # The token sampled last was never fed.
            np.concatenate([rows, np.zeros_like(rows[:1])]),
            token_ids=token_ids,
            valid=np.arange(num_tokens) < num_tokens - 1,
            layers=self._routes.layers,
            num_experts=self._routes.num_experts,
            origin=Origin.single(
                engine="transformers",
                engine_version=transformers.__version__,
                policy_version=policy_version,
                num_rows=num_tokens,
            ),
        )

    def _rows(self, batch: int, width: int, num_steps: int) -> np.ndarray:
        """Return the routes ``[batch, fed tokens, layers, topk]``.

        The recorder has them forward by forward: 2 prompts of 3 tokens and 2 more steps are rows
        aaabbb, ab, ab.
        """
        assert self._routes is not None
        rows = self._routes.take()
        if len(rows) != batch * (width + num_steps - 1):
            raise ReplayScopeError(
                f"the routers saw {len(rows)} rows, {batch} sequences of {width} tokens and "
                f"{num_steps - 1} more steps were fed; expected {batch * (width + num_steps - 1)}"
            )
        prompts = rows[: batch * width].view(batch, width, *rows.shape[1:])
        steps = rows[batch * width :].view(num_steps - 1, batch, *rows.shape[1:]).transpose(0, 1)
        return torch.cat([prompts, steps], dim=1).cpu().numpy()


@contextmanager
def record_generation(
    model: nn.Module, *, temperature: float = 1.0, records_routes: bool = True
) -> Iterator[GenerationRecorder]:
    """Record what ``generate`` of ``model`` feeds and samples inside the scope.

    ``temperature`` divides the logits before their log-probabilities are taken. They are those of
    the full distribution, whatever top-k or top-p cut off before sampling.

    Examples:
        >>> with record_generation(model) as recorder:
        ...     output = model.generate(prompt, do_sample=True)  # [1, 12], of which 5 are prompt
        >>> (found,) = recorder.sequences(output.tolist(), [5])
        >>> len(found.trace), len(found.rollout_logprobs)
        (12, 7)

    Raises:
        UnsupportedError: when the model is dense and routes are asked for, a router's choice
            cannot be read, or ``generate`` feeds other than one new token a sequence.
    """
    plain: Any = model
    # An adapter's wrapper calls generate of the model inside.
    inner = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    with ExitStack() as stack:
        routes = stack.enter_context(record_routes(model)) if records_routes else None
        recorder = GenerationRecorder(routes, temperature)
        stack.enter_context(inner.register_forward_pre_hook(recorder.before, with_kwargs=True))
        stack.enter_context(inner.register_forward_hook(recorder.after, with_kwargs=True))
        yield recorder
