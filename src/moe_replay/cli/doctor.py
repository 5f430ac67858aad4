"""`moe-replay doctor`: whether a recipe can run here, what it replays and what is refused.

The weights are not read.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moe_replay.cli.doctor_tables import show
from moe_replay.cli.environment import read_process, set_defaults
from moe_replay.grpo.sampling_words import describe_drawing, describe_overlap
from moe_replay.grpo.saves import PATIENCE
from moe_replay.grpo.start.preflight import Preflight, preflight, ranks_needed
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.recipe.sections.training import MegatronSection
from moe_replay.routing import LiveReason, ReplayMode, Routing, expert_dtype

if TYPE_CHECKING:
    from moe_replay.megatron.model import ModelShape


def run_doctor(options: argparse.Namespace) -> int:
    """Examine a recipe and print the report; return 0 if it can run here, else 2.

    With ``--plan`` print instead what it needs of another machine; return 0 if it fits.

    Raises:
        RecipeError: the recipe itself is wrong, so there is nothing to examine.
    """
    process = read_process(os.environ)
    set_defaults(os.environ)
    if options.plan is not None:
        from moe_replay.cli.doctor_plan import run_plan

        return run_plan(options)
    report = examine(load_recipe(options.recipe, options.overrides), process)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0 if report["can_run"] else 2


def examine(recipe: Recipe, process: ProcessSpec) -> dict[str, Any]:
    """Return everything that is known about a recipe before its weights are loaded, as plain JSON.

    What a problem hides is null, and the problem is in ``problems``.
    """
    found = preflight(recipe, process, any_ranks=not process.launched_by_torchrun, tries_push=True)
    report: dict[str, Any] = {
        "can_run": not found.problems,
        "problems": [str(problem) for problem in found.problems],
        "notes": found.notes,
        "settings": settings_of(found.recipe),
        "passes": passes_of(recipe),
        "live_rows": live_rows_of(recipe.replay.router_replay_mode),
        "versions": [asdict(version) | {"is_ok": version.is_ok} for version in found.versions],
        "model": None,
        "layout": None,
        "routes": None,
        "options": None,
    }
    if found.shape is not None:
        add_model(report, found)
    found.close()
    return report


def settings_of(recipe: Recipe) -> dict[str, str]:
    """Describe what a recipe turns on."""
    replay, megatron, checkpoint = recipe.replay, recipe.megatron, recipe.checkpoint
    recompute = megatron.recompute_granularity or "none"
    if megatron.recompute_modules:
        recompute += f" ({', '.join(megatron.recompute_modules)})"
    elif megatron.recompute_method:
        recompute += f" ({megatron.recompute_method}, {megatron.recompute_num_layers} layers)"
    guard = "off"
    if recipe.replays and replay.guard:
        guard = "every row of every sample, misaligned: stop"
        if replay.on_misaligned == "drop":
            guard = guard.replace("stop", f"drop, at most {replay.max_dropped_frac:.3g} of a step")
    return {
        "mode": replay.router_replay_mode.value,
        "engine": recipe.rollout.describe_engine(),
        "sampling": describe_drawing(recipe),
        "rollouts": describe_overlap(recipe),
        "trainer": recipe.model.dtype,
        "recompute": recompute,
        "dispatcher": megatron.moe_token_dispatcher_type,
        "auxiliary loss": f"{megatron.moe_aux_loss_coeff}, of live experts, without padding"
        if megatron.moe_aux_loss_coeff
        else "none",
        **_options_of(megatron),
        "guard": guard,
        "minimum coverage": str(replay.min_coverage) if recipe.replays else "none",
        "checkpoints": f"{_how_often(checkpoint.save_steps)}, {checkpoint.save_total_limit} kept"
        f"{', exported at the end' if checkpoint.export else ''}",
    }


def _how_often(save_steps: int | None) -> str:
    if save_steps is None:
        return f"after every step, or at most {100 / PATIENCE:.3g} % of the time"
    return f"every {save_steps} steps"


def _options_of(megatron: MegatronSection) -> dict[str, str]:
    """Return what each of Megatron's tables says, of those that say something."""
    tables = {
        "transformer": megatron.transformer,
        "ddp": megatron.ddp_fields() if megatron.ddp else {},
        "optimizer": megatron.optimizer_fields() if megatron.optimizer else {},
    }
    return {
        f"megatron.{name}": ", ".join(f"{key} = {json.dumps(v)}" for key, v in options.items())
        for name, options in tables.items()
        if options
    }


