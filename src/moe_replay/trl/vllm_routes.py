"""Routes that vLLM returns inside TRL, in the trainer's process or from ``trl vllm-serve``.

TRL reads tokens and log-probabilities of vLLM's outputs, and drops the rest. Here its calls are
watched for the routes.

In: TRL's ``VLLMGeneration``. Out: a payload of routes for each completion, in TRL's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, reduce
from operator import getitem
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from moe_replay.engines.servers.vllm_wire import NEEDED
from moe_replay.engines.vllm.plugin import check_patched
from moe_replay.engines.vllm.startup import vllm_version
from moe_replay.engines.vllm.wire import FLAG, RoutePayload, payload_of_json, trace_from_vllm
from moe_replay.errors import CodecError, EngineError, UnsupportedError
from moe_replay.routing import LayerOrder, Origin, RoutedModel
from moe_replay.trl.samples import RoutedSample

_MAX_BYTES = 1 << 30
"""Largest payload of one completion that a server may send."""


@contextmanager
def recording_vllm(*, is_cpu: bool) -> Iterator[None]:
    """Let the vLLM that TRL starts inside the scope return routes.

    TRL has no option that it passes on to ``vllm.LLM``, so the name that it calls is bound to more
    arguments while it does.
    """
    from trl.generation import vllm_generation

    plain = getattr(vllm_generation, "LLM", None)
    if plain is None:
        yield
        return
    options: dict[str, Any] = {"enable_return_routed_experts": True}
    if is_cpu:
        # Compiled for the CPU, vLLM returns zeros for routes, without an error.
        options["enforce_eager"] = True
    setattr(vllm_generation, "LLM", partial(plain, **options))  # noqa: B010
    try:
        yield
    finally:
        setattr(vllm_generation, "LLM", plain)  # noqa: B010


def unusable_because(config: Mapping[str, Any]) -> str | None:
    """Return why a server with this configuration has no routes of its tokens; None if it has.

    ``config`` is the ``vllm_config`` of its ``/server_info``, as vLLM 0.30 writes it.
    """
    try:
        if config["model_config"]["enable_return_routed_experts"] is not True:
            return f"was started without {FLAG}"
        for entry, (expected, reason) in NEEDED.items():
            got = reduce(getitem, entry, config)
            if got != expected:
                return f"runs with {entry[-1]} = {got!r}, expected {expected!r}: {reason}"
    except (KeyError, TypeError) as error:
        return f"describes itself in another form than vLLM 0.30 does ({error!r})"
    return None


def _told_by(client: Any) -> list[Any]:
    """Return the version of TRL's server, and why it is unusable; None if it can be used."""
    try:
        version = client._get(f"{client.base_url}/version")["version"]
        return [version, unusable_because(client.get_server_info())]
    except Exception as error:  # noqa: BLE001 - the seam: TRL raises plain ones, and other processes wait for this answer
        return [None, f"does not say how it was started ({error})"]


class VllmRoutes:
    """Keeps the routes of the latest call of one ``VLLMGeneration``."""

    def __init__(self, generation: Any, accelerator: Any, model: RoutedModel) -> None:
        """Watch the calls of ``generation``; collective with a server.

        Raises:
            UnsupportedError: on every process, when the server returns no routes, or wrong ones.
        """
        self._generation, self._accelerator, self._model = generation, accelerator, model
        self._version = vllm_version()
        self._payloads: list[RoutePayload] | CodecError | None = None
        self._layer_order = LayerOrder()
        if generation.mode == "colocate":
            self._plain = generation.llm.generate
            generation.llm.generate = self._generate
            if accelerator.device.type == "cpu":
                generation.sync_weights = self._reload
            return
        told: list[Any] = [None, None]
        if accelerator.is_main_process:
            told = _told_by(generation.vllm_client)
        # To all processes, so that all raise.
        broadcast_object_list(told, from_process=0)
        self._version, fault = told
        if fault is not None:
            raise UnsupportedError(
                f"R3 needs the routes that TRL's vLLM server records, but the server {fault}. Start "
                f"it as docs/trl.md says, with {FLAG}; or use vllm_mode='colocate', where vLLM is "
                "started with it, or router_replay_mode='R2', which needs no routes of an engine"
            )
        if accelerator.is_main_process:
            self._plain = generation.vllm_client._post
            generation.vllm_client._post = self._post

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._plain(*args, **kwargs)
        self._payloads = [
            RoutePayload(completion_rows=completion.routed_experts)
            for output in outputs
            for completion in output.outputs
        ]
        return outputs

    def _reload(self) -> None:
        """Push the weights as vLLM reloads them, layer by layer.

        Its CPU build prepacks weights when it loads them, and TRL's way to push cannot write to
        packed ones.
        """
        check_patched()
        weights = self._generation._iter_named_params()
        llm = self._generation.llm
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        llm.reset_prefix_cache()

    def _post(self, url: str, **kwargs: Any) -> Any:
        answer = self._plain(url, **kwargs)
        if url.endswith("/v1/completions"):
            try:
                self._payloads = [
                    payload_of_json(answer, choice, max_bytes=_MAX_BYTES)
                    for choice in answer["choices"]
                ]
            except CodecError as error:
                # Other processes wait for TRL's answer: all raise it when they ask for routes.
                self._payloads = error
        return answer

    def attach(self, samples: Sequence[RoutedSample]) -> list[RoutedSample]:
        """Return the samples of this process with the routes of the latest call; collective.

        Raises:
            EngineError: when vLLM returned no routes, or not one payload a sample.
            CodecError: on every process, when a payload of a server cannot be read.
            TraceError: when a payload is not that of its tokens.
        """
        payloads, self._payloads = self._mine(len(samples)), None
        return [
            replace(
                sample,
                trace=trace_from_vllm(
                    payload,
                    version=self._version,
                    token_ids=sample.token_ids,
                    num_prompt_tokens=sample.num_prompt_tokens,
                    model=self._model,
                    origin=Origin.single(
                        engine="vllm",
                        engine_version=self._version,
                        policy_version=sample.step,
                        num_rows=len(sample.token_ids),
                    ),
                    was_cut=False,
                    where=sample.where,
                    layer_order=self._layer_order,
                ),
            )
            for sample, payload in zip(samples, payloads, strict=True)
        ]

    def _mine(self, num_samples: int) -> list[RoutePayload]:
        """Return the payloads of this process out of those of its call, as TRL does its tokens."""
        generation, accelerator = self._generation, self._accelerator
        payloads, rank, sharers = self._payloads, 0, 1
        if generation.mode == "server":
            told = [payloads]
            broadcast_object_list(told, from_process=0)
            payloads, rank, sharers = told[0], accelerator.process_index, accelerator.num_processes
        elif generation.tensor_parallel_size > 1:
            rank = torch.distributed.get_rank(group=generation.tp_group)
            sharers = generation.tensor_parallel_size
        if isinstance(payloads, CodecError):
            raise payloads
        got = 0 if payloads is None else len(payloads)
        if payloads is None or got != num_samples * sharers:
            raise EngineError(
                f"vLLM gave routes of {got} completions for {num_samples} samples on each of "
                f"{sharers} processes, expected one each; TRL asked it in another way than "
                "moe-replay watches"
            )
        return payloads[rank * num_samples : (rank + 1) * num_samples]
