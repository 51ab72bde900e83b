"""Rows and cells of files and of in-memory tables, each with its place; the only reader of Parquet tables.

pandas, datasets and pyarrow are recognised by duck typing, never imported. polars expands ``*``, ``?`` and ``[…]`` in paths, takes ``~``
for the home folder and ``file:`` for a URL, and makes columns of folders named ``name=value``: no other module reads tables with it.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import polars as pl

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.settings import check, plain, shown_with_kind
from searchr1_async.errors import ConfigurationError

_MAGIC = b"PAR1"
"""First and last bytes of every Parquet file."""
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".parquet")
"""Suffixes of files that always hold rows, used to search a folder; JSON and CSV files may hold anything."""
FORMATS = "*.jsonl, *.json, *.csv, *.tsv (each also with .gz) or *.parquet"
"""For messages."""

Value = TypeVar("Value")
Row = tuple[str, Any]
"""Place of a row (``"line 3"``, ``"row 2"``), and its dict or the object given in place of one."""
Columns = Mapping[str, str]
"""Maps the package's column names to the source's: ``{"question": "q"}``."""

_SLICE = 10_000
"""Rows converted at a time."""
_JSON = json.JSONDecoder(parse_constant={"NaN": None, "Infinity": float("inf"), "-Infinity": float("-inf")}.__getitem__)
"""pandas writes missing values as NaN."""


class ArrowTable(Protocol):
    """A table of another library with Arrow's interface (pyarrow, polars, DuckDB)."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


class TableError(Exception):
    """A table cannot be read. The message names the place."""


class LayoutError(Exception):
    """What is wrong with a row; a predicate whose subject is the row's place."""


@contextmanager
def table_errors(kind: type[ConfigurationError]) -> Iterator[None]:
    """Raises a :class:`TableError` of the block as this error."""
    try:
        yield
    except TableError as error:
        raise kind(str(error)) from error


def read_parquet(path: Path, columns: Sequence[str] | None = None, n_rows: int | None = None) -> pl.DataFrame:
    """Reads one file, or some of its columns and first rows.

    Raises:
        OSError: it does not exist or cannot be read.
        polars.exceptions.PolarsError: it is not a complete Parquet file, or lacks a column.
    """
    names = None if columns is None else list(columns)
    return pl.read_parquet(_one_file(path), columns=names, n_rows=n_rows, glob=False, hive_partitioning=False)


def scan_parquet(path: Path) -> pl.LazyFrame:
    """Scans one file lazily; on collection it raises as :func:`read_parquet`, and OSError at once for a folder."""
    return pl.scan_parquet(_one_file(path), glob=False, hive_partitioning=False)


def scan_rows(paths: Sequence[Path], schema: pl.Schema) -> pl.LazyFrame:
    """Scans files of one schema lazily, in order; what a file of an earlier version lacks is null. Raises as :func:`read_parquet`."""
    if not paths:
        return pl.LazyFrame(schema=schema)
    return pl.scan_parquet(
        [path.absolute() for path in paths],
        glob=False,
        hive_partitioning=False,
        schema=dict(schema),
        missing_columns="insert",
        cast_options=pl.ScanCastOptions(missing_struct_fields="insert"),
    )


def is_whole(path: Path) -> bool:
    """Whether a file starts and ends as a Parquet file, so is neither empty nor truncated. Raises OSError."""
    with path.open("rb") as file:
        begins = file.read(len(_MAGIC))
        if file.seek(0, os.SEEK_END) < 3 * len(_MAGIC):
            return False
        file.seek(-len(_MAGIC), os.SEEK_END)
        return begins == _MAGIC == file.read(len(_MAGIC))


