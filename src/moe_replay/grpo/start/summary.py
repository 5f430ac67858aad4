"""What is about to run, in words for a person."""

from __future__ import annotations

from moe_replay.engines.vllm.capacity import HasCache
from moe_replay.grpo.inputs import data_lines
from moe_replay.grpo.records import RunSummary
from moe_replay.grpo.run import Run
from moe_replay.grpo.sampling_words import describe_drawing, describe_ends, describe_overlap
from moe_replay.recipe.recipe import Recipe


def run_summary(run: Run) -> RunSummary:
    """Return what is about to run; too small a cache becomes a warning of the first step."""
    recipe, engine, replica = run.recipe, run.engine.description, run.replica
    weights = [p for module in run.actor.modules for p in module.parameters()]
    adapters = run.actor.adapters
    num_learning = sum(p.numel() for p in weights if p.requires_grad)
    num_parameters = sum(p.numel() for p in weights) - (num_learning if adapters else 0)
    return RunSummary(
        sections={
            "Model": [
                f"{recipe.model.path}: {num_parameters / 1e6:.2f}M parameters, "
                f"{len(run.actor.routers)} MoE layers, top-{engine.topk} of {engine.num_experts} "
                "experts",
                f"trained in {recipe.model.dtype} on {run.actor.device}",
                *(
                    [f"frozen; {_adapters(recipe)}: {num_learning:,} parameters"]
                    if adapters
                    else []
                ),
            ],
            "Layout": [
                f"{replica.num_replicas} data-parallel replica(s) of {replica.size} rank(s): "
                f"{recipe.megatron.describe()}"
            ],
            "Engine": [
                f"{engine.name} {engine.version}, {engine.dtype}, context "
                f"{engine.max_context_length}",
                describe_drawing(recipe),
                *([f"rollouts {describe_overlap(recipe)}"] if run.overlaps else []),
                *describe_ends(recipe, run.inputs.tokenizer),
                *_what_fits(run),
            ],
            "Data": data_lines(recipe, run.inputs),
            "Replay": [
                f"router_replay_mode = {run.mode.value}: {_what_is_replayed(run)}",
                "live: padding rows, the token sampled last, and rows that the engine left out",
                f"guard {'on' if run.guard else 'off'}, min_coverage {run.min_coverage}",
            ],
            "Batch": [
                f"{recipe.prompts_per_step} prompts x {recipe.rollout.num_generations} completions "
                f"a step, {recipe.batch.steps_per_generation} update(s) of "
                f"{recipe.batch.global_batch_size} samples",
                f"old log-probabilities: {_which_pass(recipe)}",
            ],
            "Output": [
                f"{run.directory} (every key of the recipe: recipe.toml)",
                *_what_is_kept(run),
                *run.notes,
            ],
        },
        first_step=run.step + 1,
        max_steps=recipe.run.max_steps,
    )


def _adapters(recipe: Recipe) -> str:
    lora = recipe.lora
    return f"adapters of rank {lora.rank} x {lora.scale:g} on {', '.join(lora.target_modules)}"


def _which_pass(recipe: Recipe) -> str:
    if recipe.why_old_pass is None:
        return "of the update's own forward pass"
    return f"a pass of their own ({recipe.why_old_pass})"


def _what_is_replayed(run: Run) -> str:
    passes = run.mode.passes
    if not run.mode.replays:
        return passes.replayed_in
    return f"routes of {passes.recorded_by}, replayed in {passes.replayed_in}"


def _what_fits(run: Run) -> list[str]:
    """Say how many sequences the engine's cache holds, and warn when they are too few."""
    if not isinstance(run.engine, HasCache):
        return []
    if shortage := run.engine.capacity.shortage():
        run.journal.warn(shortage)
    return [run.engine.capacity.describe()]


def _what_is_kept(run: Run) -> list[str]:
    """Say how many completions are written down, where that is not all of them."""
    kept, sampled = run.recipe.logging.completions, run.recipe.samples_per_step
    if kept >= sampled:
        return []
    return [f"texts of {kept} of {sampled} completions a step are kept (logging.completions)"]
