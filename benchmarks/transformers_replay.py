"""Measure what recording and replay cost a transformers model, beside the same work without them.

A ratio of whole passes needs thousands of pairs on a busy machine before it can tell 1 % from 2 %.
So the work that scopes cannot touch (attention, experts, head, backward pass) is timed apart, and a
ratio is 1 + (rest under the scope - rest without it) / whole pass. The rest holds all that a scope
adds: finding routers, proofs, the routers' calls, hooks and the routes that it gives back. The
optimizer moves the weights in each step, as in training. Ratios of whole passes are printed too.

Example:
    $ python benchmarks/transformers_replay.py --quick
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from moe_replay.testing.tiny_models import write_tiny_checkpoint
from moe_replay.transformers import record_routes, replay_routes

_WORK = ("self_attn", "experts", "lm_head")


def main() -> None:
    """Run the benchmark and print one JSON line a metric, after a table for people."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer pairs")
    parser.add_argument("--rows", type=int, default=2048, help="tokens of a batch")
    arguments = parser.parse_args()
    pairs = 5 if arguments.quick else 20
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    model, watch = _model(), Stopwatch()
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

    with torch.no_grad(), record_routes(model) as recorder:
        forward()
    routes, valid = recorder.take(), torch.ones(tokens.numel(), dtype=torch.bool)
    # So small that the routes stay the model's own, and the experts have the same work.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

    def step() -> None:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, use_cache=False).logits.square().mean()
        watch.timed(loss.backward)()
        optimizer.step()

    def replayed() -> None:
        with replay_routes(model, routes, valid, layers=recorder.layers):
            step()

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _WORK:
            module.forward = watch.timed(module.forward)
    _report("hf.record_ratio", _ratio("recording", watch, forward, recorded, 2 * pairs))
    _report("hf.replay_ratio", _ratio("replay", watch, step, replayed, pairs))


class Stopwatch:
    """Seconds of processor time, of whole passes and of the work in them.

    Processor time, because other load on the machine is not this code's; it runs in one thread.
    """

    def __init__(self) -> None:
        self.work_s = 0.0

    def timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``run``, whose time counts as work."""

        @functools.wraps(run)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return run(*args, **kwargs)
            finally:
                self.work_s += time.process_time() - started

        return timed

    def split(self, run: Callable[[], None]) -> tuple[float, float]:
        """Return seconds of the whole call, and of what is not work in it."""
        self.work_s, started = 0.0, time.process_time()
        run()
        whole_s = time.process_time() - started
        return whole_s, whole_s - self.work_s


def _ratio(
    name: str,
    watch: Stopwatch,
    plain: Callable[[], None],
    scoped: Callable[[], None],
    pairs: int,
) -> float:
    """Return 1 + what the scope adds over the whole pass, from medians; the order alternates."""
    plain()
    scoped()
    took: tuple[list[tuple[float, float]], ...] = ([], [])
    for number in range(pairs):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            took[which].append(watch.split((plain, scoped)[which]))
    whole_s, rest_s = (statistics.median(each) for each in zip(*took[0], strict=True))
    _, scoped_rest_s = (statistics.median(each) for each in zip(*took[1], strict=True))
    of_whole = statistics.median(b[0] / a[0] for a, b in zip(*took, strict=True))
    ratio = 1 + (scoped_rest_s - rest_s) / whole_s
    print(
        f"{name}: {1e3 * whole_s:.0f} ms plain, of which {1e3 * rest_s:.1f} ms are not work; "
        f"{1e3 * scoped_rest_s:.1f} ms under the scope: ratio {ratio:.4f}; median ratio of whole "
        f"passes {of_whole:.4f}",
        flush=True,
    )
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
