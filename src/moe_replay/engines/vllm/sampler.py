"""Draws tokens inside vLLM with the noise and log-probabilities of every moe-replay engine.

vLLM's own sampling cannot keep the contract: it reports log-probabilities either before the
temperature or after the truncation, a seed kills its CPU build at the first chunked prefill, and
its noise depends on the version. As a logits processor, this class draws the token itself and
leaves a row in which it is the only possible one; its logit is the log-probability of the full
vocabulary at the sampling temperature, or among the candidates where these are kept. vLLM then
takes the best token of each row and, with ``logprobs_mode="processed_logits"``, reports that logit.
Candidates wait here until they are taken by the ticket of their draw.

In: logits, draws in ``SamplingParams.extra_args``. Out: logits with one finite entry a row;
candidates.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64
from vllm import SamplingParams as VllmSamplingParams
from vllm.inputs import TokensPrompt
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.noise import (
    NOT_A_LOGPROB,
    Drawn,
    completion_noise,
    sample_tokens,
)
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.errors import EngineError
from moe_replay.routing.candidates import Candidates

KEY = "moe_replay"
"""Entry of ``extra_args`` that holds a draw."""
LOGPROBS_MODE = "processed_logits"
"""vLLM's ``logprobs_mode`` under which the log-probabilities of this class are reported."""

