"""Checkpoints to resume from: Megatron's distributed format, made visible only when they are whole.

A checkpoint is written into a folder whose name no reader looks for, flushed to the disk, and
renamed; a process that is killed at any moment leaves either a whole checkpoint or an ignored
folder behind. A write that fails on one rank fails on all of them, and takes what it left
unfinished with it.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from moe_replay.errors import CheckpointError
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.disk import SharedWrite, flush_folder
from moe_replay.megatron.ranks.messages import all_ranks
from moe_replay.megatron.room import check_room, disk_bytes
from moe_replay.megatron.state_write import StateWrite, read_state, replica_group
from moe_replay.megatron.upstream.warnings import quiet_megatron

_WHOLE = re.compile(r"step-(\d{6,})")
_UNFINISHED = "unfinished-"
_POSITION_FILE = "position.json"
_FORMAT = CheckpointingConfig("torch_dist", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPosition:
    """The position of a run after a step: what a resumed run needs beside weights and optimizer."""

    step: int
    """Finished steps."""
    policy_version: int
    """Weight pushes that the engine has received."""
    next_prompt: int
    """Position of the next prompt in the prompt source."""
    identity: Mapping[str, Any]
    """What decides the results of the run: dotted key -> value, or digest of what it points to."""
    scheduler: Mapping[str, Any]
    """State of the learning-rate schedule."""
    evaluation_is_owed: bool = False
    """The run was stopped before it had evaluated this step."""
    guard: Mapping[str, Any] = field(default_factory=dict)
    """What the guard remembers of the last steps; empty without one."""
    best: Mapping[str, Any] = field(default_factory=dict)
    """``step`` and ``value`` of the best evaluation so far; empty without one."""
    draws: Mapping[str, int] = field(default_factory=dict)
    """Prompts drawn from each dataset of a mixture before ``next_prompt``; empty without one."""


class PendingCheckpoint:
    """A checkpoint that is being written, and is invisible until it is finished."""

    def __init__(
        self,
        *,
        position: RunPosition,
        unfinished: Path,
        state: StateWrite,
        shared_write: SharedWrite,
    ) -> None:
        """Nothing of ``state`` is written yet."""
        self.position, self.unfinished = position, unfinished
        self.state, self.shared_write = state, shared_write
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write weights and optimizer in a thread, as they are now, whatever happens to them."""
        self.state.copy()
        self._thread = threading.Thread(
            target=self.state.write, name="checkpoint-files", daemon=True
        )
        self._thread.start()

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until this rank has nothing left to write."""
        if self._thread is not None:
            self._thread.join()


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, path: Path, *, save_total_limit: int) -> None:
        """Use ``path``, keeping the newest ``save_total_limit`` checkpoints."""
        self.path = path
        self.save_total_limit = save_total_limit
        self._layout_is_checked = False

    def steps(self) -> list[int]:
        """Return the steps that have a whole checkpoint, oldest first."""
        if not self.path.is_dir():
            return []
        matches = (_WHOLE.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(
        self,
        actor: MegatronActor,
        position: RunPosition,
        *,
        beside: Sequence[Callable[[Path], None]] = (),
    ) -> None:
        """Write the checkpoint of ``position.step``; every rank calls this together.

        ``beside`` write more into its folder, one after the other on all ranks; none is collective.

        Raises:
            CheckpointError: when the disk is full or cannot be written; the previous checkpoint
                stays whole.
        """
        pending = self.begin(actor, position, beside=beside)
        pending.state.write()
        self.finish(pending)

    @quiet_megatron()
    def begin(
        self,
        actor: MegatronActor,
        position: RunPosition,
        *,
        beside: Sequence[Callable[[Path], None]] = (),
    ) -> PendingCheckpoint:
        """Begin as `save` does, and write everything but weights and optimizer; collective.

        Raises:
            CheckpointError: as `save`.
        """
        unfinished = self.path / f"{_UNFINISHED}step-{position.step:06d}"
        write = SharedWrite(self.folder(position.step))
        with self._cleaning_up(unfinished):
            all_ranks().raise_together(self._shortage() if _is_first_rank() else None)
            with write.part():
                if _is_first_rank():
                    shutil.rmtree(unfinished, ignore_errors=True)
                    unfinished.mkdir(parents=True)
            write.finish()
            state = StateWrite(
                _sharded_state(actor, is_loading=False),
                unfinished,
                write,
                # Which rank writes what does not change during a run.
                checks_layout=not self._layout_is_checked,
            )
            self._layout_is_checked = True
            for part in beside:
                with write.part():
                    part(unfinished)
                write.finish()
        return PendingCheckpoint(
            position=position, unfinished=unfinished, state=state, shared_write=write
        )

    @quiet_megatron()
    def finish(self, pending: PendingCheckpoint) -> None:
        """Wait until all ranks have written their files, and make the checkpoint visible.

        Collective.

        Raises:
            CheckpointError: as `save`.
        """
        pending.wait()
        write = pending.shared_write
        with self._cleaning_up(pending.unfinished):
            pending.state.finish()
            with write.part():
                if _is_first_rank():
                    save_config(_FORMAT, str(pending.unfinished))
                    position = json.dumps(asdict(pending.position), indent=1)
                    (pending.unfinished / _POSITION_FILE).write_text(position)
                    flush_folder(pending.unfinished)
                    self._publish(pending.unfinished, self.folder(pending.position.step))
            write.finish()
        if _is_first_rank():
            self._forget_old(best=pending.position.best.get("step"))
        all_ranks().barrier()

    @contextmanager
    def _cleaning_up(self, unfinished: Path) -> Iterator[None]:
        """Remove what a write that failed has left, and say what to do."""
        try:
            yield
        except CheckpointError as error:
            if _is_first_rank():
                # What a full disk holds of a checkpoint that nobody can load would keep it full.
                shutil.rmtree(unfinished, ignore_errors=True)
            raise CheckpointError(f"{error}; {self._advice()}") from error

    def _shortage(self) -> CheckpointError | None:
        """Return why the disk has no room for a checkpoint like the newest one."""
        try:
            for step in self.steps()[-1:]:
                size = disk_bytes(self.folder(step))
                check_room(self.path, size, what=f"what that of step {step} takes")
        except CheckpointError as error:
            return error
        return None

    def folder(self, step: int) -> Path:
        """Return where the checkpoint of ``step`` lies."""
        return self.path / f"step-{step:06d}"

    def position(self, step: int) -> RunPosition:
        """Read where the run stood at ``step``, without loading any weight."""
        path = self.folder(step) / _POSITION_FILE
        try:
            return RunPosition(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); the checkpoint was altered after it was written, or is of another release "
                "of moe-replay: remove its folder to resume from the one before"
            ) from error

    @quiet_megatron()
    def load(self, actor: MegatronActor, step: int) -> RunPosition:
        """Load weights, optimizer and schedule of ``step`` into ``actor``; all ranks call this.

        Raises:
            CheckpointError: when the checkpoint is not whole or belongs to another model.
        """
        folder, position = self.folder(step), self.position(step)
        try:
            state = read_state(_sharded_state(actor, is_loading=True), folder)
        except (
            OSError,
            RuntimeError,
            KeyError,
            dist_checkpointing.core.CheckpointingException,
        ) as error:
            raise CheckpointError(
                f"{folder} cannot be loaded: {error}; it was altered, or written for another model or layout"
            ) from error
        if actor.adapters is not None:
            actor.adapters.take(state["adapters"])
        else:
            for number, module in enumerate(actor.modules):
                unwrap(module).load_state_dict(state[f"model{number}"], strict=True)
        _load_optimizer(actor, state["optimizer"], position.scheduler)
        return position

    def remove_unfinished(self) -> None:
        """Delete what killed writers left; only while no other process writes here."""
        for folder in self.path.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def remove_all(self) -> None:
        """Delete every checkpoint, whole or unfinished."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _forget_old(self, *, best: int | None) -> None:
        for step in self.steps()[: -self.save_total_limit]:
            if step != best:
                shutil.rmtree(self.folder(step))

    def _publish(self, unfinished: Path, finished: Path) -> None:
        """Give a complete checkpoint its name; the old one of the same step goes after that."""
        replaced = finished.with_name(f"{_UNFINISHED}{finished.name}-replaced")
        if finished.exists():
            finished.rename(replaced)
        unfinished.rename(finished)
        flush_folder(self.path)
        shutil.rmtree(replaced, ignore_errors=True)

    def _advice(self) -> str:
        kept = self.steps()
        newest = (
            f"step {kept[-1]} is the newest whole checkpoint"
            if kept
            else "no checkpoint has been written yet"
        )
        return f"{newest}. Free some space, or lower checkpoint.save_total_limit, and start the same command again to resume"


