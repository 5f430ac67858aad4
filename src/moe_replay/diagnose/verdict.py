"""The verdict of a diagnosis in plain words: what the gap is made of, and what to do next.

In: figures and findings. Out: Conclusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from moe_replay.diagnose.belonging import Misplaced
from moe_replay.diagnose.measured import Setting
from moe_replay.diagnose.routes import RowsSeen
from moe_replay.diagnose.statistics import Estimate
from moe_replay.routing import Finding
from moe_replay.routing.guard import Fault, with_names

NO_GAP_K3 = 1e-7
"""Mean k3 below which, and without a token beyond the smallest tau, there is no gap: float32
against float32 gives 1e-9 and less."""
MOST = 0.5
"""Share of the gap that replay must remove for routing to be most of it."""
_TOO_FAR = 0.25
"""Share of the tokens beyond a factor of 2 that no rounding explains."""
_NAMED, _LISTED = 4, 40
_CORRECT = "Importance correction (grpo.rollout_importance_sampling_mode) covers what stays."


class Cause(StrEnum):
    """What a gap is made of."""

    MISALIGNMENT = "misalignment"
    """Routes or log-probabilities belong to other tokens, layers, experts or samples."""
    ROUTING = "routing"
    """Both sides choose other experts, and replay removes most of the gap."""
    PRECISION = "precision"
    """Both sides compute in different number formats."""
    KERNELS = "kernels"
    """The number format is the same, and sums are made in another order."""
    WEIGHTS = "weights"
    """The gap is too large for rounding: other weights, another temperature, other tokens."""
    NONE = "no gap"
    """Both sides give the same probabilities."""
    UNKNOWN = "unknown"
    """Something that is needed was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conclusion:
    """The verdict."""

    cause: Cause
    """What the gap is made of, mostly."""
    text: str
    """The verdict in words, with the figures that it rests on."""
    causes: tuple[str, ...] = ()
    """What is misaligned, a line each, the samples named; empty for all other verdicts."""
    defects: tuple[str, ...] = ()
    """Ids of docs/defects.md that look like this."""
    next_steps: tuple[str, ...] = ()
    """What to do, a sentence each."""
    limits: tuple[str, ...] = ()
    """What the verdict is not about, a sentence each."""

    @classmethod
    def pending(cls) -> Conclusion:
        """Return the conclusion of a diagnosis that is still being put together."""
        return cls(cause=Cause.UNKNOWN, text="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a conclusion is drawn from."""

    setting: Setting
    """What was compared."""
    names: Sequence[str]
    """Name of each sequence."""
    findings: Sequence[Finding]
    """Samples whose routes are not their own."""
    faults: Sequence[Fault]
    """Groups of samples, or all of them, of which the same is true."""
    everywhere: str
    """What explains the routes of the groups, in words; empty where nothing does."""
    lost: Sequence[Finding]
    """Samples whose routes drift has left no information."""
    misplaced: Sequence[Misplaced]
    """Log-probabilities that belong elsewhere."""
    rows: RowsSeen
    """Rows that were compared."""
    has_routers: bool
    """Whether the model has any."""
    k3: float | None
    """Mean k3 with live routes; None where the engine's log-probabilities are not known."""
    beyond_smallest: float | None
    """Share of the tokens beyond a factor of 1.1."""
    beyond_largest: float | None
    """Share of the tokens beyond a factor of 2."""
    removed: Estimate | None
    """Share of the gap that replay removes."""
    removed_of: str
    """What that is a share of."""
    flip_frac: float | None
    """Share of the (token, layer) pairs whose expert sets differ."""


# Start of the guard's words -> ids of docs/defects.md, and where to look.
_LOOK_AT: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "of log-probabilities",
        ("F8",),
        "Look where log-probabilities and tokens are joined: one entry too many or too few at the "
        "start or the end of the completion",
    ),
    (
        "raw log-probabilities",
        ("F8",),
        "Ask the engine for the log-probabilities that it sampled from (vLLM: logprobs_mode = "
        "'processed_logprobs'), or train at temperature 1",
    ),
    (
        "token shift",
        ("A1", "A3", "A5"),
        "Look where routes and tokens are joined: the row of the first or the last token, a token "
        "lost by encoding text again, a resumed request",
    ),
    (
        "context-parallel order",
        ("A9",),
        "Cut routes by the same function that cuts the tokens of a context-parallel rank",
    ),
    (
        "microbatch of",
        ("A2",),
        "Lay routes out as Megatron does, sequence first, or pack samples instead of padding them",
    ),
    (
        "expert-id wrap",
        ("C1", "C2"),
        "Store ids in 16 bits: the model has more than 256 experts",
    ),
    ("expert-id", ("C3",), "Look how ids are numbered: logical or physical ones, from 0 or from 1"),
    (
        "wrong expert-id space",
        ("C3",),
        "Ask the engine for logical ids, or switch its expert load balancing off",
    ),
    (
        "layer shift",
        ("B1", "B2"),
        "Count layers as the checkpoint does: are dense or prediction layers in the engine's rows?",
    ),
    (
        "layers rotated",
        ("B1", "B2"),
        "Count layers as the checkpoint does: are dense or prediction layers in the engine's rows?",
    ),
    (
        "layers hold each other's routes",
        ("B4", "B7", "B8"),
        "Look how the layers of pipeline stages are numbered, with virtual stages too",
    ),
    (
        "swapped samples",
        ("A11",),
        "Look where completions and traces are joined: sorting, filtering, retries",
    ),
    (
        "hold the routes of sample",
        ("A11",),
        "Look where completions and traces are joined: sorting, filtering, retries",
    ),
    (
        "constant fill",
        ("C3", "C4"),
        "Look at the engine's capture buffer: it was read where nothing had been written",
    ),
    (
        "consecutive rows have the same route",
        ("F4", "C4"),
        "Look at the engine's capture buffer: it was read where nothing had been written",
    ),
)


