"""The options of `moe-replay diagnose`, without a heavy import."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

_DTYPES = ("float32", "bfloat16")


class _OfSampling(argparse.Action):
    """Store a value, and remember that an option which only sampling reads was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.of_sampling = (*namespace.of_sampling, option_string)


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    command.set_defaults(of_sampling=())
    command.add_argument("model", metavar="MODEL", help="checkpoint that the trainer holds")
    _add_engine(command)
    _add_prompts(command)
    add = command.add_argument
    add(
        "--rollouts",
        metavar="PATH",
        help="what moe-replay rollout wrote, or a trace file, in place of an engine",
    )
    add("--keep", action=_OfSampling, metavar="FOLDER", help="keep the sampled rollout there")
    add(
        "--trainer",
        choices=("megatron", "transformers"),
        default="megatron",
        help="what runs the sampled tokens again",
    )
    add(
        "--dtype",
        choices=_DTYPES,
        help="number format of the trainer: bfloat16 on a GPU, else float32",
    )
    add(
        "--twin",
        action=_OfSampling,
        metavar="MODEL",
        help="dense model, diagnosed in the same way: the floor without routing; needs --trainer transformers",
    )
    add("--seed", metavar="N", type=int, default=0, help="seed of sampling and of intervals")
    add(
        "--json",
        metavar="FILE",
        help="write everything as JSON; - for the screen, in place of tables",
    )


def _add_engine(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--engine",
        nargs="+",
        metavar="ENGINE",
        help="what samples: embedded, vllm, or addresses of servers, such as http://127.0.0.1:8000",
    )
    add(
        "--server-kind",
        action=_OfSampling,
        choices=("vllm-server", "sglang-server"),
        default="vllm-server",
        help="what speaks at these addresses; moe-replay serve and vLLM: vllm-server",
    )
    add("--token-file", action=_OfSampling, metavar="FILE", help="bearer token of the servers")
    add(
        "--engine-dtype",
        action=_OfSampling,
        choices=_DTYPES,
        default="bfloat16",
        help="number format of the engine",
    )


def _add_prompts(command: argparse.ArgumentParser) -> None:
    add = partial(command.add_argument, action=_OfSampling)
    add(
        "--prompts",
        metavar="DATASET",
        help="file, folder, hf:ORG/NAME or reasoning_gym:FAMILY, as data.train of a recipe",
    )
    add(
        "--task",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        help="configuration of a reasoning_gym family",
    )
    add("--num-samples", metavar="N", type=int, default=64, help="completions to sample")
    add("--num-generations", metavar="N", type=int, default=4, help="completions of each prompt")
    add(
        "--max-prompt-length", metavar="N", type=int, default=512, help="limit of prompts in tokens"
    )
    add("--max-completion-length", metavar="N", type=int, default=256, help="limit of completions")
    add("--temperature", metavar="T", type=float, default=1.0, help="softmax temperature")
