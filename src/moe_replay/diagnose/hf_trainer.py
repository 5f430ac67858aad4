"""A transformers model as a trainer: the sequence in one pass, live or under given routes.

The embedded engine samples with the same models, so that this is its side of the exact KL too.

In: a checkpoint. Out: HfTrainer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Integer
from torch.overrides import TorchFunctionMode

from moe_replay.diagnose.passes import Distributions, Pass, log_softmax, logprobs_of
from moe_replay.routing import Origin, RouteForm, RoutingTrace
from moe_replay.transformers import RouteRecorder, RouterSite, find_routers, replay_traces
from moe_replay.transformers.routers.station import tapped

_TOPK = (torch.topk, torch.Tensor.topk)
_KEEPS = "logits_to_keep"


class HfTrainer:
    """Runs sequences through a Hugging Face model, one at a time."""

    def __init__(self, model: Any) -> None:
        """Take a frozen model, such as `engines.embedded.engine.load_model` returns."""
        self._model = model
        self._sites = find_routers(model)
        self._device = next(model.parameters()).device
        self.num_words = int(model.get_output_embeddings().weight.shape[0])
        """Size of the vocabulary."""

    @classmethod
    def load(cls, model_dir: Path, *, dtype: str, device: str) -> HfTrainer:
        """Load a checkpoint.

        Raises:
            CheckpointError: when it lacks a tensor, or holds one that is not finite.
        """
        from moe_replay.engines.embedded.engine import load_model

        return cls(load_model(model_dir, getattr(torch, dtype), device))

    @property
    def form(self) -> RouteForm | None:
        """Layers, experts and top-k of its routers; None for a dense model."""
        if not self._sites:
            return None
        return RouteForm(
            layers=tuple(site.layer for site in self._sites),
            num_experts=self._sites[0].num_experts,
            topk=self._sites[0].topk,
        )

    @torch.inference_mode()
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
            UnsupportedError: when its routers cannot be recorded or replayed.
        """
        ids = torch.from_numpy(token_ids.astype(np.int64))[None].to(self._device)
        recorder = None
        with ExitStack() as scopes:
            base = scopes.enter_context(_kept_output(self._model.base_model))
            if replayed is not None:
                scopes.enter_context(
                    replay_traces(self._model, [replayed], input_ids=token_ids[None])
                )
            elif self._sites:
                recorder = scopes.enter_context(_recording(self._model, self._sites))
            self._logits(ids, torch.tensor([0]))
        distributions = self._distributions(ids, base[0], prompt_length)
        live, margins = None, None
        if recorder is not None:
            live, margins = self._trace(token_ids, recorder.take()), recorder.take_margins()
        return Pass(
            token_logprobs=logprobs_of(distributions, token_ids[prompt_length:], temperature),
            live=live,
            margins=margins,
            distributions=distributions,
        )

    def _logits(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return ``[rows, words]`` of some rows, where the model can leave the others out."""
        if _KEEPS in inspect.signature(self._model.forward).parameters:
            kept = {_KEEPS: rows.to(self._device)}
            return self._model(input_ids=ids, use_cache=False, **kept).logits[0]
        return self._model(input_ids=ids, use_cache=False).logits[0, rows.to(self._device)]

    def _distributions(self, ids: torch.Tensor, output: Any, prompt_length: int) -> Distributions:
        """Return what runs the model's head alone, on the hidden rows of a pass."""

        @torch.inference_mode()
        def distributions(tokens: slice, temperature: float) -> torch.Tensor:
            rows = torch.arange(prompt_length - 1 + tokens.start, prompt_length - 1 + tokens.stop)
            base = self._model.base_model
            # The model's own code around its head (scales, caps) runs as in any pass.
            base.forward = lambda *_, **__: output
            try:
                return log_softmax(self._logits(ids, rows), temperature)
            finally:
                del base.forward

        return distributions

    def _trace(
        self, token_ids: np.ndarray, routes: Integer[torch.Tensor, "rows layers topk"]
    ) -> RoutingTrace:
        form = self.form
        assert form is not None
        return RoutingTrace.record(
            routes.cpu().numpy(),
            token_ids=token_ids,
            valid=np.ones(len(token_ids), dtype=bool),
            layers=form.layers,
            num_experts=form.num_experts,
            origin=Origin.single(
                engine="transformers", engine_version="", policy_version=0, num_rows=len(token_ids)
            ),
        )


@contextmanager
def _kept_output(base: Any) -> Iterator[list[Any]]:
    """Keep what a module returns inside the scope."""
    kept: list[Any] = []
    handle = base.register_forward_hook(lambda *call: kept.append(call[2]))
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def _recording(model: Any, sites: tuple[RouterSite, ...]) -> Iterator[_MarginRecorder]:
    recorder = _MarginRecorder(sites)
    with tapped(model, sites, recorder), _Scores(recorder):
        yield recorder


class _MarginRecorder(RouteRecorder):
    """Records routes, and by how much the last chosen expert scored above the first left out."""

    def __init__(self, sites: tuple[RouterSite, ...]) -> None:
        super().__init__(sites)
        self.scores: torch.Tensor | None = None
        self._gaps: dict[int, torch.Tensor] = {}

    def choose(
        self, site: RouterSite, ids: Integer[torch.Tensor, "rows topk"]
    ) -> Integer[torch.Tensor, "rows topk"]:
        scores, self.scores = self.scores, None
        if scores is not None and scores.shape[-1] == site.num_experts > site.topk:
            flat = scores.reshape(-1, scores.shape[-1])
            rest = flat.scatter(1, ids, -torch.inf).amax(dim=1)
            self._gaps[site.layer] = (flat.gather(1, ids).amin(dim=1) - rest).float()
        return super().choose(site, ids)

    def take_margins(self) -> np.ndarray | None:
        """Return ``[rows, layers]``; None where a router did not choose by a top-k call."""
        if len(self._gaps) < len(self.layers):
            return None
        return torch.stack([self._gaps[layer] for layer in self.layers], dim=1).cpu().numpy()


class _Scores(TorchFunctionMode):
    """Notes the scores of the latest top-k call, from which a router has just chosen."""

    def __init__(self, recorder: _MarginRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _TOPK:
            self._recorder.scores = args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))
