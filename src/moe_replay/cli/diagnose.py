"""`moe-replay diagnose`: where the gap between an engine and a trainer comes from."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_replay.cli.environment import set_defaults
from moe_replay.cli.stages import quiet_transformers, say
from moe_replay.errors import RecipeError

if TYPE_CHECKING:
    from moe_replay.diagnose.diagnosis import Diagnosis
    from moe_replay.diagnose.hf_trainer import HfTrainer
    from moe_replay.diagnose.passes import Trainer
    from moe_replay.diagnose.sampling import SamplingPlan
    from moe_replay.engines.files.format import RolloutFile

_EMBEDDED = "embedded"


def run_diagnose(options: argparse.Namespace) -> int:
    """Sample or read a rollout, run it through the trainer, and print what its gap is made of.

    Raises:
        MoeReplayError: of the kind that names what went wrong.
    """
    set_defaults(os.environ)
    _check(options)
    import torch

    quiet_transformers()
    dtype = options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    twin = None
    if options.twin is not None:
        twin = _diagnosed(options, Path(options.twin), dtype=dtype, twin=None, is_twin=True)
    found = _diagnosed(options, Path(options.model), dtype=dtype, twin=twin)
    _print(found, options.json)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise `RecipeError` unless the options say what is diagnosed, once."""
    if (options.engine is None) == (options.rollouts is None):
        raise RecipeError(
            "give either --engine with --prompts, to sample now, or --rollouts with what was sampled before"
        )
    if options.engine is not None and options.prompts is None:
        raise RecipeError("--engine needs --prompts: a dataset, or reasoning_gym:FAMILY")
    if options.rollouts is not None:
        if options.of_sampling:
            names = " and ".join(options.of_sampling)
            raise RecipeError(f"{names} has no effect with --rollouts, which samples nothing")
    elif options.token_file is not None and not _is_address(options.engine[0]):
        raise RecipeError(
            f"--token-file has no effect with --engine {options.engine[0]}: it is for servers"
        )
    elif options.twin is not None and options.trainer != "transformers":
        raise RecipeError(
            "--twin needs --trainer transformers: Megatron holds mixture-of-experts families alone here"
        )
    elif options.twin is not None and _is_address(options.engine[0]):
        raise RecipeError(
            "--twin needs an engine that can load another model: embedded or vllm; servers hold one"
        )


def _diagnosed(
    options: argparse.Namespace,
    model: Path,
    *,
    dtype: str,
    twin: Diagnosis | None,
    is_twin: bool = False,
) -> Diagnosis:
    from moe_replay.checkpoint.facts import read_facts

    if is_twin and read_facts(model).routed is not None:
        raise RecipeError(f"--twin {model} is a mixture-of-experts model: give a dense one")
    with ExitStack() as closing:
        source = Path(options.rollouts) if options.rollouts is not None else None
        if source is None:
            folder = options.keep
            if folder is None or is_twin:
                folder = closing.enter_context(tempfile.TemporaryDirectory())
            source = _sampled(options, model, Path(folder))
        return _measured(options, model, source, dtype=dtype, twin=twin)


def _sampled(options: argparse.Namespace, model: Path, folder: Path) -> Path:
    from moe_replay.diagnose.sampling import sample_rollout

    say(
        f"sampling {options.num_samples} completions of {model} with {' '.join(options.engine)} ..."
    )
    return sample_rollout(_plan(options, model), folder, say)


def _plan(options: argparse.Namespace, model: Path) -> SamplingPlan:
    from moe_replay.diagnose.sampling import SamplingPlan, engine_section, prompt_section

    num_prompts, left = divmod(options.num_samples, options.num_generations)
    if options.num_samples < 1 or left:
        raise RecipeError(
            f"--num-samples is {options.num_samples}, expected a multiple of --num-generations, which is "
            f"{options.num_generations}"
        )
    keys: dict[str, Any] = {
        "dtype": options.engine_dtype,
        "num_generations": options.num_generations,
        "max_completion_length": options.max_completion_length,
        "temperature": options.temperature,
    }
    if _is_address(options.engine[0]):
        keys |= {"engine": options.server_kind, "urls": options.engine}
        if options.token_file is not None:
            keys["token_file"] = options.token_file
    elif len(options.engine) > 1:
        raise RecipeError(
            f"--engine is {options.engine}, expected one name, or addresses of servers"
        )
    else:
        keys["engine"] = options.engine[0]
    prompts = {"train": options.prompts, "max_prompt_length": options.max_prompt_length}
    return SamplingPlan(
        model_dir=model,
        rollout=engine_section(keys),
        prompts=prompt_section(prompts | {"task": _task(options.task)}),
        num_prompts=num_prompts,
        seed=options.seed,
    )


