"""ReplayGRPOTrainer: TRL's `GRPOTrainer` with R2 and R3.

It overrides four of TRL's methods: the one that generates keeps the routes, the one that scores
opens the scopes, the one that makes the batch adds a list that TRL shuffles and splits with it, and
the one that takes a training step keeps the scopes open until the backward pass has run, and asks
the guard before the optimizer moves.

Source: TRL 1.16, `GRPOTrainer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object, is_peft_model
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from moe_replay.errors import ReplayScopeError, UnsupportedError
from moe_replay.routing import ReplayMode, Routing
from moe_replay.routing.guard import Guard
from moe_replay.transformers import find_routers, record_generation
from moe_replay.transformers.model_config import routed_of
from moe_replay.trl.judging import Judged, judge_again, judge_first
from moe_replay.trl.passes import Batch, SamplePass, Scored, padded
from moe_replay.trl.samples import RoutedSample
from moe_replay.trl.vllm_routes import VllmRoutes, recording_vllm
from moe_replay.trl.watch import PassWatch
from moe_replay.trl.window import Round, Window

KEY = "moe_replay"
"""Where a batch of TRL keeps its `RoutedSample`s."""


class ReplayGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer`, with the experts of each sample's routes in the update.

    Args:
        *args: of `GRPOTrainer`.
        router_replay_mode: ``"R2"`` records routes in a pass of old log-probabilities (TRL's own,
            or one of its own where TRL skips it) and replays them in the update. ``"R3"`` records
            them while completions are sampled, and replays them in every pass. ``"disabled"``
            replays nothing, and logs the engine gap alone.
        guard: judge the routes of every sample before the optimizer moves, and stop when they are
            not those of its tokens.
        min_coverage: least share of the replayable rows that must be replayed.
        reference_routes: ``"replay"`` scores the reference model under the same routes.
        measure_live_gap: with R3, score each rollout once more with live routing, and log that gap
            beside the one under replay. Costs a forward pass.
        **kwargs: of `GRPOTrainer`.

    Examples:
        >>> from moe_replay.trl import ReplayGRPOTrainer
        >>> trainer = ReplayGRPOTrainer(
        ...     model="Qwen/Qwen3-30B-A3B",
        ...     reward_funcs=accuracy_reward,
        ...     train_dataset=dataset,
        ...     router_replay_mode="R3",
        ... )
        >>> trainer.train()

    Raises:
        UnsupportedError: when the model is dense, or samples come from where routes cannot be
            recorded.
        MisalignmentError: in `train`, when a sample's routes are not those of its tokens.
        TokenMismatchError: in `train`, when a sample's tokens are not those of its routes.
        CoverageError: in `train`, when too few rows have routes.
    """

    args: Any
    model: Any

    def __init__(
        self,
        *args: Any,
        router_replay_mode: Literal["disabled", "R2", "R3"] = "R3",
        guard: bool = True,
        min_coverage: float = 0.95,
        reference_routes: Literal["live", "replay"] = "replay",
        measure_live_gap: bool = False,
        **kwargs: Any,
    ) -> None:
        self._mode = ReplayMode(router_replay_mode)
        self._guard = Guard() if guard else None
        self._min_coverage, self._measure_live_gap = min_coverage, measure_live_gap
        self._replays_reference = reference_routes == "replay"
        self._open = ExitStack()
        self._pass: SamplePass | None = None
        self._rollouts: list[RoutedSample] | None = None
        self._num_samples = 0
        self._vllm_routes: VllmRoutes | None = None
        with recording_vllm(is_cpu=not torch.cuda.is_available()) if self._records else ExitStack():
            super().__init__(*args, **kwargs)
        self._num_experts = self._require_supported()
        if self._records and self.use_vllm:
            model = routed_of(self._policy)
            assert model is not None, "a model that is not dense"
            self._vllm_routes = VllmRoutes(self.vllm_generation, self.accelerator, model)
        self._window = Window(self._num_experts)
        self._judged: Judged | None = None

    def _require_supported(self) -> int:
        """Return the experts a layer; raise for what routes cannot follow."""
        if not self._mode.replays:
            return 0
        sites = find_routers(self._policy)
        if not sites:
            raise UnsupportedError(
                f"{type(self._policy).__name__} is dense: it has no routes to replay; use "
                "router_replay_mode='disabled', or TRL's GRPOTrainer"
            )
        unnamed = {
            "tools": self.tools and not self.environment_factories,
            "environment_factory": self.environment_factories,
            "rollout_func": self.rollout_func,
        }
        found = [name for name, is_on in unnamed.items() if is_on]
        if found:
            raise UnsupportedError(
                f"{self._mode.value} cannot follow the samples of {', '.join(found)}: TRL generates "
                "them in calls that do not name their sample; leave it out, or use "
                "router_replay_mode='disabled'"
            )
        if self._records and self.use_transformers_continuous_batching:
            raise UnsupportedError(
                "R3 cannot record the routes of use_transformers_continuous_batching, whose graphs "
                "run without Python; use transformers' generate, or router_replay_mode='R2', which "
                "needs no routes of the engine"
            )
        return sites[0].num_experts

    @property
    def _records(self) -> bool:
        """Whether routes come from generation."""
        return self._mode.passes.engine is Routing.RECORD

    @property
    def _policy(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _takes_old_pass(self) -> bool:
        """Whether TRL scores the rollouts before the update."""
        generate_every = self.args.steps_per_generation * self.num_iterations
        return self.args.gradient_accumulation_steps % generate_every != 0 or bool(
            self.use_vllm and self.vllm_importance_sampling_correction
        )

    def _gather(self, value: Any) -> list[Any]:
        return gather_object([value])

    def _log_replay(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Generate as TRL does, and keep what was sampled with its routes."""
        if not self.model.training or self.tools or self.rollout_func:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with ExitStack() as stack:
            recorder = None
            if not self.use_vllm and not self.use_transformers_continuous_batching:
                scope = record_generation(
                    self.accelerator.unwrap_model(self.model_wrapped),
                    temperature=self.temperature,
                    records_routes=self._records,
                )
                recorder = stack.enter_context(scope)
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        samples = self._sampled(prompt_ids, completion_ids, logprobs)
        if recorder is not None:
            found = recorder.sequences(
                [sample.token_ids.tolist() for sample in samples],
                [sample.num_prompt_tokens for sample in samples],
                policy_version=self.state.global_step,
            )
            samples = [
                replace(sample, trace=one.trace, rollout_logprobs=one.rollout_logprobs)
                for sample, one in zip(samples, found, strict=True)
            ]
        elif self._vllm_routes is not None:
            samples = self._vllm_routes.attach(samples)
        self._rollouts = samples
        if self._mode is ReplayMode.R2 and not self._takes_old_pass:
            self._record_routes(self._rollouts)
        return completion_ids, logprobs

    def _sampled(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float | None]] | None,
    ) -> list[RoutedSample]:
        first = self._num_samples + self.accelerator.process_index * len(prompt_ids)
        self._num_samples += self.accelerator.num_processes * len(prompt_ids)
        return [
            RoutedSample(
                number=first + at,
                prompt=(first + at) // self.num_generations,
                token_ids=np.array([*prompt, *completion_ids[at]], dtype=np.int64),
                num_prompt_tokens=len(prompt),
                step=self.state.global_step,
                rollout_logprobs=(
                    None if logprobs is None else np.array(logprobs[at], dtype=np.float32)
                ),
            )
            for at, prompt in enumerate(prompt_ids)
        ]

    def _record_routes(self, samples: list[RoutedSample]) -> None:
        """Score the rollouts live once, for their routes, where TRL does not (R2)."""
        fill, device = self._tokenizer.pad_token_id, self.accelerator.device
        ids, mask, num_completion = padded(samples, fill)
        batch = (ids.to(device), mask.to(device), num_completion)
        self._score_again(SamplePass(samples=samples, routing=Routing.RECORD), batch)

    def _score_again(self, now: SamplePass, batch: Batch) -> None:
        self._pass = now
        try:
            with (
                torch.no_grad(),
                disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            ):
                size = self.args.per_device_train_batch_size
                self._get_per_token_logps_and_entropies(self.model, *batch, batch_size=size)
        finally:
            self._pass = None

    def _live_watch(self, scored: Sequence[tuple[list[RoutedSample], Batch]]) -> PassWatch:
        """Score batches again with live routing, and return their gaps."""
        watch = PassWatch(self._num_experts)
        for samples, batch in scored:
            live = SamplePass(samples=samples, routing=Routing.LIVE, watch=watch)
            self._score_again(live, batch)
        return watch

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """Generate and score as TRL does, and let the samples follow the batch."""
        try:
            output = super()._generate_and_score_completions(inputs)
            if self._rollouts is not None:
                output[KEY] = self._rollouts
            return output
        finally:
            self._rollouts = None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **options: Any,
    ) -> Scored:
        """Score as TRL does, under the routes that the pass asks for."""
        call = super()._get_per_token_logps_and_entropies
        batch = (input_ids, attention_mask, logits_to_keep)
        now, is_old = self._pass, False
        if now is None and self._rollouts is not None:
            is_old = not self._is_reference(model)
            now = self._old_pass() if is_old else self._reference_pass()
        if now is None:
            return call(model, *batch, batch_size, **options)
        policy = self.accelerator.unwrap_model(model)
        scored = now.score(call, model, policy, *batch, batch_size, **options)
        if is_old and now.watch is not None:
            self._close_old(now, batch)
        return scored

    def _is_reference(self, model: Any) -> bool:
        """Whether a pass of a generation is the reference's: its own model, or without adapter."""
        if model is self.ref_model:
            return True
        if not is_peft_model(model):
            return False
        from peft.tuners.tuners_utils import BaseTunerLayer

        layer = next(part for part in model.modules() if isinstance(part, BaseTunerLayer))
        return layer.disable_adapters or "ref" in layer.active_adapters

    def _old_pass(self) -> SamplePass:
        assert self._rollouts is not None
        watch = PassWatch(self._num_experts)
        return SamplePass(samples=self._rollouts, routing=self._mode.passes.old, watch=watch)

    def _reference_pass(self) -> SamplePass | None:
        assert self._rollouts is not None
        if not (self._mode.replays and self._replays_reference):
            return None
        return SamplePass(samples=self._rollouts, routing=Routing.REPLAY)

    def _close_old(self, old: SamplePass, batch: Batch) -> None:
        """Log the engine gap of the pass, and judge the engine's routes."""
        assert old.watch is not None
        self._close_first(old.watch, [(old.samples, batch)], "old_logprobs")

    def _close_first(
        self, watch: PassWatch, scored: Sequence[tuple[list[RoutedSample], Batch]], name: str
    ) -> None:
        """Log the engine gap of the first pass over samples, and judge an engine's routes."""
        self._log_replay(watch.gap_metric(self._gather, "rollout_correction/k3_kl"))
        if self._records and self._measure_live_gap:
            live = self._live_watch(scored)
            self._log_replay(live.gap_metric(self._gather, "rollout_correction/k3_kl_live"))
        if self._records:
            self._judge_first(watch, scored, name)

    def _judge_first(
        self, watch: PassWatch, scored: Sequence[tuple[list[RoutedSample], Batch]], name: str
    ) -> None:
        """Judge routes by the first pass under them, which the recording weights take."""
        watch.coverage(self._gather).require(self._min_coverage)
        if self._guard is not None:
            found = judge_first(
                self._guard,
                watch,
                prompts={s.number: s.prompt for samples, _ in scored for s in samples},
                live_gaps=lambda: self._live_watch(scored).mean_gaps(),
                gather=self._gather,
                where=f"step {self.state.global_step}, {name}",
            )
            self._log_replay(found.metrics)
            self._judged = found if self._judged is None else self._judged.joined(found)

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        """Compute TRL's loss, its forward under the routes of its samples."""
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        samples = inputs.get(KEY)
        if samples is None and self._mode.replays:
            raise ReplayScopeError(
                f"a batch of TRL has no list under the key {KEY!r}, expected the samples whose "
                "routes are replayed; something between generation and loss made a new batch"
            )
        if samples is None:
            return super()._compute_loss(model, inputs)
        batch = (
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
        )
        self._pass = SamplePass(
            samples=samples,
            routing=self._mode.passes.update,
            watch=self._window.take(samples, batch).watch,
            open=self._open,
        )
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._pass = None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Take TRL's training step inside its scopes, and judge before the optimizer moves."""
        with ExitStack() as self._open:
            loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._close_window()
        return loss

    def _close_window(self) -> None:
        """Log and judge all that one optimizer step learns from; collective."""
        rounds, self._window = self._window.rounds, Window(self._num_experts)
        for number, one in enumerate(rounds):
            self._close_round(one, is_first=number == 0)
        self._judged = None

    def _close_round(self, now: Round, *, is_first: bool) -> None:
        watch, scored = now.watch, now.scored
        self._log_replay(watch.metrics(self._gather))
        if is_first and not self._takes_old_pass:
            self._close_first(watch, scored, "update")
        if not self._mode.replays:
            return
        steps = {sample.step for samples, _ in scored for sample in samples}
        weights_moved = steps != {self.state.global_step}
        if is_first and self._mode is ReplayMode.R2 and not weights_moved:
            self._judge_first(watch, scored, "update")
        elif not is_first or self._mode is ReplayMode.R2 or self._takes_old_pass:
            self._judge_again(watch, weights_moved=weights_moved)

    def _judge_again(self, watch: PassWatch, *, weights_moved: bool) -> None:
        """Judge what a pass before has judged, or what drift has changed since it was recorded."""
        watch.coverage(self._gather).require(self._min_coverage)
        if self._guard is not None:
            found = judge_again(
                self._guard,
                watch,
                before=self._judged,
                weights_moved=weights_moved,
                gather=self._gather,
                where=f"step {self.state.global_step}, update",
            )
            self._log_replay(found.metrics)