def passes_of(recipe: Recipe) -> list[dict[str, str]]:
    """Return how the routers of each pass of a step choose experts."""
    passes = recipe.replay.router_replay_mode.passes
    recorded = "engine's" if passes.engine is Routing.RECORD else "old log-probabilities'"
    words = {
        Routing.LIVE: "live",
        Routing.RECORD: "live, recorded",
        Routing.REPLAY: f"replay of the {recorded}",
    }
    skips_old = recipe.why_old_pass is None
    rows = [
        ("rollout", words[passes.engine]),
        ("old log-probabilities", "the update's own pass" if skips_old else words[passes.old]),
        ("update", words[passes.update]),
    ]
    if recipe.megatron.recompute_granularity is not None:
        rows.append(
            ("recomputation", "the routes of its own forward pass" if recipe.replays else "live")
        )
    if recipe.grpo.beta > 0:
        follows = recipe.replays and recipe.replay.reference_routes == "replay"
        rows.append(("reference", "replay of the policy's" if follows else "live"))
    if recipe.replay.live_gap_every:
        rows.append(("live gap", f"live, every {recipe.replay.live_gap_every} steps"))
    if recipe.held_out_sets:
        rows.append(("evaluation", "live, in the engine"))
    return [{"pass": name, "routes": routes} for name, routes in rows]


_WHY_LIVE = {
    LiveReason.PADDING: "holds no token; never counts",
    LiveReason.LAST_TOKEN: "the last sampled token is never fed to the engine; never counts",
    LiveReason.PROMPT_OMITTED: "the engine omitted prompt routes; lowers coverage",
    LiveReason.ENVIRONMENT_OMITTED: "the engine omitted an environment's tokens; lowers coverage",
    LiveReason.ENGINE_GAVE_NONE: "the engine ran the token and gave no route; lowers coverage",
}


def live_rows_of(mode: ReplayMode) -> list[dict[str, str]]:
    """Return which rows stay live in a pass that replays, and why."""
    # A trainer that records its own routes leaves no token out.
    of_tokens = _WHY_LIVE if mode.passes.engine is Routing.RECORD else [LiveReason.PADDING]
    reasons = of_tokens if mode.replays else []
    return [{"reason": reason.value, "why": _WHY_LIVE[reason]} for reason in reasons]


def add_model(report: dict[str, Any], found: Preflight) -> None:
    """Fill in ``model``, ``layout``, ``routes`` and ``options``, as far as problems allow it.

    Loads Megatron-Core, but makes no process group and reads no weight.
    """
    shape = found.shape
    assert shape is not None
    report["model"] = {
        "path": str(found.recipe.model.path),
        "family": shape.family,
        "num_layers": shape.num_layers,
        "moe_layers": list(shape.moe_layers),
        "dense_layers": sorted(set(range(shape.num_layers)) - set(shape.moe_layers)),
        "num_mtp_layers": shape.num_mtp_layers,
        "num_experts": shape.num_experts,
        "topk": shape.topk,
    }
    if found.config is None:
        return
    moe_layers = [[n for n in layers if n in shape.moe_layers] for layers in found.stages]
    report["layout"] = layout_of(found, moe_layers)
    if shape.num_moe_layers:
        report["routes"] = routes_of(found, shape, max(map(len, moe_layers)))
    report["options"] = [
        {"option": refusal.option, "state": verdict.value, "why": refusal.why}
        for refusal, verdict in found.verdicts
    ]


def layout_of(found: Preflight, moe_layers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Describe how ranks are divided, and what each pipeline stage holds."""
    import torch

    from moe_replay.megatron.upstream import compat

    layout, num_ranks = found.recipe.megatron, found.process.world_size
    return {
        "description": layout.describe(),
        "num_ranks": num_ranks,
        "multiple_of": ranks_needed(layout),
        "ranks_per_replica": layout.model_parallel_size,
        "num_replicas": num_ranks // layout.model_parallel_size,
        "ranks_per_copy_of_experts": layout.expert_parallel_size,
        "stages": [
            {"layers": list(layers), "moe_layers": of_experts}
            for layers, of_experts in zip(found.stages, moe_layers, strict=True)
        ],
        "device": f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "CPU",
        "transformer_engine": compat.transformer_engine_usable(),
    }


def routes_of(found: Preflight, shape: ModelShape, fullest: int) -> dict[str, Any]:
    """Return the bytes of routes per token, and the maximum on any rank.

    ``fullest`` is the largest number of MoE layers of a stage.
    """
    recipe = found.recipe
    layout, batch = recipe.megatron, recipe.batch
    id_bytes = expert_dtype(shape.num_experts).itemsize
    # One byte a row marks whether it has a route.
    row_bytes = fullest * shape.topk * id_bytes + 1
    shards = layout.tensor_model_parallel_size * layout.context_parallel_size
    tokens = batch.max_tokens_per_microbatch or (
        (batch.micro_batch_size or 1) * recipe.max_sequence_length
    )
    num_replicas = found.process.world_size // layout.model_parallel_size
    per_step = -(-recipe.samples_per_step // num_replicas) * recipe.max_sequence_length
    return {
        "bytes_per_token": shape.num_moe_layers * shape.topk * id_bytes,
        "id_bytes": id_bytes,
        "max_bytes_per_rank_and_microbatch": -(-tokens // shards) * row_bytes,
        "max_bytes_per_rank_and_step": -(-per_step // shards) * row_bytes,
    }
