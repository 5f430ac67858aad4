"""What each column of a row is: prompt, chat template input or reward input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_replay.errors import RecipeError, UnsupportedError, shortened
from moe_replay.recipe.sections.run import DataSection
from moe_replay.tasks.chat_messages import (
    MEDIA_COLUMNS,
    check_arguments,
    checked_tools,
    without_nulls,
)
from moe_replay.tasks.datasets.tables import Row, Table, column_value, require_column
from moe_replay.tasks.encoding import PromptInput
from moe_replay.tasks.rewards.functions import OWN_NAMES

TOOLS = "tools"
"""Column with the tools of a row."""
TEMPLATE_ARGUMENTS = "chat_template_kwargs"
"""Column with template arguments of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """Reads the rows of one table. Make one with `read_rows_of`."""

    renamed: Mapping[str, str]
    """Name for rewards and chat template -> column or dotted path."""
    prompt_columns: tuple[str, ...]
    """Columns, or paths, with prompts; the first filled one counts."""
    names: tuple[str, ...]
    """Columns that rewards get."""
    nulls_are_absent: bool
    """As `Table.nulls_are_absent`."""

    def prompt(self, row: Row) -> PromptInput:
        """Return the columns of a row that rewards get, and its chat template input.

        Raises:
            RecipeError: the row has no prompt, or its tools or template arguments are malformed.
            UnsupportedError: it has an image, a sound or a video.
        """
        values = {n: column_value(row.columns, self.renamed.get(n, n)) for n in self.names}
        found = (column_value(row.columns, path) for path in self.prompt_columns)
        prompt = next((value for value in found if value is not None), None)
        if prompt is None:
            raise RecipeError(
                f"{row.where}: the prompt is None: column {' and '.join(map(repr, self.prompt_columns))} is empty in "
                "this row but not in others: fill or remove the row"
            )
        media = [name for name in self.names if name in MEDIA_COLUMNS and values[name]]
        if media:
            raise UnsupportedError(
                f"{row.where}: column {shortened(media)} holds media, but the trainer reads only text: choose "
                f"another dataset, or set data.drop_columns = {media} if prompts and rewards do not need it"
            )
        tools, arguments = values.get(TOOLS), values.get(TEMPLATE_ARGUMENTS)
        if self.nulls_are_absent:
            prompt, tools, arguments = map(without_nulls, (prompt, tools, arguments))
        return PromptInput(
            where=row.where,
            index=row.number,
            prompt=prompt,
            columns=values,
            tools=checked_tools(tools, row.where),
            arguments=check_arguments(arguments, f"{row.where}: column {TEMPLATE_ARGUMENTS}"),
        )


def read_rows_of(table: Table, data: DataSection) -> RowReader:
    """Decide what each column of a table is for.

    Raises:
        RecipeError: a column named in the recipe is missing, or a column would be hidden from
            rewards.
    """
    prompts = [path for path in (data.messages_column, data.prompt_column) if table.has(path)]
    if not prompts:
        raise RecipeError(
            f"{table.location} has neither a column {data.messages_column!r} nor {data.prompt_column!r}; its columns are "
            f"{shortened(table.names)}: name the one with the prompts in data.prompt_column or data.messages_column"
        )
    for name, path in data.columns.items():
        require_column(table, path, f"data.columns.{name}")
    for name in sorted(data.drop_columns):
        require_column(table, name, "data.drop_columns")
    own = [name for name in table.names if name not in {prompts[0], *data.drop_columns}]
    names = tuple(dict.fromkeys([*own, *data.columns]))
    hidden = sorted(OWN_NAMES & set(names))
    if hidden:
        raise RecipeError(
            f"{table.location} has the column {shortened(hidden)}, but reward functions get something else under that name: "
            f"rename it (data.columns gives a column a second name), and set data.drop_columns = {hidden}"
        )
    return RowReader(
        renamed=data.columns,
        prompt_columns=tuple(prompts),
        names=names,
        nulls_are_absent=table.nulls_are_absent,
    )
