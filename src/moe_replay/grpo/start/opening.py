"""open_run: the parts of a run built from its recipe, resumed, and closed in reverse order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch

from moe_replay.engines.types import Engine, ShowsProgress
from moe_replay.errors import CheckpointError
from moe_replay.grpo.ahead import Ahead, check_beside
from moe_replay.grpo.checkpoint import load_checkpoint
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.push import give_weights
from moe_replay.grpo.records import BaseReporter
from moe_replay.grpo.run import Run
from moe_replay.grpo.start.admission import Admission, admit
from moe_replay.grpo.start.preflight import Preflight, preflight
from moe_replay.grpo.stopping import StopRequest
from moe_replay.megatron.actor import MegatronActor, build_policy, build_scorer
from moe_replay.megatron.checkpoint import CheckpointFolder
from moe_replay.megatron.layout import initialize, shutdown
from moe_replay.megatron.lora.reference import WithoutAdapters
from moe_replay.megatron.options.typed import read_options
from moe_replay.megatron.ranks.messages import all_ranks
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.megatron.room import check_room, expected_bytes
from moe_replay.megatron.scorer import MegatronScorer
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.routing.guard import Guard


@contextmanager
def open_run(
    recipe: Recipe,
    process: ProcessSpec,
    reporter: BaseReporter,
    *,
    restart: bool,
    allow_changed: Collection[str],
    stop: StopRequest,
    make_engine: Callable[[Recipe, torch.device], Engine],
    checked: Preflight | None = None,
) -> Iterator[Run]:
    """Build every part of the run, resume it if it has a checkpoint, and close it at the end.

    ``checked`` is what a caller found out before, so that nothing is opened twice.

    Raises:
        MoeReplayError: the first refusal of `preflight`, before anything is built.
        CheckpointError: when another process writes there, or the newest checkpoint differs.
    """
    if checked is None:
        checked = preflight(recipe, process, own_engine=make_engine is not recipe_engine)
    inputs, recipe, checkpoints = checked.cleared(), checked.recipe, _checkpoints(checked.recipe)
    with ExitStack() as closing:
        closing.callback(inputs.close)
        # Before the minutes that loading takes; the lock is released after all else is closed.
        admission = Admission()
        if process.rank == 0:
            admission = admit(
                recipe, checkpoints, closing, restart=restart, allow_changed=allow_changed
            )
        _join_ranks(recipe, process)
        closing.callback(shutdown)
        step = _agreed_step(admission)
        actor = _build_actor(recipe, reporter)
        reporter.station(0, f"starting the {recipe.rollout.engine} engine")
        engine, ahead = _open_engine(recipe, actor.device, make_engine, closing)
        _follow(engine, reporter, process)
        run = Run(
            recipe=recipe,
            process=process,
            reporter=reporter,
            inputs=inputs,
            engine=engine,
            actor=actor,
            replica=Replica.find(tuple(actor.routers), place=actor.place),
            reference=_build_reference(recipe, actor),
            guard=Guard() if recipe.replays and recipe.replay.guard else None,
            checkpoints=checkpoints,
            identity=admission.identity,
            stop=stop,
            notes=admission.notes,
            ahead=ahead,
        )
        _resume(run, step, restart=restart)
        _check_disk(run)
        yield run


def _join_ranks(recipe: Recipe, process: ProcessSpec) -> None:
    initialize(
        recipe.megatron,
        from_environment=process.launched_by_torchrun,
        local_rank=process.local_rank,
        seed=recipe.run.seed,
        wait_limit=recipe.run.wait_limit,
    )


def _resume(run: Run, step: int | None, *, restart: bool) -> None:
    """Continue after the checkpoint of ``step``, or stay at step 0 when it is None.

    ``restart`` discards all checkpoints.
    """
    if restart and run.process.rank == 0:
        run.checkpoints.remove_all()
    if step is None:
        run.ranks.barrier()
        if run.recipe.lora.adapter is not None:
            # The engine has the model without it.
            give_weights(run)
        return
    load_checkpoint(run, step)
    give_weights(run)


def _check_disk(run: Run) -> None:
    """Raise on every rank unless the disk has room for the first checkpoint.

    Later ones check for themselves.
    """
    needed = expected_bytes(run.actor.modules, run.actor.optimizer)
    shortage = None
    if run.process.rank == 0 and not run.checkpoints.steps():
        try:
            what = "by the number of parameters; free some space, or choose another run.output_dir"
            check_room(run.checkpoints.path, needed, what=what)
        except CheckpointError as error:
            shortage = error
    run.ranks.raise_together(shortage)


def _checkpoints(recipe: Recipe) -> CheckpointFolder:
    return CheckpointFolder(
        recipe.run.output_dir / "checkpoints", save_total_limit=recipe.checkpoint.save_total_limit
    )


def _agreed_step(admission: Admission) -> int | None:
    """Return the step that rank 0 resumes from, or raise its refusal, on every rank.

    A folder that is shared over a network may look different from other machines for a while.
    """
    refusal, step = all_ranks().gather((admission.refusal, admission.step))[0]
    if refusal is not None:
        raise CheckpointError(refusal)
    return step


def _build_actor(recipe: Recipe, reporter: BaseReporter) -> MegatronActor:
    reporter.station(0, "loading the model into the trainer")
    actor = build_policy(
        recipe.model.path,
        recipe.megatron,
        dtype=getattr(torch, recipe.model.dtype),
        settings=recipe.optimizer,
        num_updates=recipe.num_updates,
        grouped_experts=recipe.model.grouped_experts,
        options=read_options(recipe.megatron),
        chunk_rows=recipe.batch.logprob_chunk_size,
        gives_back=recipe.megatron.offload_during_rollout,
        lora=recipe.lora,
        seed=recipe.run.seed,
        freezes_routers=recipe.megatron.freeze_moe_router,
    )
    # An engine that shares the device measures at its start what is free.
    actor.memory.give_back()
    return actor


def _open_engine(
    recipe: Recipe,
    device: torch.device,
    make_engine: Callable[[Recipe, torch.device], Engine],
    closing: ExitStack,
) -> tuple[Engine, Ahead]:
    """Return the engine, and what samples with it beside the trainer, which is ended first."""
    engine = make_engine(recipe, device)
    closing.callback(engine.close)
    check_beside(engine, recipe.rollout)
    ahead = Ahead()
    closing.callback(ahead.cancel)
    return engine, ahead


def _follow(engine: Engine, reporter: BaseReporter, process: ProcessSpec) -> None:
    """Let the reporter ask how far rollouts are, if the engine knows."""
    if isinstance(engine, ShowsProgress):
        whose = f"rank {process.rank} of {process.world_size}" if process.world_size > 1 else ""
        reporter.follow(lambda: engine.progress, whose=whose)


def _build_reference(
    recipe: Recipe, actor: MegatronActor
) -> MegatronScorer | WithoutAdapters | None:
    if recipe.grpo.beta == 0:
        return None
    if actor.adapters is not None:
        return WithoutAdapters(actor, actor.adapters)
    return build_scorer(
        recipe.model.path,
        recipe.megatron,
        dtype=getattr(torch, recipe.model.dtype),
        grouped_experts=recipe.model.grouped_experts,
        chunk_rows=recipe.batch.logprob_chunk_size,
        overrides=read_options(recipe.megatron).transformer,
        gives_back=recipe.megatron.offload_during_rollout,
    )