def conclude(evidence: Evidence) -> Conclusion:
    """Return the verdict, the most serious cause first."""
    limits = _limits(evidence)
    if evidence.findings or evidence.faults or evidence.misplaced:
        return _misaligned(evidence, limits)
    if evidence.k3 is None:
        return _routes_alone(evidence, limits)
    assert evidence.beyond_smallest is not None and evidence.beyond_largest is not None
    if evidence.k3 < NO_GAP_K3 and evidence.beyond_smallest == 0:
        text = f"Both sides give the same probabilities: k3 is {evidence.k3:.1e} and no token differs by more than a factor of 1.1."
        return Conclusion(cause=Cause.NONE, text=text, limits=limits)
    if evidence.beyond_largest > _TOO_FAR:
        return _too_far(evidence, limits)
    return _rounding(evidence, limits)


def _misaligned(evidence: Evidence, limits: tuple[str, ...]) -> Conclusion:
    names, lines = evidence.names, []
    if evidence.faults:
        lines += [f"all samples together: {evidence.everywhere}"] if evidence.everywhere else []
        lines += [with_names(str(each), names) for each in evidence.faults[:_NAMED]]
    else:
        lines += [with_names(str(each), names) for each in evidence.findings[:_NAMED]]
        if others := [names[each.sample] for each in evidence.findings[_NAMED:_LISTED]]:
            more = len(evidence.findings) - _NAMED
            lines.append(
                f"{more} more samples: {', '.join(others)}{', ...' * (more > len(others))}"
            )
    lines += [str(each) for each in evidence.misplaced[:_NAMED]]
    # What explains a group explains what its samples and layers look like.
    routes = (
        [evidence.everywhere]
        if evidence.everywhere
        else [each.cause for each in (*evidence.faults, *evidence.findings)]
    )
    known = [
        entry
        for words in (" ".join(routes), " ".join(each.cause for each in evidence.misplaced))
        for entry in _LOOK_AT
        if entry[0] in words and (entry[0] != "token shift" or "of log-prob" not in words)
    ]
    if any(entry[0] == "expert-id wrap" for entry in known):
        known = [entry for entry in known if entry[0] != "expert-id"]
    what = "routes" if evidence.findings or evidence.faults else "log-probabilities"
    number = len(evidence.findings) or len([m for m in evidence.misplaced if m.sequence])
    of = "all samples" if not number or evidence.faults else f"{number} of {len(names)} samples"
    return Conclusion(
        cause=Cause.MISALIGNMENT,
        text=f"The {what} of {of} are not their own. Training through them would learn from the wrong "
        f"{'experts' if what == 'routes' else 'probabilities'}; the gap below says nothing until this is fixed.",
        causes=tuple(lines),
        defects=tuple(dict.fromkeys(name for _, ids, _ in known for name in ids)),
        next_steps=tuple(dict.fromkeys(f"{advice}." for *_, advice in known))
        or ("Look where routes are captured, transported and laid out in the batch.",),
        limits=limits,
    )


