"""The tokens of a few samples of each step, kept one by one for whoever looks at them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_replay.batch import Sample
from moe_replay.grpo.records import TokenRecord
from moe_replay.grpo.run import Run
from moe_replay.grpo.telling import samples_with_tokens
from moe_replay.grpo.types import Judged, OldScores
from moe_replay.megatron.scorer import ScoredSample

_DECIMALS = 5  # of a log-probability: far below what colours or a table can show
_TOKEN_BYTES = 64  # of a token in a message, generously


def samples_chosen(run: Run, judged: Judged) -> frozenset[int]:
    """Return the indices in the step of the samples whose tokens this run keeps."""
    keys = run.recipe.logging
    num_kept = keys.num_with_tokens if keys.completions else 0
    return samples_with_tokens(judged.agreement, judged.dropped, num_kept=num_kept)


def kept_tokens(run: Run, old: OldScores) -> dict[int, TokenRecord]:
    """Return the kept tokens by index of the sample in the step, on rank 0; collective."""
    chosen = samples_chosen(run, old.judged)
    if not chosen:
        return {}
    found = []
    for sample in old.batch.samples:
        index = old.batch.origins[sample.sample_id].index
        if sample.reported_here and index in chosen:
            record = _record(run, sample, old.scored[sample.sample_id], old.judged.flips.get(index))
            found.append((index, record))
    parts = run.ranks.gather_items_to_first(
        found, lambda entry: 1024 + _TOKEN_BYTES * len(entry[1].texts)
    )
    return {index: record for part in parts for index, record in part}


def _record(
    run: Run, sample: Sample, scored: ScoredSample, flips: Mapping[int, int] | None
) -> TokenRecord:
    ids = sample.token_ids[sample.is_sampled]
    # A token is predicted by the row before it, so that row's routes decided about it.
    rows = np.flatnonzero(sample.predicts_sampled).tolist()
    return TokenRecord(
        texts=[run.inputs.text(ids[i : i + 1]) for i in range(len(ids))],
        rollout_logprobs=_rounded(sample.rollout_logprobs),
        old_logprobs=_rounded(scored.token_logprobs),
        flips=None if flips is None else [flips.get(row) for row in rows],
    )


def _rounded(values: np.ndarray) -> list[float]:
    return np.round(values.astype(np.float64), _DECIMALS).tolist()
