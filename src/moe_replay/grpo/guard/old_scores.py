"""Old log-probabilities as a pass found them: checked, and its routes judged, before any learning.

In: what a forward pass under the weights to be trained found. Out: OldScores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moe_replay.batch import Sample
from moe_replay.errors import DivergedError
from moe_replay.grpo.guard.judging import judge_engine_routes
from moe_replay.grpo.guard.logprobs import require_own_logprobs
from moe_replay.grpo.guard.watch import PassWatch
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import Judged, OldScores, StepBatch
from moe_replay.megatron.scorer import ScoredSample, Scores
from moe_replay.routing import Routing


def watch_old(run: Run, batch: StepBatch) -> PassWatch | None:
    """Return what must watch the pass that gives old log-probabilities; None where all is live."""
    return PassWatch(batch.origins) if run.mode.passes.old is Routing.REPLAY else None


def old_pass(run: Run, batch: StepBatch) -> tuple[OldScores, Scores]:
    """Run the pass of old log-probabilities, and return it checked beside what it found.

    Raises:
        DivergedError: as `checked_scores`.
        MisalignmentError: as `checked_scores`.
    """
    watch = watch_old(run, batch)
    scores = run.actor.score(
        batch.for_scoring,
        temperature=run.temperature,
        routing=run.mode.passes.old,
        watch=watch.route_watch if watch is not None else None,
    )
    return checked_scores(run, batch, scores.samples, watch, where="old_logprobs"), scores


def checked_scores(
    run: Run,
    batch: StepBatch,
    scored: Mapping[int, ScoredSample],
    watch: PassWatch | None,
    *,
    where: str,
) -> OldScores:
    """Check what a pass found of the samples, and judge the routes that it replayed; collective.

    What the guard finds keeps its sample out of training, or stops the run. ``where`` names the
    pass in errors.

    Raises:
        DivergedError: on every rank, when a value of some token is not finite.
        MisalignmentError: on every rank, when routes or the engine's log-probabilities are not
            those of their tokens.
    """
    require_finite(run, batch.samples, scored, "old_logprobs")
    judged = Judged()
    if watch is not None:
        judged = judge_engine_routes(run, batch, watch, scored, where=where)
        batch = batch.without(judged.dropped_here(batch))
    require_own_logprobs(run, batch, scored, where=where)
    return OldScores(batch=batch, scored=scored, metrics=judged.metrics, judged=judged)


def require_finite(
    run: Run, samples: Sequence[Sample], scored: Mapping[int, ScoredSample], what: str
) -> None:
    """Raise `DivergedError` on every rank when a value of some token is not finite; collective."""
    broken = []
    for sample in samples:
        values = scored[sample.sample_id]
        finite = np.isfinite(values.token_logprobs) & np.isfinite(values.entropies)
        if sample.reported_here and not finite.all():
            first = int(np.flatnonzero(~finite)[0])
            broken.append(
                f"sample {sample.sample_id} of replica {run.replica.number}: {int((~finite).sum())} "
                f"of {len(finite)} sampled tokens, the first at {first} (token id "
                f"{sample.token_ids[sample.is_sampled][first]})"
            )
    gathered = [text for part in run.ranks.gather(broken[:3]) for text in part]
    if gathered:
        listed = "\n  ".join(gathered[:8])
        raise DivergedError(
            f"step {run.step}: {what} or entropies are not finite, expected a finite value for every "
            f"sampled token; no weight was changed and nothing was pushed.\n  {listed}\nLikely causes: "
            "weights that hold NaN or infinity (look at grad_norm of the steps before), or a token "
            "that the engine sampled and the trainer's model rules out. Resume from an earlier "
            "checkpoint with a lower optimizer.lr"
        )
