"""Measure saved rollouts and traces: run each sequence through the trainer, live and replayed.

In: a rollout on disk or a trace file, a trainer. Out: Measured sequences, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from moe_replay.diagnose.hf_trainer import HfTrainer
from moe_replay.diagnose.measured import Measured
from moe_replay.diagnose.passes import Pass, Trainer, exact_kl, logprobs_of
from moe_replay.engines.files.format import RolloutFile
from moe_replay.engines.files.group_log import trace_name
from moe_replay.engines.types import RolloutGroup
from moe_replay.errors import TraceError
from moe_replay.routing import RoutingTrace, TraceFile
from moe_replay.routing.digest import recover_tokens


def measure_rollout(
    rollout: RolloutFile,
    trainer: Trainer,
    *,
    engine: HfTrainer | None = None,
    max_sequences: int | None = None,
) -> Iterator[Measured]:
    """Yield the sequences of a rollout as engine and trainer saw them, as `measure_groups` does.

    Raises:
        TraceError: when a trace is damaged, or not of the trainer's model.
    """
    groups = (rollout.group(request_id) for request_id in rollout.request_ids)
    temperature = rollout.manifest.sampling.temperature or 1.0
    return islice(
        measure_groups(groups, trainer, temperature=temperature, engine=engine), max_sequences
    )


def measure_groups(
    groups: Iterable[RolloutGroup],
    trainer: Trainer,
    *,
    temperature: float,
    engine: HfTrainer | None = None,
) -> Iterator[Measured]:
    """Yield the completions of an engine as it and the trainer saw them.

    With ``engine``, the model that sampled them, the exact KL over all words is measured too.

    Raises:
        TraceError: when a trace is not of the trainer's model.
    """
    for group in groups:
        for index in range(len(group.completions)):
            yield _measured(group, index, trainer, engine, temperature)


def measure_traces(
    traces: TraceFile, trainer: Trainer, *, max_sequences: int | None = None
) -> Iterator[Measured]:
    """Yield the sequences of a trace file, whose tokens its digests hold; no gap is known.

    Raises:
        TraceError: when the tokens are not of the trainer's model.
    """
    for number, name in enumerate(traces.names[:max_sequences]):
        recorded = traces.read(name)
        tokens = recover_tokens(recorded.token_digest)
        if len(tokens) < 2 or int(tokens.max()) > np.iinfo(np.int32).max:
            raise TraceError(f"trace {name} of {traces.path}: its tokens are no token ids")
        ids = tokens.astype(np.int32)
        _check_form(recorded, trainer, name)
        run = trainer.run(ids, len(ids) - 1, temperature=1.0, replayed=None)
        yield Measured(
            name=name,
            prompt=number,
            token_ids=ids,
            recorded=recorded,
            live=run.live,
            margins=run.margins,
        )


def _measured(
    group: RolloutGroup,
    index: int,
    trainer: Trainer,
    engine: HfTrainer | None,
    temperature: float,
) -> Measured:
    completion = group.completions[index]
    tokens, start = group.request.sequence(completion.token_ids), len(group.request.prompt_ids)
    recorded, name = completion.trace, trace_name(group.request.request_id, index)
    if recorded is not None:
        _check_form(recorded, trainer, name)
    again = None
    if engine is not None:
        again = engine.run(tokens, start, temperature=temperature, replayed=recorded)
    num_words = 0 if engine is None else engine.num_words

    def divergence(run: Pass) -> np.ndarray | None:
        if again is None:
            return None
        return exact_kl(
            again.distributions,
            run.distributions,
            num_tokens=len(completion.token_ids),
            num_words=num_words,
            temperature=temperature,
        )

    live = trainer.run(tokens, start, temperature=temperature, replayed=None)
    live_kl = divergence(live)
    raw = None
    if temperature != 1.0:
        raw = logprobs_of(live.distributions, completion.token_ids, 1.0)
    replayed, replayed_kl = None, None
    if recorded is not None and recorded.valid.any():
        run = trainer.run(tokens, start, temperature=temperature, replayed=recorded)
        replayed, replayed_kl = run.token_logprobs, divergence(run)
    return Measured(
        name=name,
        prompt=group.request.request_id,
        token_ids=tokens,
        recorded=recorded,
        live=live.live,
        rollout_logprobs=completion.untruncated_logprobs,
        live_logprobs=live.token_logprobs,
        replayed_logprobs=replayed,
        raw_logprobs=raw,
        live_kl=live_kl,
        replayed_kl=replayed_kl,
        engine_again=None
        if again is None
        else again.token_logprobs - completion.untruncated_logprobs,
        margins=live.margins,
        server=completion.server,
        policy_version=completion.policy_version,
    )


def _check_form(recorded: RoutingTrace, trainer: Trainer, name: str) -> None:
    form = trainer.form
    if form != recorded.form:
        raise TraceError(
            f"trace {name} is of {recorded.form}, the trainer's model has {form}: the rollout was sampled from another "
            "model, or layers are numbered otherwise; give the model that sampled it"
        )
