"""A rollout server's life: a port taken first, a load that shows, an end that leaves nothing."""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from moe_replay.engines.serve.messages import call_bytes
from moe_replay.engines.serve.run import tls_options
from moe_replay.engines.serve.socket import bind
from moe_replay.errors import RecipeError

from ...support.served import served
from ..server_case import FACTS, LIMIT_S, POLICY, SAMPLING, call, error_of, fake, requests

pytestmark = pytest.mark.vllm

PROGRAM = """
import asyncio, subprocess, sys
from pathlib import Path
from moe_replay.engines.serve import run as server_run
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.servers.push_files import OwnFolder
from moe_replay.engines.serve.engine import ThreadedEngine
from moe_replay.engines.serve.app import EngineServer
from moe_replay.engines.serve.run import run_until_signal, web_server
from moe_replay.engines.serve.socket import bind

hangs, folder = sys.argv[1], Path(sys.argv[2])

def say(text):
    print(text, flush=True)

class Engine(ThreadedEngine):
    async def start(self):
        child = subprocess.Popen(["sleep", "3600"])
        say(f"child {child.pid}")
        self.child, self.asked = child, asyncio.Event()
        if hangs == "start":
            await asyncio.Event().wait()
        await super().start()

    async def complete(self, *arguments, **options):
        say("sampling")
        self.asked.set()
        await asyncio.Event().wait()

    async def lost(self):
        if "lost" not in hangs:
            return await super().lost()
        await self.asked.wait()
        return "the child has died"

    async def close(self):
        if "close" in hangs:
            await asyncio.Event().wait()
        self.child.kill()
        self.child.wait()
        say("closed")

with bind("127.0.0.1", 0) as listening, OwnFolder(folder, "push-") as pushes:
    say(f"port {listening.getsockname()[1]}")
    engine = Engine(FakeEngine)
    server = EngineServer(engine, facts=None, push_folder=pushes.path)
    if hangs == "lost close":
        server_run._END_S = 0.1
    web = web_server(server.application())
    lost = run_until_signal(server, engine, web, listening, say=say, what="a fake")
say(f"over: {lost}")
"""


