"""Prompts of a file by position: surveyed once before training, read and rendered on demand."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int32, Int64

from moe_replay.errors import RecipeError
from moe_replay.recipe.sections.mixture import CurriculumSection
from moe_replay.tasks.datasets.cache import DatasetCache, entry_key
from moe_replay.tasks.datasets.curriculum import Curriculum, number_in, open_curriculum
from moe_replay.tasks.datasets.row_reading import RowReader, read_rows_of
from moe_replay.tasks.datasets.tables import Row, Table, column_value, open_table, require_column
from moe_replay.tasks.encoding import Prompt, PromptEncoder

_BATCH_ROWS = 512
# What is kept of a dataset: the prompts of a band, and the epochs between which a step may lie.
_NUM_ORDERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Facts about all rows of a dataset; an unusable row raises."""

    lengths: Int32[np.ndarray, " rows"]
    """``[rows]`` length of each prompt in tokens, before any is cut."""
    gaps: Mapping[str, tuple[int, int]]
    """Column -> how many rows lack it, and the index of the first."""
    num_continued: int
    """Prompts that end with an assistant message that the model continues."""
    values: Float64[np.ndarray, " rows"] | None = None
    """``[rows]`` number of each row that a curriculum goes by; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePrompts:
    """The prompts of a dataset, in a different order each epoch.

    Make one with `open_file_prompts`.
    """

    table: Table
    """Its rows."""
    reader: RowReader
    """The role of each column."""
    encoder: PromptEncoder
    """Turns prompts into tokens."""
    survey: Survey
    """Facts about all rows."""
    rows: Int64[np.ndarray, " prompts"]
    """Indices of the rows that are short enough."""
    shuffle_seed: int | None
    """Seed of the order; None keeps the file's order."""
    held_out: bool
    """Whether positions end at the last row instead of starting a new epoch."""
    curriculum: Curriculum | None = None
    """Which prompts a step draws from, and in which order; None for all of them."""
    _orders: dict[tuple[int, int | None], Int64[np.ndarray, " n"]] = field(default_factory=dict)
    """Band and epoch -> indices of prompts in this order, of the last ones that were asked for."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of the rows."""
        return self.table.files

    @property
    def num_prompts(self) -> int | None:
        """Number of rows that are short enough."""
        return len(self.rows)

    @property
    def num_deleted(self) -> int:
        """Rows that are omitted because they are too long."""
        return self._num_long * (self.encoder.data.truncation == "delete")

    @property
    def num_cut(self) -> int:
        """Prompts that lose tokens at their start."""
        return self._num_long * (self.encoder.data.truncation == "left")

    @property
    def _num_long(self) -> int:
        return int((self.survey.lengths > self.encoder.data.max_prompt_length).sum())

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns that rewards get."""
        return frozenset(self.reader.names)

    def gap(self, column: str) -> str | None:
        """Say how many rows lack a column, and where the first is; None if all have it."""
        if column not in self.survey.gaps:
            return None
        count, first = self.survey.gaps[column]
        return f"{count} of {len(self.survey.lengths)} rows have no {column} (the first is {self.table.row(first).where})"

    def notes(self) -> Iterator[str]:
        """Yield notes about the prompts for the user."""
        limit = self.encoder.data.max_prompt_length
        if self.num_deleted:
            yield f"{self.num_deleted} prompts are longer than data.max_prompt_length = {limit} tokens and are omitted"
        if self.num_cut:
            chat = ", and with them the beginning of the chat (its markers, a system message)"
            yield (
                f"{self.num_cut} prompts are longer than data.max_prompt_length = {limit} tokens and lose their first tokens"
                + chat * self.encoder.has_template
            )
        if self.survey.num_continued:
            yield (
                f"{self.survey.num_continued} prompts end with an assistant message, which the model continues; if it is "
                "a reference answer, set data.final_assistant_message = 'drop'"
            )

    def at(self, position: int, count: int, *, step: int = 1) -> list[Prompt]:
        """Return the prompts from ``position`` on."""
        assert not self.held_out or position + count <= len(self.rows)
        band = 0 if self.curriculum is None else self.curriculum.band_of(step)
        num_chosen = len(self._order(band, None))
        found: list[Prompt] = []
        while len(found) < count:
            epoch, first = divmod(position + len(found), num_chosen)
            order = self._order(band, epoch)[first : first + count - len(found)]
            found += [self._prompt(int(index)) for index in order]
        return found

    def _order(self, band: int, epoch: int | None) -> Int64[np.ndarray, " n"]:
        """Return indices of the prompts of a band, in the order of an epoch or None for the file's.

        Each order is made once: shuffling and sorting take a second a million rows.
        """
        key = band, epoch
        # The one that was asked for last is last, and the first goes.
        order = self._orders.pop(key, None)
        self._orders[key] = self._made_order(band, epoch) if order is None else order
        while len(self._orders) > _NUM_ORDERS:
            del self._orders[next(iter(self._orders))]
        return self._orders[key]

    def _made_order(self, band: int, epoch: int | None) -> Int64[np.ndarray, " n"]:
        if epoch is None:
            every = np.arange(len(self.rows))
            return every if self.curriculum is None else self.curriculum.chosen(band)
        chosen = self._order(band, None)
        if self.shuffle_seed is not None:
            chosen = chosen[_shuffled(len(chosen), self.shuffle_seed, epoch)]
        return chosen if self.curriculum is None else self.curriculum.ordered(chosen)

    def _prompt(self, index: int) -> Prompt:
        row = self.table.row(int(self.rows[index]))
        prompt = self.encoder.encode(self.reader.prompt(row))
        if prompt is None:
            raise RecipeError(
                f"{row.where}: the prompt has more than data.max_prompt_length = {self.encoder.data.max_prompt_length} tokens, "
                "unlike when the dataset was opened: do not change the file during a run"
            )
        if self.curriculum is None:
            return prompt
        return replace(prompt, difficulty=float(self.curriculum.values[index]))


def _shuffled(num_rows: int, seed: int, epoch: int) -> Int64[np.ndarray, " rows"]:
    order = list(range(num_rows))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return np.array(order, dtype=np.int64)


def open_file_prompts(
    location: str | Path,
    encoder: PromptEncoder,
    *,
    split: str = "train",
    shuffle_seed: int | None = None,
    max_prompts: int | None = None,
    held_out: bool = False,
    cache: DatasetCache | None = None,
    curriculum: CurriculumSection | None = None,
) -> FilePrompts:
    """Open a dataset, a file, a folder or ``hf:ORG/NAME``, and check every prompt in it.

    Raises:
        RecipeError: the dataset is missing, empty or malformed, has no prompt column, or a prompt
            is unusable.
    """
    cache = cache or DatasetCache(None)
    encoder.check()
    data = encoder.data
    table = open_table(str(location), split=split, hub_config=data.hub_config, cache=cache)
    reader = read_rows_of(table, data)
    column = None
    if curriculum is not None:
        column = reader.renamed.get(curriculum.column, curriculum.column)
        require_column(table, column, "curriculum.column")
    # If long prompts are deleted, which ones come first is known only after measuring all.
    limit = None if data.truncation == "delete" else max_prompts
    survey = _kept_survey(table, reader, encoder, limit, cache, column)
    kept = np.arange(len(survey.lengths))
    if data.truncation == "delete":
        kept = kept[survey.lengths <= data.max_prompt_length]
    if not len(kept):
        raise RecipeError(
            f"{table.location}: all {len(table)} prompts are longer than data.max_prompt_length = "
            f"{data.max_prompt_length} tokens and were deleted: raise the limit, or set data.truncation to 'left'"
        )
    opened = None
    if curriculum is not None:
        assert survey.values is not None
        opened = open_curriculum(curriculum, survey.values[kept[:max_prompts]], table.location)
    return FilePrompts(
        table=table,
        reader=reader,
        encoder=encoder,
        survey=survey,
        rows=kept[:max_prompts],
        shuffle_seed=shuffle_seed,
        held_out=held_out,
        curriculum=opened,
    )


def _kept_survey(
    table: Table,
    reader: RowReader,
    encoder: PromptEncoder,
    limit: int | None,
    cache: DatasetCache,
    column: str | None,
) -> Survey:
    is_worth_it = bool(table.files) and cache.is_worth_it(table.files, num_rows=len(table))
    digest = encoder.digest() if is_worth_it else None
    if digest is not None:
        used = [reader.names, reader.prompt_columns, sorted(reader.renamed.items()), limit]
        used += [] if column is None else [column]
        key = entry_key(table.files, "survey", table.location, json.dumps(used), digest)
        entry = cache.entry(
            key,
            lambda folder: _write_survey(
                folder, _survey(table, reader, encoder, limit, cache, column)
            ),
        )
        if entry is not None:
            return _read_survey(entry)
    return _survey(table, reader, encoder, limit, cache, column)


def _survey(
    table: Table,
    reader: RowReader,
    encoder: PromptEncoder,
    limit: int | None,
    cache: DatasetCache,
    column: str | None,
) -> Survey:
    total = len(table) if limit is None else min(limit, len(table))
    lengths = np.zeros(total, dtype=np.int32)
    values = None if column is None else np.zeros(total)
    gaps: dict[str, tuple[int, int]] = {}
    continued = done = 0
    for rows in _batches(islice(table.scan(), total)):
        prompts = [reader.prompt(row) for row in rows]
        for prompt in prompts:
            for name, value in prompt.columns.items():
                if value is None:
                    count, first = gaps.get(name, (0, prompt.index))
                    gaps[name] = (count + 1, first)
        lengths[done : done + len(rows)], with_prefill = encoder.measure(prompts)
        continued += with_prefill
        if values is not None and column is not None:
            values[done : done + len(rows)] = [
                number_in(column_value(row.columns, column), column, row.where) for row in rows
            ]
        done += len(rows)
        cache.report(f"measuring the prompts of {table.location}", done, total)
    return Survey(lengths=lengths, gaps=gaps, num_continued=continued, values=values)


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield batch


def _write_survey(folder: Path, survey: Survey) -> None:
    np.save(folder / "lengths.npy", survey.lengths)
    if survey.values is not None:
        np.save(folder / "values.npy", survey.values)
    found = {"gaps": survey.gaps, "num_continued": survey.num_continued}
    (folder / "found.json").write_text(json.dumps(found))


def _read_survey(folder: Path) -> Survey:
    found = json.loads((folder / "found.json").read_text())
    values = folder / "values.npy"
    return Survey(
        values=np.load(values, mmap_mode="r") if values.exists() else None,
        lengths=np.load(folder / "lengths.npy", mmap_mode="r"),
        gaps={name: tuple(gap) for name, gap in found["gaps"].items()},
        num_continued=found["num_continued"],
    )