def _one_file(path: Path) -> Path:
    """The absolute path, which polars takes literally."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a Parquet file")
    return path.absolute()


def is_missing(value: Any) -> bool:
    """Whether a cell is None, NaN of any type, ``pandas.NA`` or ``pandas.NaT``."""
    if value is None or type(value).__name__ == "NAType":  # which has no truth value
        return True
    differs = value != value
    return isinstance(differs, bool | np.bool_) and bool(differs)


def plain_cell(value: Any) -> Any:
    """Converts a cell, recursively, to plain Python types; missing values become None."""
    if isinstance(value, str):
        return value
    if is_missing(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain_cell(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_cell(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return plain_cell(value.tolist())
    if isinstance(value, np.generic):
        # A float goes through str(): the float of a 32-bit 0.1 would be 0.10000000149011612.
        return float(str(value)) if isinstance(value, np.floating) else value.item()
    return value


def number_text(value: Any) -> str | None:
    """A number without exponent or trailing zeros: 1e-05 is "0.00001"; None for bool, infinity and non-numbers."""
    found = plain(plain_cell(value))
    if isinstance(found, bool) or not isinstance(found, int | float | Decimal):
        return None
    if isinstance(found, int):
        return str(found)
    number = Decimal(str(found))
    return f"{(number + 0).normalize():f}" if number.is_finite() else None


def name_text(value: Any) -> str | None:
    """An id or name: text, a number by :func:`number_text`, or "" if missing; None for other types."""
    if isinstance(value, str):
        return value
    return "" if is_missing(value) else number_text(value)


def find_file(source: str | Path, argument: str) -> Path | None:
    """The file that an argument names; None for another name. Raises TableError: a folder, or a missing file."""
    if not str(source).strip():
        return None
    path = absolute_path(source, argument)
    if path.is_file():
        return path
    if path.is_dir():
        raise TableError(f"{path} is a folder: name a file in it")
    if _suffix(path) in _READERS and "@" not in str(source):  # with it, a file on the hub
        raise TableError(f"the {argument} file {path} does not exist")
    return None


def _suffix(path: Path) -> str:
    return "".join(path.name.lower().removesuffix(".gz").rpartition(".")[1:])


def read_rows(path: Path, columns: frozenset[str] | None = None) -> Iterator[Row]:
    """Rows in file order, in bounded memory, except JSON; of Parquet only these columns. Raises TableError for a corrupt file."""
    if (suffix := _suffix(path)) not in _READERS:
        raise TableError(f"{path} does not have a supported file extension: rename it to {FORMATS}, or convert it")
    try:
        if (reader := _READERS[suffix]) is None:
            yield from _parquet_rows(path, columns)
            return
        opener = gzip.open if path.suffix.lower() == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            yield from reader(path, file)  # pyright: ignore[reportArgumentType]  # both modes yield text
    except UnicodeDecodeError as error:
        raise TableError(f"{path} is not UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error, pl.exceptions.PolarsError) as error:
        raise TableError(f"{path} cannot be read: {error}") from error


def _jsonl_rows(path: Path, text: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(text, start=1):
        if line.strip():
            try:
                yield f"line {number}", _JSON.decode(line)
            except (ValueError, RecursionError) as error:
                raise TableError(f"{path}, line {number} is not JSON: {error}") from error


def _json_rows(path: Path, file: io.TextIOBase) -> Iterator[Row]:
    """Rows of a list of objects, or of JSONL with this suffix."""
    text = file.read()
    try:
        found = _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") != "Extra data":
            raise TableError(f"{path} is not JSON: {error}") from error
        yield from _jsonl_rows(path, text.split("\n"))
        return
    if not isinstance(found, list):
        raise TableError(
            f"{path} does not hold a list of rows: write a list of objects, one per row (pandas: to_json(orient='records'))"
        )
    yield from _numbered(found)


def _delimited_rows(path: Path, text: Iterable[str], delimiter: str) -> Iterator[Row]:
    """Cells are kept as text: nothing is parsed as a number or missing value."""
    # Strict quoting: in lenient mode, one stray quote swallows the rows after it.
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise TableError(f"{path} has a column twice in its first line: column names must be unique")
        for row in reader:
            if None in row or None in row.values():
                raise TableError(
                    f"{path}, line {reader.line_num} has not as many cells as the first line has columns: "
                    "quote cells that contain the delimiter or a line break"
                )
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise TableError(f"{path}, line {reader.reader.line_num} cannot be read: {error}") from error


_READERS: dict[str, Callable[[Path, io.TextIOBase], Iterator[Row]] | None] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": partial(_delimited_rows, delimiter=","),
    ".tsv": partial(_delimited_rows, delimiter="\t"),
    ".parquet": None,
}


def _parquet_rows(path: Path, columns: frozenset[str] | None) -> Iterator[Row]:
    frame = scan_parquet(path)
    if columns is not None:
        frame = frame.select([name for name in frame.collect_schema().names() if name in columns])
    start = 0
    while rows := frame.slice(start, _SLICE).collect().rows(named=True):
        yield from _numbered(rows, start + 1)
        start += len(rows)


def _numbered(rows: Iterable[Any], first: int = 1) -> Iterator[Row]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=first))


def memory_rows(source: Any) -> tuple[str, Callable[[], Iterator[Row]]]:
    """The kind of an in-memory table (``"frame"``, ``"dataset"`` or ``"rows"``), and what reads it from the start. Raises TableError."""
    if isinstance(source, pl.LazyFrame):
        source = source.collect()
    if all(hasattr(source, name) for name in ("iloc", "columns", "to_dict")):  # pandas
        kind, values = "frame", source.to_dict(orient="records")
    elif hasattr(source, "column_names") and hasattr(source, "features"):
        kind, values = "dataset", getattr(source, "with_format", lambda kind: source)(None)
    elif hasattr(source, "__arrow_c_stream__"):
        frame = pl.DataFrame(source)
        return "frame", lambda: _numbered(frame.iter_rows(named=True))
    elif isinstance(source, Iterable) and not isinstance(source, str | bytes | Mapping):
        kind, values = "rows", tuple(source)
    else:
        raise TableError(
            f"{shown_with_kind(source)} is not a table: pass a file name, a frame, a data set, or a list with a dict per row"
        )
    return kind, lambda: _numbered(map(plain_cell, values))


def read_values(
    source: str, rows: Iterable[Row], columns: Columns | None, known: Sequence[str], read: Callable[[Any], Value]
) -> Iterator[tuple[str, Value]]:
    """What ``read`` makes of each row, with its place.

    Args:
        source: origin of the rows, for messages.
        columns: renames columns of the source to the ``known`` names; replaces one that already has such a name.
        read: raises :class:`LayoutError` or :class:`~searchr1_async.errors.ConfigurationError`.

    Raises:
        TableError, ConfigurationError: a row cannot be used; ``columns`` is no dict of texts, or has an unknown key.
    """
    own_names = {theirs: own for own, theirs in check("columns", columns or {}, Mapping[str, str]).items()}
    if unknown := sorted(set(own_names.values()) - set(known)):
        raise TableError(
            f"columns has the key {unknown[0]!r}: the names of this package are {', '.join(known)}"
            f"{did_you_mean(unknown[0], known)}"
        )
    for number, (place, row) in enumerate(rows):
        try:
            renames = bool(own_names) and isinstance(row, dict)
            yield place, read(_renamed(row, own_names, is_first=number == 0) if renames else row)
        except LayoutError as error:
            raise TableError(f"{source}, {place} {error}") from None
        except ConfigurationError as error:
            raise TableError(f"{source}, {place}: {error}") from None


def _renamed(row: Mapping[str, Any], own_names: Mapping[str, str], *, is_first: bool) -> dict[str, Any]:
    if is_first and (missing := [name for name in own_names if name not in row]):
        raise LayoutError(f"lacks the column {missing[0]!r} that columns names: {names_in(row)}")
    replaced = {*own_names, *own_names.values()}
    kept = {name: value for name, value in row.items() if name not in replaced}
    return {own: row[name] for name, own in own_names.items() if name in row} | kept


def check_is_row(row: Any, own: str) -> None:
    """Raises LayoutError for anything but a dict; ``own`` names the class that is accepted too."""
    if not isinstance(row, Mapping):
        raise LayoutError(f"is a {type(row).__name__}: expected a dict with a value per column, or a {own}")


def name_in(row: Mapping[str, Any], column: str) -> str:
    """An id or name in a row; "" if missing. Raises LayoutError."""
    found = name_text(row.get(column))
    if found is None:
        raise LayoutError(f"has a {column!r} that is {shown_with_kind(row[column])}: use text or a number")
    return found


def names_in(row: Mapping[str, Any]) -> str:
    """The columns of a row, for messages."""
    return f"its columns are {', '.join(map(str, row))}"


def missing_column(name: str, row: Mapping[str, Any]) -> str:
    """The message for a row without a column, after "has no …"."""
    return f"{name!r}: {names_in(row)}{did_you_mean(name, row)}; name yours with columns={{{name!r}: '…'}}"


def did_you_mean(name: str, there: Iterable[Any]) -> str:
    """A suggestion among the available names, to append to a message; empty if none is similar."""
    lowered = {str(each).lower(): str(each) for each in there}
    found = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.7)
    return f" (did you mean {lowered[found[0]]!r}?)" if found else ""