class Running:
    """A server in a process, and what it prints."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.seen: list[str] = []

    def until(self, start: str) -> str:
        """Return the rest of the first line that begins so; the process may not end before."""
        for line in self.process.stdout:
            self.seen.append(line.strip())
            if line.startswith(start):
                return line[len(start) :].strip()
        raise AssertionError(f"the server ended without {start!r}: {self.seen}")

    def rest(self) -> list[str]:
        """Return all lines, once it has ended."""
        self.seen += [line.strip() for line in self.process.stdout]
        return self.seen


@contextmanager
def running(folder: Path, hangs: str = "") -> Iterator[Running]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, hangs, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    # For what hangs.
    timer = threading.Timer(LIMIT_S, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        yield Running(process)
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_e25_a_signal_ends_calls_engine_and_process_in_this_order(tmp_path, number):
    with running(tmp_path) as server:
        url = f"http://127.0.0.1:{server.until('port ')}"
        child = int(server.until("child "))
        server.until("serving a fake")
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(ask(url)))
        waiting.start()
        server.until("sampling")
        server.process.send_signal(number)
        waiting.join()
        lines = server.rest()
        assert server.process.wait() == 0
    assert answers == [(503, "the server is stopping")]
    assert lines[-2:] == ["closed", "over: None"]
    assert not psutil.pid_exists(child)
    assert list(tmp_path.iterdir()) == []


def ask(url: str) -> tuple[int, str]:
    return error_of(call("POST", f"{url}/generate", call_bytes(requests(1), SAMPLING, POLICY)))


def test_e25_a_server_that_loses_its_engine_tells_its_callers_and_ends(tmp_path):
    with running(tmp_path, "lost") as server:
        url = f"http://127.0.0.1:{server.until('port ')}"
        child = int(server.until("child "))
        server.until("serving a fake")
        assert ask(url) == (503, "the child has died")
        assert server.rest()[-2:] == ["closed", "over: the child has died"]
        assert server.process.wait() == 0
    assert not psutil.pid_exists(child)
    assert list(tmp_path.iterdir()) == []


def test_e25_what_does_not_end_after_the_engine_was_lost_is_killed(tmp_path):
    with running(tmp_path, "lost close") as server:
        url = f"http://127.0.0.1:{server.until('port ')}"
        server.until("serving a fake")
        assert ask(url) == (503, "the child has died")
        assert server.rest()[-1] == "still there 0 s after the engine was lost; killed"
        assert server.process.wait() == 1


def test_r9_a_second_signal_kills_what_does_not_end(tmp_path):
    with running(tmp_path, "close") as server:
        child = int(server.until("child "))
        server.until("serving a fake")
        server.process.send_signal(signal.SIGTERM)
        server.until("SIGTERM: stopping")
        assert psutil.pid_exists(child)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait()
        server.rest()
    assert server.process.returncode == 1
    # Nobody is left to wait for it, so it may stay as a zombie until init does.
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_server_that_loads_answers_so_and_can_be_ended(tmp_path):
    with running(tmp_path, "start") as server:
        url = f"http://127.0.0.1:{server.until('port ')}"
        server.until("child ")
        answer = call("GET", f"{url}/status")
        assert (answer.status_code, "being loaded" in answer.text) == (503, True)
        server.process.send_signal(signal.SIGTERM)
        assert "serving" not in " ".join(server.rest())
        assert server.process.wait() == 0


def test_r10_a_port_that_is_taken_is_found_by_binding():
    with bind("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with pytest.raises(
            RecipeError, match=rf"127\.0\.0\.1:{port} cannot be listened on.*--port"
        ):
            bind("127.0.0.1", port)
    # It is free again at once, also while a connection of its last owner lingers.
    bind("127.0.0.1", port).close()


def test_a_host_that_is_not_of_this_machine_is_refused():
    for host in ("203.0.113.7", "no-such-host.invalid"):
        with pytest.raises(RecipeError, match=host):
            bind(host, 0)


def test_tls_files_that_are_missing_are_refused(tmp_path):
    certificate = tmp_path / "certificate.pem"
    assert tls_options(None, None, None) == {}
    with pytest.raises(RecipeError, match="need --ssl-certfile"):
        tls_options(None, certificate, None)
    with pytest.raises(RecipeError, match="is not a file"):
        tls_options(certificate, None, None)


def test_dropped_connections_are_noticed_by_the_kernel():
    with bind("127.0.0.1", 0) as listening:
        assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        with (
            socket.create_connection(listening.getsockname()) as caller,
            listening.accept()[0] as accepted,
        ):
            # What a listening socket has, its connections inherit.
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
            assert caller.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


def write_certificate(certificate: Path, key: Path) -> None:
    """Write a certificate of this machine's loopback address that signs itself."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def test_tls_is_served(tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    write_certificate(certificate, key)
    with served(fake(), facts=FACTS, web=tls_options(certificate, key, None)) as url:
        secure = url.replace("http://", "https://")
        trusting = ssl.create_default_context(cafile=certificate)
        answer = httpx2.get(f"{secure}/status", verify=trusting, timeout=LIMIT_S, trust_env=False)
        assert answer.status_code == 200
        with pytest.raises(httpx2.ConnectError, match=r"(?i)certificate"):
            httpx2.get(f"{secure}/status", timeout=LIMIT_S, trust_env=False)


def test_tls_can_ask_callers_for_a_certificate(tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    write_certificate(certificate, key)
    with served(fake(), facts=FACTS, web=tls_options(certificate, key, certificate)) as url:
        secure = url.replace("http://", "https://")
        trusting = ssl.create_default_context(cafile=certificate)
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{secure}/status", verify=trusting, timeout=LIMIT_S, trust_env=False)
        trusting.load_cert_chain(certificate, key)
        answer = httpx2.get(f"{secure}/status", verify=trusting, timeout=LIMIT_S, trust_env=False)
        assert answer.status_code == 200