# Options of vLLM that change neither the draw nor what is reported of it; `_draw_of` looks at some
# of them itself.
_FREE = frozenset(
    [
        "n",
        "temperature",
        "max_tokens",
        "stop_token_ids",
        "ignore_eos",
        "seed",
        "logprobs",
        "prompt_logprobs",
        "flat_logprobs",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "output_kind",
        "stream_interval",
        "skip_clone",
        "output_text_buffer_length",
        "extra_args",
        "skip_reading_prefix_cache",
        "routed_experts_prompt_start",
        "stop",
        "_eos_token_id",
        "_all_stop_token_ids",
        "_bad_words_token_ids",
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How the tokens of one completion are drawn."""

    seed: int
    """Seed of the run's sampling noise."""
    request_id: int
    """Request of the completion."""
    completion: int
    """Index of the completion among its request's."""
    temperature: float
    """Softmax temperature; 0 takes the most likely token."""
    top_p: float
    """Nucleus; 1 keeps all."""
    top_k: int
    """Only this many of the most likely tokens are kept; 0 keeps all."""
    num_known_ids: int | None
    """Ids from here on are never drawn, as the tokenizer lacks them; None draws from all."""
    min_p: float
    """Only tokens at least this many times as likely as the most likely one; 0 keeps all."""
    num_before: int = 0
    """Tokens that an earlier call of the same completion drew, and that end the prompt of this one:
    the noise goes on behind theirs."""
    ticket: str | None = None
    """Name under which the candidates of this call are kept, of no other call; None keeps none."""


def draw_params(
    sampling: SamplingParams,
    *,
    request_id: int,
    completion: int,
    stop_token_ids: tuple[int, ...],
    num_known_ids: int | None = None,
    num_before: int = 0,
) -> VllmSamplingParams:
    """Return vLLM's parameters for one completion, or the rest of one after ``num_before`` tokens.

    ``stop_token_ids`` end it as those of ``sampling`` do, such as the model's own. Its candidates,
    if they are kept, have a ticket that `ticket_of` returns.
    """
    draw = Draw(
        seed=sampling.seed,
        request_id=request_id,
        completion=completion,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        num_known_ids=num_known_ids,
        num_before=num_before,
        ticket=secrets.token_hex(8) if sampling.keeps_candidates else None,
    )
    return VllmSamplingParams(
        # The best token of a row is the drawn one, so vLLM must not draw again.
        temperature=0.0,
        max_tokens=sampling.max_completion_length - num_before,
        stop_token_ids=sorted({*stop_token_ids, *sampling.stop_token_ids}),
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        extra_args={KEY: asdict(draw)},
    )


def ticket_of(params: VllmSamplingParams) -> str | None:
    """Return the ticket of the candidates of a call; None when it keeps none."""
    return params.extra_args[KEY]["ticket"]


def asked_of(
    request: Request,
    number: int,
    sampling: SamplingParams,
    facts: ModelFacts,
    *,
    num_before: int = 0,
) -> tuple[TokensPrompt, VllmSamplingParams]:
    """Return prompt and parameters of completion ``number`` of a request, as vLLM takes them.

    ``num_before`` tokens at the end of the prompt were sampled in an earlier call.
    """
    params = draw_params(
        request.sampling(sampling),
        request_id=request.request_id,
        completion=number,
        stop_token_ids=facts.eos_ids,
        num_known_ids=facts.num_known_ids,
        num_before=num_before,
    )
    return TokensPrompt(prompt_token_ids=request.prompt_ids.tolist()), params


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One running request."""

    draw: Draw
    noise: Float64[np.ndarray, " length"]
    output_ids: list[int]
    """Tokens so far: vLLM's own list, which grows."""


def processor_of(worker: Any) -> DrawTokens:
    """Return what draws tokens in a vLLM worker."""
    every = worker.model_runner.input_batch.logitsprocs.all
    return next(processor for processor in every if isinstance(processor, DrawTokens))


class DrawTokens(LogitsProcessor):
    """The logits processor; give its class to vLLM as ``logits_processors``."""

    @classmethod
    def validate_params(cls, sampling_params: VllmSamplingParams) -> None:
        """Raise `ValueError` for a request that this process cannot sample exactly."""
        from vllm.platforms import current_platform

        if sampling_params.seed is not None and current_platform.is_cpu():
            raise ValueError(
                "a seed ends vLLM's CPU engine at the first chunked prefill (CPU generators have no "
                f"offset); omit `seed`, or draw by extra_args[{KEY!r}], whose noise has its own seed"
            )
        _draw_of(sampling_params)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        mode = vllm_config.model_config.logprobs_mode
        if mode != LOGPROBS_MODE:
            raise ValueError(
                f"logprobs_mode is {mode}, expected {LOGPROBS_MODE}: any other reports "
                "log-probabilities of 0 for tokens drawn here; start vLLM with --logprobs-mode "
                "processed_logits"
            )
        self._rows: dict[int, _Row] = {}
        # Ticket -> index of a token in its call -> its candidates and their mass. By index, as a
        # request that vLLM preempts draws on where it was.
        self._kept: dict[str, dict[int, tuple[np.ndarray, float]]] = {}

    def take(self, ticket: str) -> Candidates:
        """Return the candidates of a call that has ended, and forget them; none if there are none.

        Raises:
            EngineError: when those of a token are missing.
        """
        tokens = self._kept.pop(ticket, {})
        if sorted(tokens) != list(range(len(tokens))):
            raise EngineError(
                f"vLLM drew the tokens {sorted(tokens)[:8]}... of a call, expected each from 0 on: it "
                "counts sampled tokens in another way than was tested; report this"
            )
        every = [tokens[number] for number in range(len(tokens))]
        return Candidates.of_sets([ids for ids, _ in every], [mass for _, mass in every])

    def is_argmax_invariant(self) -> bool:
        """Return False: the best token of a row becomes the drawn one."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests that vLLM adds to, removes from and moves within its batch."""
        process_dict_updates(self._rows, batch_update, _new_row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Draw one token for each row with a draw, and make it the row's only possible token.

        Logits ``[1, 0, 2]`` of which token 0 is drawn become ``[-1.41, -inf, -inf]``.
        """
        alike: dict[tuple[float, int, float, float, int | None, bool], list[int]] = {}
        for index, row in self._rows.items():
            draw = row.draw
            limits = draw.top_k, draw.top_p, draw.min_p, draw.num_known_ids
            settings = (draw.temperature, *limits, draw.ticket is not None)
            alike.setdefault(settings, []).append(index)
        for settings, indices in alike.items():
            temperature, top_k, top_p, min_p, num_known_ids, keeps = settings
            noise = [
                self._rows[index].noise[len(self._rows[index].output_ids)] for index in indices
            ]
            where = torch.tensor(indices, device=logits.device)
            drawn = sample_tokens(
                logits[where],
                torch.tensor(noise, dtype=torch.float64, device=logits.device),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                num_known_ids=num_known_ids,
            )
            rollout_logprobs = self._keep(drawn, indices) if keeps else drawn.rollout_logprobs
            logits[where] = float("-inf")
            # The best token of its row, and no number that JSON could not hold.
            logits[where, drawn.ids] = rollout_logprobs.nan_to_num(NOT_A_LOGPROB)
        return logits

    def _keep(self, drawn: Drawn, indices: Sequence[int]) -> Float32[torch.Tensor, " rows"]:
        """Keep what rows were drawn from, and return the log-probabilities among it."""
        logprobs, masses = drawn.among_kept()
        for index, ids, mass in zip(indices, drawn.sets(), masses.tolist(), strict=True):
            row = self._rows[index]
            assert row.draw.ticket is not None
            self._kept.setdefault(row.draw.ticket, {})[len(row.output_ids)] = ids, mass
        return logprobs


def _new_row(
    params: VllmSamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
) -> _Row | None:
    draw = _draw_of(params)
    if draw is None:
        return None
    noise = completion_noise(
        seed=draw.seed,
        request_id=draw.request_id,
        completion=draw.completion,
        length=draw.num_before + params.max_tokens,
    )
    return _Row(draw=draw, noise=noise[draw.num_before :], output_ids=output_ids)


def _draw_of(params: VllmSamplingParams) -> Draw | None:
    given: Mapping[str, Any] | None = (params.extra_args or {}).get(KEY)
    if given is None:
        return None
    if set(given) != set(Draw.__slots__):
        raise ValueError(
            f"extra_args[{KEY!r}] has the keys {sorted(given)}, expected {sorted(Draw.__slots__)}"
        )
    if params.temperature != 0 or params.n != 1 or params.logprobs is None:
        raise ValueError(
            f"extra_args[{KEY!r}] needs temperature 0 (it has its own), n = 1 and logprobs = 0; got "
            f"temperature {params.temperature}, n {params.n}, logprobs {params.logprobs}"
        )
    _refuse_what_changes_the_draw(params)
    return Draw(**given)


def _refuse_what_changes_the_draw(params: VllmSamplingParams) -> None:
    """Raise `ValueError` for an option by which vLLM would change the draw or its log-probability.

    Named are the options that may differ, so that one which a later release adds is refused until
    it was looked at. vLLM itself drops ``min_p``, ``top_p`` and ``top_k`` at temperature 0, before
    anybody sees them: a draw has its own.
    """
    neutral = VllmSamplingParams(temperature=0.0)
    changed = {
        name: value
        for name in neutral.__struct_fields__
        if name not in _FREE
        and (value := getattr(params, name)) != getattr(neutral, name)
        and value not in ([], {}, ())
    }
    if changed:
        given = ", ".join(f"{name} = {value!r}"[:80] for name, value in sorted(changed.items()))
        raise ValueError(
            f"{given} beside extra_args[{KEY!r}], expected the neutral value: vLLM applies it outside "
            "of the draw, so the token or its log-probability would not be those that a trainer "
            "recomputes. It may come from the request, from the checkpoint's generation_config.json, "
            "or from --override-generation-config: omit it, or start the server with "
            "--generation-config vllm"
        )
