"""The examples for TRL and for a plain loop run as they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytest.importorskip("trl")


def ran(*arguments: str) -> list[str]:
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.vllm
@pytest.mark.slow
def test_trl_replays_the_routes_of_a_vllm_in_its_process(tmp_path):
    last = ran(str(EXAMPLES / "trl_grpo.py"), "--mode", "R3", "--vllm", "--steps", "2")[-1]
    found = json.loads(last)
    assert found["steps"] == 2
    assert found["replay/coverage"] == 1.0
    # vLLM samples in bfloat16; the second step agrees only if it has the new weights.
    assert found["replay/agreement_min_sample"] > 0.9
    assert 0 < found["rollout_correction/k3_kl"] < found["rollout_correction/k3_kl_live"] < 0.1


def test_a_plain_loop_replays_what_it_sampled():
    from importlib.util import module_from_spec, spec_from_file_location

    module = module_from_spec(
        spec := spec_from_file_location("torch_loop", EXAMPLES / "torch_loop.py")
    )
    spec.loader.exec_module(module)
    gap, loss = module.step("R3")
    _, live_loss = module.step("disabled")
    assert 0 < gap < 1e-3
    assert loss != live_loss
    assert loss == pytest.approx(live_loss, abs=0.05)
