"""Conversations of several turns: the engine and the environment take turns, all at once.

Turns go in waves. In each, the engine gets one request for every conversation that is open, so that
all of a step are sampled concurrently by any engine; then their environments act::

    wave 0   prompts                 -> turns   -> environments act
    wave 1   all tokens and suffixes -> turns   -> ...                until none is open

A turn's request is all tokens so far, with an id of its own and so noise of its own. Routes come
from the call that fed a token first, see `moe_replay.routing.stitch`.

In: prompts and requests of this rank. Out: one group a request, as of an engine that knows turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_replay.engines.crossing import joined_candidates
from moe_replay.engines.types import (
    Completion,
    FinishReason,
    Request,
    RolloutGroup,
    SamplingParams,
    grouped,
)
from moe_replay.errors import RewardError
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import Conversation, Part
from moe_replay.routing import RoutingTrace
from moe_replay.routing.guard.verdict import SERVERS_JOINED_BY
from moe_replay.routing.stitch import EngineCall, stitch_turns
from moe_replay.tasks.chat_messages import excerpt
from moe_replay.tasks.encoding import Prompt
from moe_replay.tasks.environments.client import Action, Start
from moe_replay.tasks.environments.opening import OpenEnvironment
from moe_replay.tasks.environments.tool_calls import PARSERS, ToolCall

_TURN_BITS, _NUMBER_BITS = 8, 12
_TURNS = 1 << 62
"""Added to the ids of later turns, so that none is that of a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Talks:
    """What became of the prompts of this rank."""

    prompts: tuple[Prompt, ...]
    """One a request, with what the environment added at its start."""
    groups: list[RolloutGroup]
    """One a request."""
    num_cut: int
    """Tokens cut off at stop strings."""
    conversations: tuple[Conversation, ...]
    """One a completion."""


def turn_id(request_id: int, number: int, turn: int) -> int:
    """Return the id of the request for turn 1, 2... of a completion; turn 0 is the prompt's own.

    >>> hex(turn_id(0x123, 0x4, 0x5))
    '0x4000000012300405'
    """
    assert turn < 1 << _TURN_BITS and number < 1 << _NUMBER_BITS
    return _TURNS | (request_id << _NUMBER_BITS | number) << _TURN_BITS | turn


Ask = Callable[[Run, Sequence[Request], SamplingParams], tuple[list[RolloutGroup], int]]
"""`ask_engine`."""


