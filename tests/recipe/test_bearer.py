"""Secrets of rollout servers are read from files and shown nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_replay.engines.servers.http import HttpCalls
from moe_replay.recipe.bearer import exposure, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pa55@host:8000 is down", "http://***@host:8000 is down"),
        ("['https://me:p@ss@host', 'http://b']", "['https://***@host', 'http://b']"),
        ("http://token@h/v1?api_key=abc&x=1", "http://***@h/v1?api_key=***&x=1"),
        ("http://host:8000/a@b and me@example.org", "http://host:8000/a@b and me@example.org"),
    ],
)
def test_d10_credentials_of_an_address_are_masked(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_d10_calls_to_a_server_show_a_masked_address() -> None:
    calls = HttpCalls("http://me:pa55@127.0.0.1:9", token=None, timeout_s=1.0, max_answer_bytes=10)
    assert calls.url == "http://***@127.0.0.1:9"
    calls.close()


def test_r13_a_token_file_that_others_can_read_is_warned_about(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("0123456789abcdef")
    for mode, told in ((0o644, "0644"), (0o640, "0640")):
        file.chmod(mode)
        warning = exposure(file)
        assert warning is not None
        assert f"{file} holds a bearer token and has mode {told}" in warning
        assert f"chmod 600 {file}" in warning
    file.chmod(0o600)
    assert exposure(file) is None
    assert exposure(None) is None
