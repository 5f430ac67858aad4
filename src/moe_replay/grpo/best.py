"""The best evaluation of a run so far, and what its value may be compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256

from moe_replay.grpo.export import write_export
from moe_replay.grpo.records import EXPORT_FOLDER
from moe_replay.grpo.run import BestStep, Run
from moe_replay.recipe.recipe import Recipe
from moe_replay.tasks.prompts import PromptSource
from moe_replay.tasks.rewards.wire import encode_value


def measured_on(recipe: Recipe, held_out: Mapping[str, PromptSource], metric: str) -> str:
    """Return a digest of what decides a metric of evaluations beside the weights and the rewards.

    That is the set of held-out prompts, with what rewards see of them, and ``[eval]``: under the
    same name an edited file, or another temperature, measures something else.
    """
    part = metric.removeprefix("eval/").partition("/")[0]
    name = part if part in held_out else ""
    digest = sha256()
    asked = next(each for each in recipe.held_out_sets if each.name == name)
    source = held_out[name]
    for prompt in source.at(0, min(asked.size, source.num_prompts or asked.size)):
        columns = {key: _plain(value) for key, value in prompt.columns.items()}
        text = json.dumps([prompt.text, columns], sort_keys=True)
        digest.update(text.encode("utf-8", "surrogatepass"))
    settings = recipe.eval.model_dump(mode="json", exclude={"every_steps"})
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _plain(value: object) -> object:
    try:
        return encode_value(value)
    except (TypeError, RecursionError):
        # A kind of column that no reward function can get.
        return type(value).__name__


def keep_best(run: Run, metrics: Mapping[str, float]) -> None:
    """Note whether this evaluation is the best so far, and write its model; collective.

    The weights before the first step have no checkpoint, so they are never the best.
    """
    settings = run.recipe.checkpoint
    name = settings.metric_for_best_model
    if name is None or run.step == 0:
        return
    value = metrics.get(name)
    if value is None:
        run.journal.warn(
            f"the evaluation after step {run.step} has no {name}, by which the best model is "
            "chosen: no completion of it has a score"
        )
        return
    best = run.best
    is_better = best is None or (
        value > best.value if settings.greater_is_better else value < best.value
    )
    if is_better:
        run.best = BestStep(
            step=run.step,
            value=value,
            metric=name,
            is_greatest=settings.greater_is_better,
            measured_on=measured_on(run.recipe, run.inputs.held_out, name)
            if best is None
            else best.measured_on,
        )
        if settings.export:
            folder = run.directory / f"{EXPORT_FOLDER}-best"
            write_export(run.actor, run.recipe, folder)


def take_best(run: Run, best: BestStep) -> None:
    """Go on from the best evaluation so far, unless the run now measures something else."""
    settings = run.recipe.checkpoint
    asked = (settings.metric_for_best_model, settings.greater_is_better)
    kind = "greatest" if best.is_greatest else "smallest"
    earlier = f"the best model so far, after step {best.step}, had the {kind} {best.metric}"
    if asked != (best.metric, best.is_greatest):
        run.journal.warn(
            f"{earlier}; checkpoint.metric_for_best_model is {asked[0]!r} now and greater_is_better "
            f"{asked[1]}, so the search for the best starts again here"
        )
        return
    now = measured_on(run.recipe, run.inputs.held_out, best.metric)
    if best.measured_on and best.measured_on != now:
        run.journal.warn(
            f"{earlier}, {best.value:g}, on other held-out prompts or with other keys of [eval] than "
            "those of now, so the search for the best starts again here"
        )
    else:
        run.best = best
