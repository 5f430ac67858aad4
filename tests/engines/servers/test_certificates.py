"""TLS of a private authority: every client, with the right certificate, another and none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from moe_replay.engines.serve.run import tls_options
from moe_replay.engines.servers.certificates import trust_in
from moe_replay.engines.servers.contract import RolloutServer
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.own import ServerCalls
from moe_replay.engines.servers.sglang import SglangCalls
from moe_replay.engines.servers.vllm import VllmCalls, connect_vllm
from moe_replay.errors import RecipeError

from ...support.served import listening, served
from ...support.sglang_like import SglangLike
from ..server_case import FACTS, LIMIT_S, SAMPLING, client, fake, requests, tokens

LIMITS = {"token": None, "timeout_s": LIMIT_S, "max_answer_bytes": 1 << 20}


async def _version(request: Any) -> JSONResponse:
    return JSONResponse({"version": "0.30.0"})


def _ours(web: Any) -> Any:
    return served(fake(), facts=FACTS, web=web)


def _plain(web: Any) -> Any:
    return listening(Starlette(routes=[Route("/version", _version)]), **web)


def _sglang(web: Any) -> Any:
    return listening(SglangLike(fake(), num_decoder_layers=2).application(), **web)


KINDS: dict[str, tuple[Any, Callable[..., RolloutServer], type, str]] = {
    "ours": (_ours, partial(connect_vllm, facts=FACTS), ServerCalls, "/status"),
    "plain vLLM": (_plain, partial(connect_vllm, facts=FACTS), VllmCalls, "/version"),
    "SGLang": (_sglang, partial(SglangCalls, facts=FACTS), SglangCalls, "/server_info"),
}


@contextmanager
def secure(serve: Any, certificate: Path, key: Path) -> Iterator[str]:
    with serve(tls_options(certificate, key, None)) as url:
        yield url.replace("http://", "https://")


def says(connect: Callable[..., Any], url: str, ca_file: Path | None) -> str:
    """Return why a server is not reached."""
    with pytest.raises(CallError) as raised, closing(connect(url, **LIMITS, ca_file=ca_file)) as it:
        it.status()
    assert raised.value.fault is Fault.UNREACHABLE
    return str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_of_a_private_authority_is_reached_only_with_its_certificate(kind, authority):
    serve, connect, calls_kind, path = KINDS[kind]
    with secure(serve, authority.certificate, authority.key) as url:
        with closing(connect(url, **LIMITS, ca_file=authority.ca)) as calls:
            assert type(calls) is calls_kind
            assert calls.has(path)
        without = says(connect, url, None)
        assert "name the PEM file" in without and "rollout.ca_file" in without
        another = says(connect, url, authority.other)
        assert f"not signed by one in {authority.other} (rollout.ca_file)" in another


def test_completions_come_over_tls(authority):
    with secure(_ours, authority.certificate, authority.key) as url:
        engine = client(url, connect=partial(ServerCalls, ca_file=authority.ca))
        groups = engine.generate(requests(), SAMPLING)
        engine.close()
    assert tokens(groups) == tokens(fake().generate(requests(), SAMPLING))


def test_a_certificate_of_another_host_is_refused_although_its_authority_is_trusted(authority):
    with secure(_ours, authority.elsewhere, authority.key) as url:
        told = says(ServerCalls, url, authority.ca)
    assert "certificate is that of another host" in told and "rollout.urls" in told


def test_a_server_that_is_not_there_is_not_blamed_on_certificates(authority):
    told = says(ServerCalls, "https://127.0.0.1:9", authority.ca)
    assert "start the server, or correct rollout.urls" in told
    assert "certificate" not in told


def test_a_server_without_tls_behind_https_is_not_blamed_on_certificates(authority):
    with _ours({}) as url:
        told = says(ServerCalls, url.replace("http://", "https://"), authority.ca)
    assert "correct rollout.urls" in told and "rollout.ca_file" not in told


def test_files_that_hold_no_certificate_are_refused(authority, tmp_path):
    binary, text = tmp_path / "binary", tmp_path / "text"
    binary.write_bytes(b"\x30\x82\x00\xff")
    text.write_text("-----BEGIN CERTIFICATE-----\nabcd\n-----END CERTIFICATE-----\n")
    cases = {
        tmp_path / "missing": "cannot be read (No such file or directory)",
        tmp_path: "cannot be read (Is a directory)",
        authority.key: "holds a private key and no certificate",
        binary: "holds none",
        text: "holds none",
    }
    for path, why in cases.items():
        with pytest.raises(RecipeError) as raised:
            ServerCalls("https://127.0.0.1:9", **LIMITS, ca_file=path)
        assert f"{path} {why}" in str(raised.value) and "rollout.ca_file" in str(raised.value)


def test_several_certificates_with_words_between_them_are_taken(authority, tmp_path):
    bundle = tmp_path / "bundle.pem"
    parts = [authority.other.read_text(), "the authority of the cluster, für alle\n"]
    bundle.write_text("".join([*parts, authority.ca.read_text()]))
    assert trust_in(bundle).cert_store_stats()["x509"] == 2
    with (
        secure(_ours, authority.certificate, authority.key) as url,
        closing(ServerCalls(url, **LIMITS, ca_file=bundle)) as calls,
    ):
        assert calls.has("/status")
