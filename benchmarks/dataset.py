"""Measure time and memory to open a large chat dataset, in the first process and in others.

Each opening happens in a process of its own. Memory is what the process holds at its peak beyond
one that opens 20 rows.

Example:
    $ python benchmarks/dataset.py --quick
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moe_replay.recipe.sections.run import DataSection
from moe_replay.tasks.datasets.cache import DatasetCache
from moe_replay.tasks.datasets.file_prompts import open_file_prompts
from moe_replay.tasks.encoding import PromptEncoder

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "a",
    "train",
    "leaves",
    "the",
    "station",
    "at",
    "noon",
    "and",
    "travels",
    "north",
    "with",
    "some",
    "speed",
    "how",
    "far",
    "is",
    "it",
    "then",
]
STEP_PROMPTS = 128


def main() -> None:
    """Write the datasets, open them in processes, and print one JSON line a metric."""
    arguments = _arguments()
    if arguments.open is not None:
        print(json.dumps(_open(Path(arguments.open), Path(arguments.cache))))
        return
    rows = arguments.rows or (20_000 if arguments.quick else 200_000)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        _write(folder / "small.jsonl", 20)
        _write(folder / f"large.{arguments.kind}", rows)
        size = (folder / f"large.{arguments.kind}").stat().st_size
        print(f"{rows} rows, {size / 2**20:.0f} MiB of {arguments.kind}")
        small = _measure(folder / "small.jsonl", folder)
        first = _measure(folder / f"large.{arguments.kind}", folder)
        other = _measure(folder / f"large.{arguments.kind}", folder)
    for name, found in (("first", first), ("other", other)):
        _report(f"dataset.{name}_open_s", found["open_s"], "s")
        _report(f"dataset.{name}_cpu_s", found["cpu_s"], "s")
        _report(f"dataset.{name}_peak_mib", found["peak_mib"] - small["peak_mib"], "MiB")
    _report("dataset.step_ms", other["step_s"] * 1000, "ms")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20,000 rows instead of 200,000")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--kind", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(path: Path, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--open", str(path), "--cache", str(folder / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _open(path: Path, cache: Path) -> dict[str, float]:
    encoder = PromptEncoder(
        tokenizer=_tokenizer(), data=DataSection(train=str(path), max_prompt_length=1024)
    )
    started, cpu = time.perf_counter(), time.process_time()
    source = open_file_prompts(path, encoder, shuffle_seed=0, cache=DatasetCache(cache))
    opened, opened_cpu = time.perf_counter(), time.process_time()
    source.at(0, 1)  # the order of the first epoch
    before_step = time.perf_counter()
    source.at(1, STEP_PROMPTS)
    return {
        "open_s": opened - started,
        "cpu_s": opened_cpu - cpu,
        "step_s": time.perf_counter() - before_step,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _rows(count: int) -> Any:
    for number in range(count):
        words = [WORDS[(number * 7 + place * 3) % len(WORDS)] for place in range(180)]
        yield {
            "messages": [
                {"role": "system", "content": "Answer with one number."},
                {"role": "user", "content": f"{number}: {' '.join(words)}"},
            ],
            "answer": str(number),
        }


def _write(path: Path, count: int) -> None:
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in _rows(count))
        return
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(_rows(count))), path)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = TEMPLATE
    return fast


def _report(metric: str, value: float, unit: str) -> None:
    print(json.dumps({"metric": metric, "value": round(value, 3), "unit": unit}))


if __name__ == "__main__":
    main()
