"""Time a GRPO step with R3 beside TRL's GRPOTrainer: the same model, prompts, lengths and format.

Both train the demo's model from one checkpoint, in float32 on one thread, each in a process of its
own; they take turns, a step each, one mix of lengths after the other. Every completion has a length
that was drawn before, the same on both sides: the end token is forbidden up to there, and forced
then. Rewards are trivial and differ.

TRL, each step: left-padded prompts, ``generate`` of transformers with its KV cache until the
longest completion has ended, rewards, forward and backward passes over all samples padded to the
longest, in four slices, which is faster here than one (``--trl-slices``), AdamW. It takes no pass
for old log-probabilities either, and its engine is its trainer's model, so nothing is pushed. Its
settings are its fastest here: no gradient checkpointing, no auxiliary loss, grouped matrix products
for experts, fused AdamW, no logging. It has no padding-free batches for GRPO, and vLLM has no part
in this.

Ours, each step: what `moe-replay train` does under R3, checks, guard, metrics and files included.

Ratios and shares are of processor time, which is wall time on a machine that does nothing else;
the ratio by the clock is printed beside it.

Example:
    $ python benchmarks/grpo_step.py --quick
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
NUM_GENERATIONS = 8
EQUAL_LENGTH = 32
SHORTEST, LONGEST = 8, 256
LEARNING_RATE = 1e-6
BUDGET = 8192
"""Tokens of our microbatches: all of equal lengths in one. Two are as fast, four are not."""
MEASURED = {"rollout", "forward and backward"}
"""The stations that a step is for; any other is overhead."""


class Job(NamedTuple):
    """What both sides train on one mix of lengths."""

    folder: str
    """With the prompts and the reward."""
    lengths: list[list[int]]
    """Of each step, the sampled tokens of each completion, prompt after prompt."""
    slices: int
    """Parts in which TRL runs its forward and backward passes."""


class Turn(NamedTuple):
    """What one step took."""

    wall_s: float
    cpu_s: float
    """Of all threads of the process."""
    stations: dict[str, float]
    """Processor seconds; empty for TRL."""


def main() -> None:
    """Run both mixes and print one JSON line a metric, after what people read."""
    options = _options()
    ratios, overhead = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = {mix: _job(mix, Path(folder) / mix, options) for mix in options.mixes}
        for mix, turns in zip(jobs, _contest(list(jobs.values())), strict=True):
            num_tokens = [sum(step) for step in jobs[mix].lengths[1:]]
            ratios[mix] = _show(mix, turns, num_tokens)
            overhead[mix] = _show_stations([ours for ours, _ in turns])
    for mix, metric in (("equal", "grpo.vs_trl"), ("tail", "grpo.vs_trl_longtail")):
        if mix in ratios:
            cpu, wall = ratios[mix]
            _report(f"{metric}_ratio", cpu)
            _report(f"{metric}_wall_ratio", wall)
    _report("grpo.other_stations_frac", max(overhead.values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few pairs of small steps")
    parser.add_argument("--steps", type=int, help="pairs of steps that are measured, from 2")
    parser.add_argument("--samples", type=int, help="completions a step, a multiple of 8")
    parser.add_argument("--mixes", nargs="+", choices=("equal", "tail"), default=["equal", "tail"])
    parser.add_argument("--trl-slices", type=int, default=4)
    options = parser.parse_args()
    options.steps = options.steps or (2 if options.quick else 10)
    return options


def _job(mix: str, folder: Path, options: argparse.Namespace) -> Job:
    samples = options.samples
    if samples is None:
        samples = (32 if mix == "tail" else 64) if options.quick else 128
    # The first step is not measured.
    lengths = _lengths(mix, options.steps + 1, samples)
    folder.mkdir()
    _write_prompts(folder, len(lengths) * samples // NUM_GENERATIONS)
    return Job(folder=str(folder), lengths=lengths, slices=options.trl_slices)


def _lengths(mix: str, steps: int, samples: int) -> list[list[int]]:
    """Return equal lengths, or lognormal ones around 32 tokens, cut at 8 and 256."""
    if mix == "equal":
        return [[EQUAL_LENGTH] * samples for _ in range(steps)]
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.normal(np.log(32), 1.0, (steps, samples)))
    # One completion of each step takes all that it may.
    drawn[:, 0] = LONGEST
    return np.clip(drawn.round(), SHORTEST, LONGEST).astype(int).tolist()


def _contest(jobs: list[Job]) -> Iterator[list[tuple[Turn, Turn]]]:
    """Let both sides take turns, and yield those of each job; its first step is not measured."""
    context = multiprocessing.get_context("spawn")
    sides = []
    for run in (_train_ours, _train_theirs):
        here, there = context.Pipe()
        process = context.Process(target=run, args=(there, jobs), daemon=True)
        process.start()
        there.close()
        sides.append((process, here))
    for job in jobs:
        turns = []
        for number in range(len(job.lengths)):
            pair: list[Any] = [None, None]
            for side in (0, 1) if number % 2 else (1, 0):
                connection = sides[side][1]
                connection.send("go")
                pair[side] = connection.recv()
            turns.append((pair[0], pair[1]))
        yield turns[1:]
    for process, _ in sides:
        process.join()


def _write_prompts(folder: Path, count: int) -> None:
    rng = np.random.default_rng(1)
    sums = rng.integers(0, 10, (count, 5)).tolist()
    lines = (json.dumps({"prompt": " + ".join(map(str, terms)) + " = "}) for terms in sums)
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "reward.py").write_text(
        "def trivial(completions, completion_ids, **columns):\n"
        "    return [float(sum(ids) % 7) for ids in completion_ids]\n"
    )


def _show(mix: str, turns: list[tuple[Turn, Turn]], num_tokens: list[int]) -> tuple[float, float]:
    """Print both speeds; return how many times TRL's trained tokens a second we train.

    A second of processor time, and one by the clock.
    """
    mean = statistics.fmean(num_tokens)
    print(f"{mix}: {mean:.0f} sampled tokens a step, {len(turns)} pairs of steps")
    for name, side in (("ours", 0), ("TRL", 1)):
        wall = statistics.median(pair[side].wall_s for pair in turns)
        cpu = statistics.median(pair[side].cpu_s for pair in turns)
        print(
            f"  {name:5s} {cpu:6.3f} s a step, {mean / cpu:6.0f} tokens/s; by the clock {wall:6.3f} s"
        )
    # Both train the same tokens in a pair.
    middles = []
    for what, ratios in (
        ("processor time", [theirs.cpu_s / ours.cpu_s for ours, theirs in turns]),
        ("the clock", [theirs.wall_s / ours.wall_s for ours, theirs in turns]),
    ):
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(f"  ratio by {what} {middle:.2f}, half of the pairs between {low:.2f} and {high:.2f}")
        middles.append(middle)
    return middles[0], middles[1]


def _show_stations(turns: list[Turn]) -> float:
    """Print where our time goes; return the largest share of what is not the measured work."""
    sums: Counter[str] = Counter()
    for turn in turns:
        sums.update(turn.stations)
        sums["everything else"] += turn.cpu_s - sum(turn.stations.values())
    total = sum(turn.cpu_s for turn in turns)
    print("  " + ", ".join(f"{name} {100 * sums[name] / total:.1f} %" for name in sums))
    return max(seconds / total for name, seconds in sums.items() if name not in MEASURED)


def _report(metric: str, value: float) -> None:
    unit = "fraction" if metric.endswith("frac") else "ratio"
    print(json.dumps({"metric": metric, "value": round(value, 3), "unit": unit}))


class _Clock:
    """Waits for a turn, and tells the parent what it took."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.stations: Counter[str] = Counter()

    def wait(self) -> None:
        """Wait for the word, and start."""
        self._connection.recv()
        self.stations.clear()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def tell(self) -> None:
        """Stop, and send the turn."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._connection.send(Turn(wall, cpu, dict(self.stations)))

    @contextmanager
    def timed(self, station: str) -> Iterator[None]:
        """Count what is inside to a station, and no longer to the one around it."""
        started = time.process_time()
        inner = sum(self.stations.values())
        try:
            yield
        finally:
            nested = sum(self.stations.values()) - inner
            self.stations[station] += time.process_time() - started - nested

    def times(self, owner: Any, name: str, station: str) -> None:
        """Count the calls of a function or method to a station."""
        plain: Callable[..., Any] = getattr(owner, name)

        @wraps(plain)
        def timed(*args: Any, **options: Any) -> Any:
            with self.timed(station):
                return plain(*args, **options)

        setattr(owner, name, timed)


def _train_ours(connection: Connection, jobs: list[Job]) -> None:
    import torch

    torch.set_num_threads(1)
    import moe_replay.engines.embedded.engine as embedded
    from moe_replay.cli.train import train_recipe
    from moe_replay.grpo import update
    from moe_replay.grpo.run import Run
    from moe_replay.megatron.actor import MegatronActor
    from moe_replay.report.reporters import CompositeReporter

    clock = _Clock(connection)
    clock.times(MegatronActor, "forward_backward", "forward and backward")
    clock.times(MegatronActor, "measure_gradient", "optimizer")
    clock.times(MegatronActor, "step", "optimizer")
    clock.times(update, "checked_scores", "guard")
    station = Run.station

    @contextmanager
    def timed_station(run: Run, name: str) -> Iterator[None]:
        with clock.timed(name), station(run, name):
            yield

    Run.station = timed_station
    begin_step, show = Run.begin_step, CompositeReporter.step

    def wait_and_begin(run: Run) -> None:
        clock.wait()
        begin_step(run)

    def show_and_tell(reporter: Any, *args: Any) -> None:
        show(reporter, *args)
        clock.tell()

    Run.begin_step, CompositeReporter.step = wait_and_begin, show_and_tell
    plain = embedded.Batch
    for job in jobs:
        embedded.Batch = _forced_batch(plain, job)
        train_recipe(_recipe(job))


def _recipe(job: Job) -> dict[str, Any]:
    folder, steps = Path(job.folder), len(job.lengths)
    return {
        "run": {"output_dir": str(folder / "run"), "max_steps": steps},
        "model": {"path": str(ROOT / "recipes/demo/model"), "grouped_experts": True},
        "data": {"train": str(folder / "prompts.jsonl"), "max_prompt_length": 64},
        "rewards": [{"function": f"{folder}/reward.py:trivial"}],
        "rollout": {
            "dtype": "float32",
            "max_completion_length": max(map(max, job.lengths)),
            "num_generations": NUM_GENERATIONS,
            "max_batch_size": len(job.lengths[0]),
        },
        "replay": {"router_replay_mode": "R3"},
        "batch": {"global_batch_size": len(job.lengths[0]), "max_tokens_per_microbatch": BUDGET},
        "optimizer": {"lr": LEARNING_RATE},
        "checkpoint": {"save_steps": steps, "export": False},
    }


def _forced_batch(plain: type, job: Job) -> type:
    """Return the engine's batch whose completions have the lengths of the step."""
    import torch

    class ForcedBatch(plain):
        """Forbids the end token before a completion's length is reached, and forces it then."""

        calls = 0

        def __init__(self, jobs: Any, *args: Any) -> None:
            lengths = job.lengths[self.calls]
            type(self).calls += 1
            # One batch a step holds all of its completions.
            order = sorted(jobs, key=lambda each: (each.request.request_id, each.number))
            of_job = {
                (j.request.request_id, j.number): n for j, n in zip(order, lengths, strict=True)
            }
            self._lasts = np.array([of_job[j.request.request_id, j.number] - 1 for j in jobs])
            super().__init__(jobs, *args)

        def sample(self, position: int) -> None:
            """Draw a token for each row."""
            ends = torch.from_numpy(self._lasts[self._job_of_row] == position)
            end_token = self._stops
            told = torch.log_softmax(self._logits, dim=-1)
            self._logits[:, end_token] = -torch.inf
            self._logits[ends] = -torch.inf
            self._logits[ends, end_token[0]] = 0.0
            super().sample(position)
            # What the model thinks of the tokens, nothing being forbidden or forced.
            rows = torch.from_numpy(self._job_of_row)
            self.rollout_logprobs[rows, position] = told.gather(1, self._last_ids[:, None])[:, 0]

    return ForcedBatch


