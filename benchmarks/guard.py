"""Measure what the guard costs on Megatron-Core, and what it misses or wrongly accuses.

Steps with and without the guard alternate in one run, each a pass of old log-probabilities under
replay and an update. The guarded one counts every row in both passes and judges both. Whole steps
of a CPU differ by several percent from one to the next, which is more than the guard takes. So the
figure is made of what differs: the time that routers spend choosing, with and without counting, and
that of judging, all of it measured inside these steps; whole steps are printed beside it. The
matrices are wide beside the choice of experts, as those of real models are (1,024 hidden, 64
experts of 256, top-8); `--tiny` takes a model that is small enough for the guard to show.

Misses: one of 32 samples of a step has wrong routes, in three shapes, with each cause in turn.
False alarms: clean steps of the same shapes. The figures come last, one JSON object a line.

    python benchmarks/guard.py [--quick] [--tiny] [--pairs 20] [--clean-steps 400]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from measure import alternate

from moe_replay.batch import Microbatch
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.replay import ReplayScope
from moe_replay.megatron.scorer import RouteWatch
from moe_replay.routing import Routing
from moe_replay.routing.guard import Guard, OverlapCounts, Verdict, join_evidence, judge, summarise
from moe_replay.testing.drawn_steps import DrawnSteps, planted
from moe_replay.testing.policies import mean_loss, pack, start_policy, with_own_routes
from moe_replay.testing.samples import make_samples
from moe_replay.testing.tiny_models import write_tiny_checkpoint

WIDE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 256,
    "num_attention_heads": 8,
    "head_dim": 128,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
}
SHAPES = {
    "32/4 x 6": DrawnSteps(num_experts=32, topk=4, num_layers=6, num_rows=40),
    "64/6 x 6": DrawnSteps(num_experts=64, topk=6, num_layers=6, num_rows=40),
    "128/8 x 6": DrawnSteps(num_experts=128, topk=8, num_layers=6, num_rows=40),
}
CAUSES = (
    "one row late",
    "one row early",
    "a quarter of the rows late",
    "another sample of the prompt",
    "another prompt",
    "random",
    "second half random",
    "layers rotated",
    "ids + 1",
)
"""Causes that hit the whole sample or half of it; docs/guard.md has the table of all of them, of
lengths and shares."""
SEED = 5


def main() -> int:
    """Print what was measured, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="end within 50 s")
    parser.add_argument("--tiny", action="store_true", help="time a model of 64 hidden")
    parser.add_argument("--pairs", type=int, help="default 20, quick 4")
    parser.add_argument("--clean-steps", type=int, help="of each shape; default 400, quick 10")
    arguments = parser.parse_args()
    pairs = arguments.pairs or (4 if arguments.quick else 20)
    steps = arguments.clean_steps or (10 if arguments.quick else 400)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    ratio = step_ratio(TINY if arguments.tiny else WIDE, pairs)
    missed, alarms = tested(steps)
    for metric, value, unit in (
        ("guard.step_ratio", round(ratio, 4), "ratio"),
        ("guard.miss_rate", round(missed, 4), "ratio"),
        ("guard.false_alarms", alarms, "steps"),
    ):
        print(json.dumps({"metric": metric, "value": value, "unit": unit}))
    return 0


def step_ratio(model: dict[str, Any], pairs: int) -> float:
    """Return the time of a step with the guard over that of one without."""
    with tempfile.TemporaryDirectory() as folder:
        actor = start_policy(write_tiny_checkpoint(folder, initializer_range=0.03, **model))
        samples = make_samples(8, seed=SEED, min_length=64, max_length=64)
        samples = with_own_routes(actor, samples, max_tokens=512)
        batches = pack(samples, max_tokens=512, scorer=actor)
    parameters = sum(p.numel() for module in actor.modules for p in module.parameters())
    tokens = sum(len(sample.token_ids) for sample in samples)
    print(f"{parameters / 1e6:.1f}M parameters, {tokens} tokens a step, {pairs} pairs, 1 thread")
    guard, spent = Guard(), {False: Spent(), True: Spent()}
    with _timed(ReplayScope, ("_experts", "watched"), spent):
        found = alternate(
            lambda: _step(actor, batches, None, spent),
            lambda: _step(actor, batches, guard, spent),
            pairs=pairs,
        )
    print(f"step: {found.describe('without', 'with the guard')}")
    (whole, plain), (_, own) = (spent[with_guard].means() for with_guard in (False, True))
    print(
        f"routers and guard: {1e3 * plain:.1f} ms of {1e3 * whole:.0f} ms of processor time without, {1e3 * own:.1f} ms with the "
        "guard",
        flush=True,
    )
    return (whole - plain + own) / whole