def _task(pairs: list[str]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--task {pair}: expected KEY=VALUE")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _is_address(engine: str) -> bool:
    return "://" in engine


def _measured(
    options: argparse.Namespace, model: Path, source: Path, *, dtype: str, twin: Diagnosis | None
) -> Diagnosis:
    from moe_replay.cli.trace_files import manifest_of, open_traces
    from moe_replay.diagnose.diagnosis import diagnose
    from moe_replay.diagnose.measured import Setting
    from moe_replay.diagnose.measuring import measure_rollout, measure_traces
    from moe_replay.engines.files.format import RolloutFile

    ours = {"trainer": options.trainer, "trainer_dtype": dtype}
    if source.suffix == ".traces" and not source.with_suffix(".groups").is_file():
        traces = open_traces(str(source))
        setting = Setting(
            engine="the recorder",
            engine_dtype="a format that a trace does not name",
            no_kl="a trace file holds no log-probabilities",
            no_weights="A trace file does not name the weights that sampled it",
            **ours,
        )
        with _trainer(options, model, dtype) as trainer:
            return diagnose(measure_traces(traces, trainer), setting, seed=options.seed)
    rollout = RolloutFile(manifest_of(source))
    _check_weights(rollout, model)
    engine = rollout.manifest.engine
    no_kl = (
        "" if engine.name == _EMBEDDED else f"{engine.name} gives no distributions over all words"
    )
    setting = Setting(
        engine=engine.name,
        engine_dtype=engine.dtype,
        temperature=rollout.manifest.sampling.temperature or 1.0,
        no_kl=no_kl,
        no_weights=_no_weights(rollout),
        **ours,
    )
    again = None if no_kl else _hf(model, engine.dtype)
    with _trainer(options, model, dtype) as trainer:
        measured = measure_rollout(rollout, trainer, engine=again)
        return diagnose(measured, setting, seed=options.seed, twin=twin)


def _check_weights(rollout: RolloutFile, model: Path) -> None:
    from moe_replay.grpo.start.digest_cache import DigestCache
    from moe_replay.grpo.start.identity import model_digests

    sampled = rollout.manifest.weights
    ours = model_digests(model, DigestCache(Path(os.devnull)))
    if sampled and (
        odd := sorted(n for n in sampled.keys() | ours if sampled.get(n) != ours.get(n))
    ):
        raise RecipeError(
            f"{rollout.path} was sampled with other weights than {model} holds ({', '.join(odd[:4])} differ): the gap "
            "would be that of two models; give the checkpoint that sampled it, or sample again"
        )


def _no_weights(rollout: RolloutFile) -> str:
    manifest = rollout.manifest
    if manifest.weights:
        return ""
    return (
        f"{rollout.path.name} does not name the weights that sampled it (after {manifest.policy_version} pushes of a "
        "training run)"
    )


def _hf(model: Path, dtype: str) -> HfTrainer:
    import torch

    from moe_replay.diagnose.hf_trainer import HfTrainer

    return HfTrainer.load(model, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _trainer(options: argparse.Namespace, model: Path, dtype: str) -> Iterator[Trainer]:
    say(f"running the samples through {options.trainer}, {dtype}, live and under replay ...")
    if options.trainer == "transformers":
        yield _hf(model, dtype)
        return
    from moe_replay.diagnose.megatron_trainer import megatron_trainer

    with megatron_trainer(model, dtype=dtype) as trainer:
        yield trainer


def _print(found: Diagnosis, target: str | None) -> None:
    from moe_replay.cli.diagnose_report import plain_report, show

    if target != "-":
        show(found)
    if target is None:
        return
    text = json.dumps(plain_report(found), indent=2)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--json {target} cannot be written: {error}") from error