def converse(
    run: Run,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    sampling: SamplingParams,
    *,
    ask: Ask,
) -> Talks:
    """Hold one conversation for each completion that is asked for; collective.

    Raises:
        StepDropped: on every rank, when one of them was asked to stop.
        EngineError: as ``ask``.
        RewardError: on every rank, when an environment of any cannot begin, act or score.
    """
    environment = run.inputs.environment
    assert environment is not None
    begun = run.droppable(lambda: _begin(environment, run.recipe.run.seed, prompts, requests))
    requests = [each.request for each in begun]
    wanted = [(each, number) for each in begun for number in range(each.request.num_generations)]
    talks = [_Talk(*each, slot) for slot, each in enumerate(wanted)]
    num_cut = 0
    for turn in range(environment.section.max_turns):
        is_last = turn + 1 == environment.section.max_turns
        going = [talk for talk in talks if talk.is_open]
        if not any(run.ranks.gather(bool(going))):
            break
        asked = (
            [talk.next_request(turn, sampling) for talk in going]
            if turn
            else [each.request for each in begun if each.fits]
        )
        groups, cut = ask(run, asked, sampling)
        num_cut += cut
        turns = [completion for group in groups for completion in group.completions]
        for talk, completion in zip(going, turns, strict=True):
            talk.hear_policy(run.decode(completion), completion)
        run.droppable(lambda: _act(run, environment, going, sampling, is_last=is_last))  # noqa: B023 - called at once
    rewards = np.full(len(talks), np.nan)
    if environment.process.description.has_reward:
        held = [talk.slot for talk in talks if talk.calls]
        rewards[held] = run.droppable(lambda: environment.process.rewards(held))
    completions = run.droppable(
        lambda: [talk.completion() if talk.calls else _unbegun(run, talk) for talk in talks]
    )
    return Talks(
        prompts=tuple(each.prompt for each in begun),
        groups=grouped(requests, completions),
        num_cut=num_cut,
        conversations=tuple(
            talk.conversation(float(reward)) for talk, reward in zip(talks, rewards, strict=True)
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A prompt after reset."""

    prompt: Prompt
    """With what the environment added, where that fits."""
    request: Request
    """For its first turns."""
    fits: bool
    """False where it is too long and ``data.truncation`` deletes it: nothing is sampled for it."""


def _begin(
    environment: OpenEnvironment,
    seed: int,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
) -> list[_Begun]:
    """Reset an environment for each completion; those of a group begin in one state."""
    starts = []
    for prompt, request in zip(prompts, requests, strict=True):
        assert prompt.given is not None
        # Refused before anything is sampled.
        environment.template.of_row(prompt.given.arguments, prompt.given.where)
        # Columns of other datasets of a mixture are not the row's: reset has its defaults there.
        row = {**prompt.given.columns, "prompt": prompt.given.prompt}
        # Distinct for every group of a run, and the same after a resume and for any ranks.
        of_group = int(np.random.SeedSequence([seed, request.request_id]).generate_state(1)[0])
        starts += [
            Start(slot=len(starts) + number, seed=of_group, row=row)
            for number in range(request.num_generations)
        ]
    told, begun, first = environment.process.reset(starts), [], 0
    for prompt, request in zip(prompts, requests, strict=True):
        mine = told[first : first + request.num_generations]
        first += request.num_generations
        if any(each != mine[0] for each in mine):
            other = next(each for each in mine if each != mine[0])
            raise RewardError(
                f"environment {environment.section.what}: reset gave the conversations of one prompt "
                f"(item {prompt.index}) different states: {excerpt(mine[0])} and {excerpt(other)}. They are "
                "compared with each other, so they must begin alike: draw what is random from the argument "
                "seed, which is the same for all of them"
            )
        longer = environment.encoded(prompt, mine[0])
        prompt, fits = longer or prompt, longer is not None
        request = replace(request, prompt_ids=prompt.prompt_ids)
        begun.append(_Begun(prompt=prompt, request=request, fits=fits))
    return begun


def _act(
    run: Run,
    environment: OpenEnvironment,
    going: Sequence[_Talk],
    sampling: SamplingParams,
    *,
    is_last: bool,
) -> None:
    """Let environments act on the turns that ended by themselves, and prepare the next ones."""
    parse = PARSERS[environment.section.tool_parser]
    acting, actions = [], []
    for talk in going:
        if talk.ending is not FinishReason.STOP:
            talk.is_open = False
            continue
        text = talk.parts[-1].text
        calls = parse(text) if environment.section.form == "tools" else []
        if environment.section.form == "tools" and not calls:
            talk.is_open = False
            continue
        acting.append((talk, calls))
        actions.append(Action(slot=talk.slot, text=text, calls=calls))
    reactions = environment.process.act(actions)
    for (talk, calls), reaction in zip(acting, reactions, strict=True):
        talk.num_calls += max(len(calls), environment.section.form != "tools")
        talk.num_failed += reaction.num_failed
        if reaction.is_over:
            talk.is_open = False
        elif is_last:
            talk.is_open, talk.met_limit = False, True
        else:
            given = talk.prompt.given
            assert given is not None
            template = environment.template.of_row(given.arguments, given.where)
            suffix = template.suffix(_messages(calls, reaction.texts), int(talk.ids[-1]))
            talk.hear_environment(run, suffix, sampling.max_completion_length)


def _messages(calls: Sequence[ToolCall], texts: Sequence[str]) -> list[dict[str, str]]:
    """Return what an environment says as chat messages: answers of tools, or the next user turn."""
    if not calls:
        return [{"role": "user", "content": text} for text in texts]
    return [
        {"role": "tool", "name": call.name or "tool", "content": text}
        for call, text in zip(calls, texts, strict=True)
    ]


def _unbegun(run: Run, talk: _Talk) -> Completion:
    """Return a conversation that never began: aborted before its first token, without a route."""
    engine, ids = run.engine.description, talk.request.prompt_ids
    trace = None
    if engine.records_routes:
        trace = RoutingTrace.record(
            np.zeros((len(ids), len(engine.moe_layers), engine.topk), dtype=np.int64),
            token_ids=ids,
            valid=np.zeros(len(ids), dtype=bool),
            layers=engine.moe_layers,
            num_experts=engine.num_experts,
            origin=engine.origin(policy_version=run.policy_version, num_rows=len(ids)),
        )
    return Completion(
        token_ids=np.zeros(0, dtype=np.int32),
        rollout_logprobs=np.zeros(0, dtype=np.float32),
        trace=trace,
        finish_reason=FinishReason.ABORTED,
        policy_version=run.policy_version,
    )


class _Talk:
    """One conversation while it is held."""

    def __init__(self, begun: _Begun, number: int, slot: int) -> None:
        self.prompt, self.request, self.number, self.slot = (
            begun.prompt,
            begun.request,
            number,
            slot,
        )
        # All tokens so far.
        self.ids = begun.request.prompt_ids
        # Number of tokens that each call of the engine was fed, and what it returned.
        self.calls: list[tuple[int, Completion]] = []
        self.parts: list[Part] = []
        self.is_open, self.met_limit = begun.fits, False
        self.num_calls = self.num_failed = 0
        self._ending: FinishReason | None = None

    @property
    def ending(self) -> FinishReason:
        """Why the last turn ended, or the conversation where that is known."""
        return self._ending or self.calls[-1][1].finish_reason

    def next_request(self, turn: int, sampling: SamplingParams) -> Request:
        """Return the request for the next turn, which has what is left of the tokens."""
        used = len(self.ids) - len(self.request.prompt_ids)
        return Request(
            request_id=turn_id(self.request.request_id, self.number, turn),
            prompt_ids=self.ids,
            num_generations=1,
            max_completion_length=sampling.max_completion_length - used,
        )

    def hear_policy(self, text: str, turn: Completion) -> None:
        """Take a turn of the policy."""
        self.calls.append((len(self.ids), turn))
        self.ids = np.concatenate([self.ids, turn.token_ids])
        self.parts.append(Part(by="policy", text=text, num_tokens=len(turn.token_ids)))

    def hear_environment(self, run: Run, suffix: np.ndarray, limit: int) -> None:
        """Take what follows a turn; the conversation ends where no token is left for an answer."""
        used = len(self.ids) - len(self.request.prompt_ids)
        if used + len(suffix) >= limit:
            self.is_open, self._ending = False, FinishReason.LENGTH
            return
        self.ids = np.concatenate([self.ids, suffix])
        text = run.inputs.text(suffix)
        self.parts.append(Part(by="environment", text=text, num_tokens=len(suffix)))

    def completion(self) -> Completion:
        """Return the conversation as one completion of its prompt, its trace stitched."""
        # A turn that was aborted at once leaves the environment's tokens before it to nobody.
        calls = [call for call in self.calls if len(call[1].token_ids)] or self.calls[:1]
        last = calls[-1][1]
        if len(calls) == 1 and len(self.calls) == 1:
            return replace(last, finish_reason=self.ending)
        start = len(self.request.prompt_ids)
        end = calls[-1][0] + len(last.token_ids)
        mask = np.zeros(end - start, dtype=bool)
        for fed, turn in calls:
            mask[fed - start : fed - start + len(turn.token_ids)] = True
        first = calls[0][1]
        trace = None
        if all(turn.trace is not None for _, turn in calls):
            where = f"request {self.request.request_id}, completion {self.number}"
            trace = stitch_turns([self._call(*call) for call in calls], where=where).trace
        return Completion(
            token_ids=self.ids[start:end],
            rollout_logprobs=np.concatenate([turn.rollout_logprobs for _, turn in calls]),
            candidates=joined_candidates([turn for _, turn in calls]),
            trace=trace,
            finish_reason=self.ending,
            policy_version=last.policy_version,
            server=SERVERS_JOINED_BY.join(
                sorted({turn.server for _, turn in calls if turn.server})
            ),
            began_under=None
            if first.oldest_version == last.policy_version
            else first.oldest_version,
            turn_mask=mask,
        )

    def _call(self, fed: int, turn: Completion) -> EngineCall:
        assert turn.trace is not None
        return EngineCall(fed_ids=self.ids[:fed], sampled_ids=turn.token_ids, trace=turn.trace)

    def conversation(self, reward: float) -> Conversation:
        """Return what is known of it beside its tokens."""
        return Conversation(
            parts=tuple(self.parts),
            num_calls=self.num_calls,
            num_failed=self.num_failed,
            met_limit=self.met_limit,
            reward=reward,
        )