def _train_theirs(connection: Connection, jobs: list[Job]) -> None:
    import torch

    torch.set_num_threads(1)
    import transformers
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    clock = _Clock(connection)

    class Turns(TrainerCallback):
        """Takes a step when it is told to."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tell()

    path = ROOT / "recipes/demo/model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    for job in jobs:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.set_experts_implementation("grouped_mm")
        model.generate = _forced_generate(model.generate, job, tokenizer.eos_token_id)
        lines = (Path(job.folder) / "prompts.jsonl").read_text().splitlines()
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=lambda completion_ids, **_: [
                float(sum(ids) % 7) for ids in completion_ids
            ],
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
            args=_trl_settings(job),
            callbacks=[Turns()],
        )
        trainer.train()


def _forced_generate(plain: Callable[..., Any], job: Job, end_token: int) -> Callable[..., Any]:
    """Return ``generate`` whose completions have the lengths of the step."""
    import torch
    from transformers import LogitsProcessor

    steps = iter(job.lengths)

    class Forced(LogitsProcessor):
        """Forbids the end token before a completion's length is reached, and forces it then."""

        def __init__(self, lengths: list[int], prompt_length: int) -> None:
            self._lasts = torch.tensor(lengths) - 1 + prompt_length

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            ends = self._lasts == input_ids.shape[1]
            scores[:, end_token] = -torch.inf
            scores[ends] = -torch.inf
            scores[ends, end_token] = 0.0
            return scores

    def generate(**inputs: Any) -> torch.Tensor:
        forced = Forced(next(steps), inputs["input_ids"].shape[1])
        return plain(**inputs, logits_processor=[forced])

    return generate


def _trl_settings(job: Job) -> Any:
    """Return TRL's fastest settings for this job; see the module's text."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=f"{job.folder}/trl",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=len(job.lengths[0]) // job.slices,
        gradient_accumulation_steps=job.slices,
        num_generations=NUM_GENERATIONS,
        max_completion_length=max(map(max, job.lengths)),
        max_steps=len(job.lengths),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=0.0,
        router_aux_loss_coef=0.0,
        temperature=1.0,
        top_k=0,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
