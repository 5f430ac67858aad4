"""How far a replayed step in each layout is from that of a single process, in float32 on the CPU.

The tests hold every layout to 1e-5; this prints what the differences are, as a table, then one JSON
object a line.

    python benchmarks/layouts.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from moe_replay.testing.layouts import CASES, Case, Step, layout, replayed_step
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

LAYERS = tuple(range(1, 8))
QUICK = ("tp2", "pp2 vpp2", "cp2", "tp2 ep2")


def main() -> int:
    """Print the table and the worst figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    names = QUICK if parser.parse_args().quick else tuple(CASES)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    worst = {"logprob": 0.0, "gradient": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_tiny_checkpoint(Path(folder), num_hidden_layers=8, mlp_only_layers=[0])
        alone = Case(layout=layout(), ranks=1)
        (expected,) = run_ranks(replayed_step, 1, checkpoint, alone, LAYERS)
        print(
            "| layout | ranks | log-probability | worst gradient | gradient norm |\n|---|---|---|---|---|"
        )
        for name in names:
            case = CASES[name]
            steps = run_ranks(replayed_step, case.ranks, checkpoint, case, LAYERS, timeout_s=200)
            logprob, gradient, norm = errors(steps, expected)
            worst = {
                "logprob": max(worst["logprob"], logprob),
                "gradient": max(worst["gradient"], gradient),
            }
            print(
                f"| {name} | {case.ranks} | {logprob:.1e} | {gradient:.1e} | {norm:.1e} |",
                flush=True,
            )
    for what, value in worst.items():
        print(
            json.dumps(
                {"metric": f"layouts.worst_{what}_error", "value": value, "unit": "relative"}
            )
        )
    return 0


def errors(steps: list[Step], expected: Step) -> tuple[float, float, float]:
    """Return the largest relative errors of log-probabilities, gradients and gradient norm."""
    logprob = max(
        float(
            np.abs(values - expected.old_logprobs[i]).max() / np.abs(expected.old_logprobs[i]).max()
        )
        for step in steps
        for i, values in step.old_logprobs.items()
    )
    gradient = max(
        float((step.gradients[name] - value).norm() / (value.norm() + 1e-12))
        for step in steps
        for name, value in expected.gradients.items()
    )
    norm = max(abs(step.grad_norm / expected.grad_norm - 1) for step in steps)
    return logprob, gradient, norm


if __name__ == "__main__":
    sys.exit(main())