def _load_optimizer(
    actor: MegatronActor, state: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> None:
    """Take up moments and step counts; rates, decay and schedule are those of the recipe.

    Without this the checkpoint's would be taken in silence, whatever the recipe says that is
    resumed with a change.
    """
    settings = [
        {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in actor.optimizer.param_groups
    ]
    actor.optimizer.load_state_dict(state)
    for group, values in zip(actor.optimizer.param_groups, settings, strict=True):
        group.update(values)
    actor.scheduler.override_opt_param_scheduler = True
    actor.scheduler.use_checkpoint_opt_param_scheduler = False
    actor.scheduler.load_state_dict(dict(scheduler))


def _is_first_rank() -> bool:
    return dist.get_rank() == 0


def _sharded_state(actor: MegatronActor, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gathered by gloo in the first replica's host memory; otherwise by the device, on every
        # rank.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": replica_group(),
    }
    state: dict[str, Any]
    if actor.adapters is not None:
        # What is frozen is read from the model's own checkpoint again.
        state = {"adapters": actor.adapters.sharded_state()}
    else:
        state = {
            f"model{number}": unwrap(module).sharded_state_dict(metadata=metadata)
            for number, module in enumerate(actor.modules)
        }
    optimizer = actor.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    parts = _optimizer_parts(optimizer)
    _give_one_step(parts)
    for part in parts:
        # Where another replica writes it. Megatron would warn that ranks differ in what is no
        # tensor.
        if part.get("param_state", {}) is None:
            del part["param_state"]
    state["optimizer"] = optimizer
    return state


def _optimizer_parts(state: dict[Any, Any]) -> list[dict[Any, Any]]:
    # A chain of one part, which is what a dense model has, is that part's own state.
    return [state] if "optimizer" in state else list(state.values())


def _give_one_step(parts: Sequence[dict[Any, Any]]) -> None:
    """Give every group of every part of an optimizer's sharded state the same step.

    Dense layers and experts have an optimizer part each, and all parts step together. On a pipeline
    stage without experts their part holds nothing and counts no steps, with torch's Adam as with
    Transformer Engine's. A checkpoint keeps the steps that the first rank knows: if its stage is
    one of those, a resume fails with torch's Adam, and with Transformer Engine's the experts of all
    other stages would begin at step 1 with old moments.

    Example:
        Steps ``3`` of the dense part and ``0`` of an empty one, which has never stepped, become
        ``3`` and ``3``.
    """
    groups = [group for part in parts for group in part["optimizer"]["param_groups"]]
    steps = [group["step"] for group in groups if group.get("step") is not None]
    for group in groups:
        if steps:
            group["step"] = max(steps)
        # An optimizer on the host keeps its classes there, which no safe loader accepts.
        for name in [name for name, value in group.items() if isinstance(value, type)]:
            del group[name]