class Spent:
    """Seconds of processor time: of steps, and of choosing experts, counting and judging."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.own: list[float] = []
        self.running = False

    def means(self) -> tuple[float, float]:
        """Return the means of a step, without the first, which warms up."""
        return statistics.fmean(self.steps[1:]), statistics.fmean(self.own[1:])


@contextmanager
def _timed(owner: Any, names: tuple[str, ...], spent: dict[bool, Spent]) -> Iterator[None]:
    """Add the time in some methods to that of the step that is running."""
    before = {name: getattr(owner, name) for name in names}

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            started = time.process_time()
            result = method(*given)
            for each in spent.values():
                if each.running:
                    each.own[-1] += time.process_time() - started
            return result

        return call

    for name in names:
        setattr(owner, name, timed(before[name]))
    try:
        yield
    finally:
        for name in names:
            setattr(owner, name, before[name])


def _step(
    actor: MegatronActor, batches: list[Microbatch], guard: Guard | None, spent: dict[bool, Spent]
) -> None:
    mine = spent[guard is not None]
    mine.own.append(0.0)
    mine.running, started = True, time.process_time()
    seen: list[OverlapCounts] = []
    watch = RouteWatch(observe=lambda _, watched: seen.append(watched.counts)) if guard else None
    options: dict[str, Any] = {"temperature": 1.0, "routing": Routing.REPLAY, "watch": watch}

    def judge_them() -> None:
        if guard is not None:
            began = time.process_time()
            guard.accept(_judged(guard, seen))
            seen.clear()
            mine.own[-1] += time.process_time() - began

    actor.score(batches, **options)
    judge_them()
    actor.backward(batches, mean_loss, **options)
    judge_them()
    actor.step()
    mine.running = False
    mine.steps.append(time.process_time() - started)


def _judged(guard: Guard, counts: list[OverlapCounts]) -> Verdict:
    baseline = guard.baseline([summarise(counts)])
    evidence = join_evidence([judge(part, baseline) for part in counts])
    return guard.decide(baseline, [evidence], looks={})


def tested(steps: int) -> tuple[float, int]:
    """Return the share of planted samples that pass, and the clean steps with an accusation."""
    tried = missed = alarms = 0
    print(f"seed {SEED}")
    for name, source in SHAPES.items():
        rng = np.random.default_rng([SEED, source.num_experts])
        heat = source.heat(rng)
        guard, false = Guard(), 0
        for _ in range(steps):
            recorded, live = source.draw(rng, heat)
            verdict = _judged(guard, [source.count(recorded, live)])
            false += not verdict.is_clean
            if verdict.is_clean:
                guard.accept(verdict)
        recorded, live = source.draw(rng, heat)
        passed = {}
        wrong = planted(recorded, num_experts=source.num_experts, group=source.group, rng=rng)
        for cause in CAUSES:
            ids = wrong[cause]()
            passed[cause] = 0
            for sample in range(0, source.num_samples, 4):
                replayed = recorded.copy()
                replayed[sample] = ids[sample]
                verdict = _judged(guard, [source.count(replayed, live)])
                passed[cause] += sample not in {found.sample for found in verdict.misaligned}
                tried += 1
        missed += sum(passed.values())
        alarms += false
        most = {cause: count for cause, count in passed.items() if count}
        print(
            f"{name}, 32 samples of {source.num_rows} rows: {false} of {steps} clean steps accused; missed of "
            f"{source.num_samples // 4} for each cause: {most or 'none'}",
            flush=True,
        )
    return missed / tried, alarms


if __name__ == "__main__":
    sys.exit(main())
