"""The stations of a step: each takes what the one before returned, and does one thing.

In: the run and the results of earlier stations. Out: rollouts, scores, samples, updated weights, records.
Called by: grpo.loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float64

from moe_replay.batch import Microbatch, Sample, build_microbatch, plan_microbatches
from moe_replay.grpo.advantage import GroupAdvantages, group_advantages, reward_metrics
from moe_replay.grpo.loss import (
    BatchSize,
    LossInputs,
    LossSettings,
    LossStatistics,
    policy_loss,
    sample_weights,
)
from moe_replay.grpo.metrics import Tally, completion_lengths, engine_gap, step_tally, update_tally
from moe_replay.grpo.records import CompletionRecord, EvalRecord, StepRecord
from moe_replay.grpo.run import Run
from moe_replay.grpo.watch import AgreementWatch
from moe_replay.megatron.scorer import RouteWatch, Routing, ScoredSample
from moe_replay.rollout.prompts import Prompt
from moe_replay.rollout.types import (
    Completion,
    FinishReason,
    Request,
    RolloutGroup,
    SamplingParams,
    check_group,
)
from moe_replay.routing import Coverage, Guard, ReplayMode

EVAL_REQUESTS = 1 << 40
"""First request id of evaluations, so that they never share sampling noise with training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """This rank's prompts of a step and their completions."""

    prompts: tuple[Prompt, ...]
    """Whole groups, mini-batch after mini-batch."""
    groups: tuple[RolloutGroup, ...]
    """One for each prompt."""

    @property
    def completions(self) -> list[Completion]:
        """All completions, prompt after prompt."""
        return [completion for group in self.groups for completion in group.completions]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Rewards of this rank's completions, and what the whole batch says about them."""

    rewards: Mapping[str, Float64[np.ndarray, "groups generations"]]
    """Reward function -> scores of this rank's completions, before weights."""
    totals: Float64[np.ndarray, "groups generations"]
    """Weighted sums."""
    advantages: Float64[np.ndarray, "groups generations"]
    """Of this rank's completions."""
    metrics: Mapping[str, float]
    """``reward``, ``reward_std``... over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OldScores:
    """What the trainer thinks of the samples before it learns from them."""

    samples: tuple[Sample, ...]
    """With the traces that the update replays: the engine's (R3) or those of this pass (R2)."""
    scored: Mapping[int, ScoredSample]
    """Sample id -> old log-probabilities and entropies."""
    coverage: Coverage
    """Rows of the update that are replayed, on this rank."""
    bytes_per_token: float
    """Bytes of routes for each token; 0 when nothing is replayed."""
    metrics: Mapping[str, float]
    """Agreement of the replayed pass (R3), and the live gap when it was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What the optimizer steps of a step did."""

    metrics: Mapping[str, float]
    """``loss``, ``clip_ratio/*``, ``grad_norm``... over all ranks."""


def roll_out(run: Run) -> Rollout:
    """Sample completions for this rank's share of the step's prompts."""
    recipe = run.recipe
    position = run.next_prompt
    prompts = run.inputs.train.at(position, recipe.prompts_per_step)
    run.next_prompt += recipe.prompts_per_step
    mine = run.share_of_prompts()
    requests = [
        Request(
            request_id=position + place,
            prompt_ids=prompts[place].prompt_ids,
            num_generations=recipe.rollout.num_generations,
        )
        for place in mine
    ]
    groups = run.engine.generate(requests, run.sampling())
    for group in groups:
        check_group(group, run.engine.description)
    return Rollout(prompts=tuple(prompts[place] for place in mine), groups=tuple(groups))


def score_rewards(run: Run, rollout: Rollout) -> Scored:
    """Run the reward functions, and compare the completions of each prompt with one another."""
    generations = run.recipe.rollout.num_generations
    batch = run.inputs.rewards.score(
        [prompt for prompt in rollout.prompts for _ in range(generations)],
        [run.decode(completion.token_ids) for completion in rollout.completions],
        [completion.token_ids.tolist() for completion in rollout.completions],
    )
    rewards = {name: scores.reshape(-1, generations) for name, scores in batch.scores.items()}
    totals = batch.total.reshape(-1, generations)
    gathered = run.gather(
        {"totals": totals.tolist(), "rewards": {n: s.tolist() for n, s in rewards.items()}}
    )
    whole = group_advantages(
        np.concatenate([np.array(part["totals"], dtype=np.float64) for part in gathered]),
        scale_rewards=run.recipe.grpo.scale_rewards,
    )
    scores = {
        name: np.concatenate([np.array(part["rewards"][name], dtype=np.float64) for part in gathered])
        for name in rewards
    }
    return Scored(
        rewards=rewards,
        totals=totals,
        advantages=_own_rows(run, whole, len(totals)),
        metrics=reward_metrics(whole, scores),
    )