def _routes_alone(evidence: Evidence, limits: tuple[str, ...]) -> Conclusion:
    flips = evidence.flip_frac
    if flips is None:
        text = "There is nothing to compare: neither log-probabilities nor routes of the engine."
    else:
        text = (
            f"The routes belong to their tokens, and {flips:.2%} of the (token, layer) pairs choose other experts. The "
            "size of the gap is not known without the engine's log-probabilities."
        )
    return Conclusion(
        cause=Cause.UNKNOWN,
        text=text,
        next_steps=("Diagnose a rollout: `moe-replay rollout` keeps log-probabilities too.",),
        limits=limits,
    )


def _too_far(evidence: Evidence, limits: tuple[str, ...]) -> Conclusion:
    return Conclusion(
        cause=Cause.WEIGHTS,
        text=f"{evidence.beyond_largest:.0%} of the tokens differ by more than a factor of 2 (k3 {evidence.k3:.2g}), which "
        "neither rounding nor other experts explain: engine and trainer do not hold the same model, or do not speak "
        "of the same tokens.",
        next_steps=(
            "Compare the weights: is the engine of the same checkpoint, and has it received every push?",
            "Compare temperature, top-p and top-k of the engine with those that it was asked for.",
        ),
        limits=limits,
    )


def _rounding(evidence: Evidence, limits: tuple[str, ...]) -> Conclusion:
    setting, removed = evidence.setting, evidence.removed
    formats = f"{setting.engine} computed in {setting.engine_dtype}, {setting.trainer} in {setting.trainer_dtype}"
    if evidence.has_routers and removed is None:
        return Conclusion(
            cause=Cause.UNKNOWN,
            text=f"There is a gap (k3 {evidence.k3:.2g}; {formats}), and the engine recorded no routes, so it cannot be said "
            "how much of it is routing.",
            next_steps=("Record routes in the engine, and diagnose again.",),
            limits=limits,
        )
    replay, unsure = "", ""
    if removed is not None:
        replay = f"Replay removes {_percent(removed)} of {evidence.removed_of}. "
        if removed.has_interval and removed.low < MOST < removed.high:
            unsure = " The interval reaches across one half: measure more samples to be sure."
    if removed is not None and removed.value >= MOST:
        rest = "kernels" if setting.same_dtype else "number formats and kernels"
        return Conclusion(
            cause=Cause.ROUTING,
            text=f"Most of the gap is routing. {replay}What remains is {rest}: {formats}.{unsure}",
            next_steps=(
                'Train with replay.router_replay_mode = "R3", so that the trainer learns from the experts that sampled.',
            ),
            limits=limits,
        )
    if setting.same_dtype:
        return Conclusion(
            cause=Cause.KERNELS,
            text=f"Most of the gap is kernels. {replay}Both sides computed in {setting.trainer_dtype}, so what is left is "
            f"sums made in another order.{unsure}",
            next_steps=(
                "Look at the engine's attention and expert kernels, its batch-invariant mode, and the number format of "
                "its LM head.",
                _CORRECT,
            ),
            limits=limits,
        )
    return Conclusion(
        cause=Cause.PRECISION,
        text=f"Most of the gap is precision: {formats}. {replay}{unsure.strip()}".strip(),
        next_steps=(
            "Give both sides the same number format and diagnose again: what is left then is kernels.",
            _CORRECT,
        ),
        limits=limits,
    )


def _percent(share: Estimate) -> str:
    interval = f" [{share.low:.0%}, {share.high:.0%}]" if share.has_interval else ""
    return f"{share.value:.0%}{interval}"


def _limits(evidence: Evidence) -> tuple[str, ...]:
    """Say what the verdict is not about."""
    rows, limits = evidence.rows, []
    if evidence.setting.no_weights:
        limits.append(
            f"{evidence.setting.no_weights}: whether engine and trainer hold the same is not known."
        )
    if rows.compared and rows.unrecorded:
        limits.append(
            f"{rows.unrecorded} of {rows.compared + rows.unrecorded} rows came without a route: nothing is said about "
            "those."
        )
    if evidence.has_routers and not rows.compared:
        limits.append("No row came with a route: nothing is said about routes.")
    if evidence.lost:
        shown = ", ".join(evidence.names[each.sample] for each in evidence.lost[:8])
        limits.append(
            f"The routes of {len(evidence.lost)} samples fit their tokens no better than others, as drift leaves them: "
            f"whether they are their own is not known ({shown})."
        )
    return tuple(limits)
