"""Measure what recording and replay cost a transformers model, beside the same work without them.

Example:
    $ python benchmarks/transformers_replay.py --quick
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from moe_replay.testing.tiny_models import write_tiny_checkpoint
from moe_replay.transformers import record_routes, replay_routes


def main() -> None:
    """Run the benchmark and print one JSON line a metric, after a table for people."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--rows", type=int, default=2048, help="tokens of a batch")
    arguments = parser.parse_args()
    pairs = 4 if arguments.quick else 20
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = _model()
    tokens = torch.randint(
        4, 99, (8, arguments.rows // 8), generator=torch.Generator().manual_seed(0)
    )
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size / 1e6:.1f}M parameters, {tokens.numel()} rows, {pairs} pairs")

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)

    def recorded() -> None:
        with record_routes(model) as recorder:
            forward()
        recorder.take()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=tokens, use_cache=False).logits.square().mean().backward()

    with torch.no_grad(), record_routes(model) as recorder:
        forward()
    routes, valid = recorder.take(), torch.ones(tokens.numel(), dtype=torch.bool)

    # The routes are the model's own, so that the experts have the same work on both sides.
    def replayed() -> None:
        with replay_routes(model, routes, valid, layers=recorder.layers):
            step()

    _report("hf.record_ratio", _ratio("recording", forward, recorded, 2 * pairs))
    _report("hf.replay_ratio", _ratio("replay", step, replayed, pairs))


def _ratio(name: str, plain: Callable[[], None], scoped: Callable[[], None], pairs: int) -> float:
    """Return scoped / plain of the least processor time of each; they take turns.

    Processor time, because other load on the machine is not this code's; it runs in one thread.
    """
    took: dict[Callable[[], None], list[float]] = {plain: [], scoped: []}
    for run in (plain, scoped) * (pairs + 1):
        started = time.process_time()
        run()
        took[run].append(time.process_time() - started)
    ratio = min(took[scoped][1:]) / min(took[plain][1:])
    print(f"{name}: {min(took[plain]):.4f} s plain, {min(took[scoped]):.4f} s, ratio {ratio:.4f}")
    return ratio


def _model() -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as directory:
        path = write_tiny_checkpoint(
            Path(directory) / "model",
            hidden_size=256,
            moe_intermediate_size=384,
            num_hidden_layers=4,
            initializer_range=0.05,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    return model


def _report(metric: str, value: float) -> None:
    print(json.dumps({"metric": metric, "value": round(value, 4), "unit": "ratio"}))


if __name__ == "__main__":
    main()