def _own_rows(
    run: Run, whole: GroupAdvantages, num_groups: int
) -> Float64[np.ndarray, "groups generations"]:
    first = run.process.rank * num_groups
    return whole.advantages[first : first + num_groups]


def make_samples(run: Run, rollout: Rollout, scored: Scored) -> tuple[Sample, ...]:
    """Join prompts, completions and advantages; keep the traces only if the mode replays the engine's."""
    keeps_traces = run.mode is ReplayMode.R3
    samples = []
    for prompt, group, advantages in zip(
        rollout.prompts, rollout.groups, scored.advantages, strict=True
    ):
        for completion, advantage in zip(group.completions, advantages, strict=True):
            overlong = completion.finish_reason is FinishReason.LENGTH
            samples.append(
                Sample(
                    sample_id=len(samples),
                    token_ids=np.concatenate([prompt.prompt_ids, completion.token_ids]),
                    prompt_length=len(prompt.prompt_ids),
                    rollout_logprobs=completion.rollout_logprobs,
                    advantage=float(advantage),
                    trains=not (overlong and run.recipe.grpo.overlong_filter),
                    trace=completion.trace if keeps_traces else None,
                )
            )
    return tuple(samples)


def microbatches_of(run: Run, samples: Sequence[Sample]) -> list[Microbatch]:
    """Pack samples into this rank's microbatches."""
    batch = run.recipe.batch
    plan = plan_microbatches(
        [len(sample.token_ids) for sample in samples],
        max_tokens=batch.max_tokens_per_microbatch,
        max_samples=batch.micro_batch_size,
    )
    return [
        build_microbatch(key, [samples[position] for position in group])
        for key, group in enumerate(plan)
    ]


def score_old(run: Run, samples: Sequence[Sample]) -> OldScores:
    """Score the samples with the weights that will learn from them, recording (R2) or replaying (R3) routes.

    Raises:
        CoverageError: when too few rows can be replayed; nothing has been learned then.
    """
    microbatches = microbatches_of(run, samples)
    routing = {
        ReplayMode.DISABLED: Routing.LIVE,
        ReplayMode.R2: Routing.RECORD,
        ReplayMode.R3: Routing.REPLAY,
    }[run.mode]
    watch = _watch(run, run.guard, "old_logprobs")
    scored = run.actor.score(
        microbatches,
        temperature=run.temperature,
        routing=routing,
        watch=_route_watch(run, watch),
        policy_version=run.policy_version,
    )
    metrics = dict(watch.metrics(run.group, device=run.device)) if routing is Routing.REPLAY else {}
    if run.live_gap_is_due:
        live = run.actor.score(microbatches, temperature=run.temperature, routing=Routing.LIVE)
        metrics |= run.merge(_gap(samples, live, prefix="live_gap"))
    if routing is Routing.RECORD:
        samples = [replace(sample, trace=scored[sample.sample_id].trace) for sample in samples]
    coverage = Coverage.total(m.coverage for m in microbatches_of(run, samples))
    coverage.require(run.min_coverage)
    traces = [sample.trace for sample in samples if sample.trace is not None]
    tokens = sum(len(trace) for trace in traces)
    return OldScores(
        samples=tuple(samples),
        scored=scored,
        coverage=coverage,
        bytes_per_token=sum(t.expert_ids.nbytes for t in traces) / tokens if tokens else 0.0,
        metrics=metrics,
    )


def score_reference(run: Run, samples: Sequence[Sample]) -> Mapping[int, ScoredSample] | None:
    """Score the samples with the reference model; None when the loss has no KL term."""
    if run.reference is None:
        return None
    replays = run.recipe.replay.reference_routes == "replay" and run.mode is not ReplayMode.DISABLED
    return run.reference.score(
        microbatches_of(run, samples),
        temperature=run.temperature,
        routing=Routing.REPLAY if replays else Routing.LIVE,
    )


