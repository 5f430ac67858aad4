"""What every test gets: one thread, checked annotations, repeatable examples, clear skips."""

import gc
import importlib.util
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Before the first import of torch, which reads it once. Two test processes on two cores leave
# nothing to share.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# As `moe-replay train` does on a CPU. Compiling starts processes, after which ranks must not be
# forked.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

from .support.annotations import check_annotations

# moe_replay.megatron.upstream.no_cuda is left out: it asks who called it, and a checked function is
# called by its checker.
check_annotations(
    [
        "moe_replay.batch",
        "moe_replay.checkpoint",
        "moe_replay.engines",
        "moe_replay.grpo",
        "moe_replay.megatron.actor",
        "moe_replay.megatron.logprobs",
        "moe_replay.megatron.ranks.messages",
        "moe_replay.megatron.ranks.sharing",
        "moe_replay.megatron.replay",
        "moe_replay.megatron.scorer",
        "moe_replay.megatron.weights",
        "moe_replay.report",
        "moe_replay.recipe",
        "moe_replay.routing",
        "moe_replay.tasks",
        "moe_replay.transformers",
    ]
)

# The default profile tries the same examples on every run; `--hypothesis-profile explore` looks for
# new ones. Both print the blob that repeats a failure.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("repeatable")


@dataclass(frozen=True, kw_only=True)
class Authority:
    """An authority that nobody else trusts, and what it signed."""

    ca: Path
    """Its own certificate."""
    other: Path
    """Certificate of an authority that signed nothing."""
    certificate: Path
    """Of 127.0.0.1, signed by ``ca``."""
    elsewhere: Path
    """Of another address, signed by ``ca``."""
    key: Path
    """Of what it signed."""


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Make certificates with the openssl command."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make certificates with")
    folder = tmp_path_factory.mktemp("authority")
    configuration = folder / "openssl.cnf"
    configuration.write_text("[req]\ndistinguished_name = name\n[name]\n")

    def openssl(*arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

    def new_key(name: str) -> Path:
        path = folder / f"{name}.key"
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)
        return path

    def certificate(name: str, key: Path, *options: object) -> Path:
        path = folder / f"{name}.pem"
        common = ("-config", configuration, "-key", key, "-subj", f"/CN={name}", "-days", 2)
        openssl("req", "-x509", "-new", *common, *options, "-out", path)
        return path

    def signed(name: str, address: str) -> Path:
        extensions = (
            "-addext",
            "basicConstraints=CA:false",
            "-addext",
            f"subjectAltName=IP:{address}",
        )
        return certificate(name, key, "-CA", ca, "-CAkey", ca_key, *extensions)

    is_authority = "-addext", "basicConstraints=critical,CA:true"
    key, ca_key = new_key("servers"), new_key("ours")
    ca = certificate("ours", ca_key, *is_authority)
    other = certificate("another", new_key("another"), *is_authority)
    return Authority(
        ca=ca,
        other=other,
        certificate=signed("server", "127.0.0.1"),
        elsewhere=signed("elsewhere", "127.0.0.2"),
        key=key,
    )


@pytest.fixture(scope="session")
def vllm_imported() -> None:
    """Import vLLM without the warnings that its import raises about torch."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm.v1.engine.llm_engine
        import vllm.v1.worker.cpu_worker  # noqa: F401
    from moe_replay.engines.vllm.plugin import register

    # As vLLM itself does when it starts: until then its stand-ins for CUDA fail Megatron-Core in
    # this process.
    register()
    # It collects several times at each start and end of an engine.
    gc.freeze()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


REQUIREMENTS = {
    "gpu": ("no CUDA device", _has_cuda),
    "vllm": ("vLLM is not installed", lambda: importlib.util.find_spec("vllm") is not None),
    "sglang": ("SGLang is not installed", lambda: importlib.util.find_spec("sglang") is not None),
}


class FailuresAtOnce:
    """Print each failure at once: a run that is ended from outside never prints its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print where and why, in the process that writes to the terminal."""
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            reporter.write_line(
                f"\n{report.nodeid} failed in {report.when}:\n{report.longreprtext}"
            )


def pytest_configure(config: pytest.Config) -> None:
    """In the process that distributes tests to others, print failures at once."""
    if config.getoption("dist", "no") != "no":
        config.pluginmanager.register(FailuresAtOnce(config), "failures_at_once")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Leave what importing and collecting make out of every garbage collection.

    Those are millions of objects that stay. Looking through them takes a fifth of that time, and
    later most of the time of a short run in a forked process, which copies their pages.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run; asks for CUDA only when a collected test needs it."""
    for marker, (reason, is_met) in REQUIREMENTS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_met():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
