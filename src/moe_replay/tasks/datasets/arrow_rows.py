"""Rows of Parquet, CSV and Arrow files, and of hub datasets, as memory-mapped Arrow tables."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_replay.errors import RecipeError, shortened
from moe_replay.recipe.sections.locations import HUB
from moe_replay.tasks.datasets.cache import DatasetCache, entry_key

if TYPE_CHECKING:
    import pyarrow

_BATCH_ROWS = 2048


class ArrowRows:
    """The rows of an Arrow table."""

    def __init__(self, location: str, table: pyarrow.Table) -> None:
        self.names: Sequence[str] = tuple(table.schema.names)
        """Columns, in the table's order."""
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise RecipeError(
                f"dataset {location} has the column {shortened(twice)} more than once: rename one"
            )
        self._location = location
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def where(self, number: int) -> str:
        """Return file and index of a row."""
        return f"{self._location} row {number}"

    def read(self, number: int) -> Mapping[str, Any]:
        """Return the columns of a row."""
        return self._decode(number, 1)[0]

    def scan(self) -> Iterator[Mapping[str, Any]]:
        """Yield the columns of all rows in order."""
        for start in range(0, len(self), _BATCH_ROWS):
            yield from self._decode(start, _BATCH_ROWS)

    def _decode(self, start: int, count: int) -> list[Mapping[str, Any]]:
        try:
            return self._table.slice(start, count).to_pylist()
        except UnicodeDecodeError as error:
            raise RecipeError(
                f"{self.where(start)}, or one of the {count} rows from there on, holds text that is not UTF-8: {error}"
            ) from error


def open_arrow_rows(path: Path, *, cache: DatasetCache) -> ArrowRows:
    """Open a ``.parquet``, ``.csv`` or ``.arrow`` file; CSV columns are text, empty fields None.

    Single rows of Parquet and CSV cannot be read, so large files are converted once into Arrow
    files in the cache.

    Raises:
        RecipeError: it cannot be read.
    """
    import pyarrow

    try:
        if path.suffix == ".arrow":
            return ArrowRows(str(path), _mapped(path))
        if cache.is_worth_it([path]):
            entry = cache.entry(
                entry_key([path], "arrow"), lambda folder: _convert(path, folder, cache)
            )
            if entry is not None:
                return ArrowRows(str(path), _mapped(entry / "rows.arrow"))
        schema, batches, _ = _read_batches(path)
        return ArrowRows(str(path), pyarrow.Table.from_batches(list(batches), schema))
    except (OSError, pyarrow.ArrowException) as error:
        kind = {".parquet": "Parquet", ".csv": "CSV", ".arrow": "Arrow"}[path.suffix]
        raise RecipeError(
            f"dataset {path} is not a readable {kind} file: {str(error)[:500]}{_bad_line(path)}"
        ) from error


def read_hub_table(
    name: str, *, config: str | None, split: str
) -> tuple[pyarrow.Table, tuple[Path, ...]]:
    """Return the table of a hub dataset and its files, through the package ``datasets``.

    Raises:
        RecipeError: the package is missing, or cannot load the dataset.
    """
    folder = name.rpartition("/")[2]
    try:
        import datasets
    except ImportError:
        raise RecipeError(
            f"dataset {HUB}{name} needs the package datasets: pip install datasets. Or download it with `hf download "
            f"{name} --repo-type dataset --local-dir {folder}` and name the folder {folder}"
        ) from None
    try:
        dataset: Any = datasets.load_dataset(name, config, split=split)
    # A seam: reading a hub dataset raises errors of the network, of file formats and of its own.
    except Exception as error:
        given = f" (data.hub_config = {config!r})" if config else ""
        raise RecipeError(
            f"dataset {HUB}{name}, split {split}{given}, cannot be loaded: {type(error).__name__}: "
            f"{str(error)[:500]}. Without a network, download it elsewhere with `hf download {name} --repo-type dataset "
            f"--local-dir {folder}`, and name that folder"
        ) from error
    files = tuple(Path(file["filename"]) for file in dataset.cache_files)
    return dataset.with_format("arrow")[:] if not files else dataset.data, files


def _mapped(path: Path) -> pyarrow.Table:
    import pyarrow

    source = pyarrow.memory_map(str(path))
    with path.open("rb") as file:
        is_file_format = file.read(6) == b"ARROW1"
    reader = pyarrow.ipc.open_file if is_file_format else pyarrow.ipc.open_stream
    return reader(source).read_all()


def _convert(path: Path, folder: Path, cache: DatasetCache) -> None:
    import pyarrow

    schema, batches, total = _read_batches(path)
    done = 0
    with pyarrow.ipc.new_stream(str(folder / "rows.arrow"), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            done += batch.num_rows if path.suffix == ".parquet" else batch.nbytes
            cache.report(f"reading {path.name}", min(done, total), total)


def _read_batches(path: Path) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch], int]:
    """Return schema and batches of a file, and their rows (Parquet) or approximate bytes (CSV)."""
    import pyarrow.csv
    import pyarrow.parquet

    if path.suffix == ".parquet":
        file = pyarrow.parquet.ParquetFile(path)
        return file.schema_arrow, file.iter_batches(_BATCH_ROWS), file.metadata.num_rows
    names = _csv_header(path)
    reader = pyarrow.csv.open_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pyarrow.string() for name in names},
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            null_values=[""],
        ),
    )
    return reader.schema, iter(reader), path.stat().st_size


def _csv_header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file), [])
    except UnicodeDecodeError as error:
        raise OSError(f"its first line is not UTF-8: {error}") from error


def _bad_line(path: Path) -> str:
    """Name the first line that is not UTF-8, a common fault that the CSV reader does not name."""
    if path.suffix == ".csv":
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError:
                    return f" (line {number} is not UTF-8: save the file as UTF-8)"
    return ""