def update_policy(
    run: Run, old: OldScores, reference: Mapping[int, ScoredSample] | None
) -> Update:
    """Take the step's optimizer steps, one for each mini-batch."""
    count = run.recipe.batch.steps_per_generation
    size = len(old.samples) // count
    parts: list[Tally] = []
    metrics: dict[str, float] = {}
    for number in range(count):
        part, result = _update_once(
            run, old, reference, old.samples[number * size : (number + 1) * size], number
        )
        parts.append(part)
        # The agreement of the first mini-batch is that of the alignment.
        metrics = result | metrics if number == 0 else metrics | {
            name: value for name, value in result.items() if not name.startswith("replay/")
        }
    return Update(metrics=step_tally(parts).finish() | metrics)


def _update_once(
    run: Run,
    old: OldScores,
    reference: Mapping[int, ScoredSample] | None,
    samples: Sequence[Sample],
    number: int,
) -> tuple[Tally, dict[str, float]]:
    """Take one optimizer step; return its loss tally over all ranks and its other metrics."""
    recipe = run.recipe
    lengths = {sample.sample_id: sample.completion_length for sample in samples}
    trains = [sample.trains for sample in samples]
    counted = [n for n, counts in zip(lengths.values(), trains, strict=True) if counts]
    gathered = run.gather([len(counted), sum(counted)])
    whole = BatchSize(
        num_samples=sum(part[0] for part in gathered), num_tokens=sum(part[1] for part in gathered)
    )
    weights = sample_weights(
        list(lengths.values()),
        trains,
        loss_type=recipe.grpo.loss_type,
        whole=whole,
        max_completion_length=recipe.rollout.max_completion_length,
    )
    weight_of = dict(zip(lengths, weights, strict=True))
    settings = LossSettings(
        loss_type=recipe.grpo.loss_type,
        epsilon=recipe.grpo.epsilon,
        epsilon_high=recipe.grpo.epsilon_high,
        beta=recipe.grpo.beta,
    )
    statistics: list[LossStatistics] = []

    def loss(microbatch: Microbatch, new_logprobs: torch.Tensor) -> torch.Tensor:
        def rows(values: Sequence[np.ndarray]) -> torch.Tensor:
            placed = microbatch.place(values, fill=0.0)[microbatch.predicts_sampled]
            return torch.from_numpy(placed).to(new_logprobs.device)

        ids = [sample.sample_id for sample in microbatch.samples]
        inputs = LossInputs(
            new_logprobs=new_logprobs,
            old_logprobs=rows([old.scored[i].logprobs for i in ids]),
            ref_logprobs=rows([reference[i].logprobs for i in ids]) if reference else None,
            advantages=rows(
                [np.full(s.completion_length, s.advantage) for s in microbatch.samples]
            ),
            weights=rows([np.full(lengths[i], weight_of[i]) for i in ids]),
        )
        value, part = policy_loss(inputs, settings)
        statistics.append(part)
        return value

    replays = run.mode is not ReplayMode.DISABLED
    # Later mini-batches drift away from their routes on purpose; only the first can show a misalignment.
    guard = run.guard if number == 0 else None
    watch = _watch(run, guard, f"update {number + 1} of {recipe.batch.steps_per_generation}")
    result = run.actor.update(
        microbatches_of(run, samples),
        loss,
        temperature=run.temperature,
        routing=Routing.REPLAY if replays else Routing.LIVE,
        watch=_route_watch(run, watch) if replays else None,
    )
    tally = Tally.merge(
        Tally.from_plain(part)
        for part in run.gather(update_tally(statistics, with_kl=reference is not None).to_plain())
    )
    metrics = {"grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
    if replays:
        metrics |= watch.metrics(run.group, device=run.device)
    return tally, metrics


def push_weights(run: Run) -> None:
    """Give the updated weights to the engine, as a new policy version."""
    run.policy_version += 1
    run.engine.load_weights(run.export_weights(), policy_version=run.policy_version)


def step_record(
    run: Run, rollout: Rollout, scored: Scored, old: OldScores, update: Update
) -> tuple[StepRecord, list[CompletionRecord]]:
    """Collect the step's metrics over all ranks, and a record of every completion."""
    lengths = [sample.completion_length for sample in old.samples]
    tally = Tally.merge([_gap(old.samples, old.scored), completion_lengths(lengths)])
    for sample in old.samples:
        entropies = old.scored[sample.sample_id].entropies
        tally.add_mean("entropy/mean", total=float(entropies.sum()), count=len(entropies))
    metrics = dict(scored.metrics) | run.merge(tally) | dict(update.metrics) | dict(old.metrics)
    metrics["policy_version"] = float(run.policy_version)
    if run.mode is not ReplayMode.DISABLED:
        metrics |= _coverage_metrics(run, old)
    records = _completion_records(run, rollout, scored)
    gathered = run.gather([_plain_record(record) for record in records])
    everyone = [CompletionRecord(**record) for part in gathered for record in part]
    return StepRecord(step=run.step, metrics=metrics, seconds=run.take_seconds()), everyone


def evaluate(run: Run) -> None:
    """Report the reward of held-out prompts under the current weights."""
    if run.inputs.held_out is None:
        return
    started = time.perf_counter()
    settings = run.recipe.eval
    held_out = run.inputs.held_out
    count = min(run.recipe.data.eval_size, held_out.num_prompts or run.recipe.data.eval_size)
    with run.station("eval"):
        prompts = held_out.at(0, count)
        mine = range(run.process.rank, count, run.process.world_size)
        requests = [
            Request(
                request_id=EVAL_REQUESTS + place,
                prompt_ids=prompts[place].prompt_ids,
                num_generations=settings.num_generations,
            )
            for place in mine
        ]
        sampling = SamplingParams(
            max_completion_length=run.recipe.rollout.max_completion_length,
            temperature=settings.temperature,
            seed=run.recipe.run.seed,
        )
        groups = run.engine.generate(requests, sampling)
        completions = [completion for group in groups for completion in group.completions]
        batch = run.inputs.rewards.score(
            [prompts[place] for place in mine for _ in range(settings.num_generations)],
            [run.decode(completion.token_ids) for completion in completions],
            [completion.token_ids.tolist() for completion in completions],
        )
        tally = Tally()
        tally.add_mean("eval/reward", total=float(batch.total.sum()), count=len(batch.total))
        for name, scores in batch.scores.items():
            tally.add_mean(f"eval/rewards/{name}", total=float(scores.sum()), count=len(scores))
        tally.add_sum("eval/num_items", len(mine))
        metrics = run.merge(tally)
    run.reporter.evaluation(
        EvalRecord(step=run.step, metrics=metrics, seconds=time.perf_counter() - started)
    )


def save_checkpoint(run: Run) -> None:
    """Write everything that a resumed run needs."""
    run.checkpoints.save(run.actor, run.position())


def export_model(run: Run) -> str:
    """Write the trained model as a Hugging Face checkpoint; return what to tell the user."""
    if not run.recipe.checkpoint.export:
        return f"results in {run.directory}"
    run.write_export()
    return f"results in {run.directory}, trained model in {run.export_path}"


def _gap(
    samples: Sequence[Sample],
    scored: Mapping[int, ScoredSample],
    *,
    prefix: str = "rollout_correction",
) -> Tally:
    return engine_gap(
        [scored[sample.sample_id].logprobs for sample in samples],
        [sample.rollout_logprobs for sample in samples],
        prefix=prefix,
    )


def _watch(run: Run, guard: Guard | None, name: str) -> AgreementWatch:
    return AgreementWatch(
        guard,
        num_experts=run.engine.description.num_experts,
        where=f"step {run.step}, rank {run.process.rank}, {name}",
    )


def _route_watch(run: Run, watch: AgreementWatch) -> RouteWatch:
    return RouteWatch(num_rows=run.recipe.replay.guard_rows, observe=watch.observe)


def _coverage_metrics(run: Run, old: OldScores) -> dict[str, float]:
    parts = run.gather(
        [old.coverage.num_replayed, {str(r): n for r, n in old.coverage.num_live.items()}]
    )
    whole = Coverage.total(Coverage.from_counts(part[0], part[1]) for part in parts)
    return {
        "replay/coverage": whole.fraction,
        "replay/bytes_per_token": old.bytes_per_token,
        **{f"replay/rows_live_{reason}": float(n) for reason, n in whole.num_live.items()},
    }


def _completion_records(run: Run, rollout: Rollout, scored: Scored) -> list[CompletionRecord]:
    records = []
    for number, (prompt, group) in enumerate(zip(rollout.prompts, rollout.groups, strict=True)):
        for place, completion in enumerate(group.completions):
            records.append(
                CompletionRecord(
                    step=run.step,
                    prompt=prompt.text,
                    completion=run.decode(completion.token_ids),
                    rewards={n: float(s[number, place]) for n, s in scored.rewards.items()},
                    reward=float(scored.totals[number, place]),
                    advantage=float(scored.advantages[number, place]),
                    num_tokens=len(completion.token_ids),
                    finish_reason=str(completion.finish_reason),
                    policy_version=completion.policy_version,
                )
            )
    return records


def _plain_record(record: CompletionRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in CompletionRecord.__dataclass_fields__}
