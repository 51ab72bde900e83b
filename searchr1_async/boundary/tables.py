"""Rows and cells of files and of in-memory tables, each with its place; the only reader of Parquet tables.

Files are JSONL, JSON, CSV, TSV or Parquet. In-memory tables are polars and pandas frames, Hugging Face data sets, Arrow tables, and
iterables of dicts. pandas, datasets and pyarrow are recognised by duck typing, never imported.

polars expands ``*``, ``?`` and ``[…]`` in paths, treats ``~`` as the home folder and ``file:`` as a URL, reads all files of a folder,
and makes columns of folders named ``name=value``; so no other module reads tables with polars.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from searchr1_async.boundary.settings import plain, shown, shown_with_kind

_MAGIC = b"PAR1"
"""First and last bytes of every Parquet file."""
_MISSING = frozenset({"NAType", "NaTType"})
"""Types of pandas' missing values, which do not support comparison."""
_JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_PARQUET_SUFFIXES = (".parquet",)
TABLE_SUFFIXES = (*_JSONL_SUFFIXES, *_PARQUET_SUFFIXES)
"""Suffixes of files that always hold rows, used to search a folder; JSON and CSV files may hold anything."""
_JSON_SUFFIXES = (".json", ".json.gz")
_CSV_SUFFIXES = (".csv", ".csv.gz")
_TSV_SUFFIXES = (".tsv", ".tsv.gz")
FORMATS = "*.jsonl, *.json, *.csv, *.tsv (each also with .gz) or *.parquet"
"""For messages."""

Row = tuple[str, dict[str, Any]]
"""Place of a row (``"line 3"``, ``"row 2"``) and its contents."""

Columns = Mapping[str, str]
"""Maps the package's column names to the source's: ``{"question": "q"}``."""

_SLICE = 10_000
"""Rows converted at a time."""
_JSON = json.JSONDecoder(parse_constant={"NaN": None, "Infinity": float("inf"), "-Infinity": float("-inf")}.__getitem__)
"""pandas writes missing values as NaN."""


def read_parquet(path: Path, columns: Sequence[str] | None = None, n_rows: int | None = None) -> pl.DataFrame:
    """Reads one file.

    Args:
        columns: columns to read; None for all.
        n_rows: maximum rows, from the start; None for all.

    Raises:
        OSError: it does not exist or cannot be read.
        polars.exceptions.PolarsError: it is not a complete Parquet file, or lacks a column.
    """
    names = None if columns is None else list(columns)
    return pl.read_parquet(_one_file(path), columns=names, n_rows=n_rows, glob=False, hive_partitioning=False)


def scan_parquet(path: Path) -> pl.LazyFrame:
    """Scans one file lazily.

    Raises:
        OSError: it is a folder.
        OSError, polars.exceptions.PolarsError: on collection; see :func:`read_parquet`.
    """
    return pl.scan_parquet(_one_file(path), glob=False, hive_partitioning=False)


def scan_rows(paths: Sequence[Path], schema: pl.Schema) -> pl.LazyFrame:
    """Scans files of one schema lazily, in order; without files, an empty frame.

    Columns and struct fields that a file of an earlier version lacks are null.

    Raises:
        OSError, polars.exceptions.PolarsError: on collection; see :func:`read_parquet`.
    """
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
    """Whether a file starts and ends as a Parquet file, so is neither empty, truncated nor of another type.

    Cheap; a scan would fail only on collection.

    Raises:
        OSError: it does not exist or cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < 3 * len(_MAGIC):
            return False
        file.seek(0)
        begins = file.read(len(_MAGIC))
        file.seek(-len(_MAGIC), os.SEEK_END)
        return begins == _MAGIC == file.read(len(_MAGIC))


def _one_file(path: Path) -> Path:
    """The absolute path, which polars takes literally."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a Parquet file")
    return path.absolute()


def is_missing(value: Any) -> bool:
    """Whether a cell is None, NaN of any type, ``pandas.NA`` or ``pandas.NaT``."""
    if value is None:
        return True
    if isinstance(value, str):
        return False
    if type(value).__name__ in _MISSING:
        return True
    found = plain(value)
    return isinstance(found, float | Decimal) and found != found


def plain_cell(value: Any) -> Any:
    """Converts a cell, recursively, to plain Python types; missing values become None."""
    if value is None or isinstance(value, str):
        return value
    if is_missing(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain_cell(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_cell(inner) for inner in value]
    if type(value).__module__ == "numpy" and callable(tolist := getattr(value, "tolist", None)):
        # Scalars go through str(): float() of a 32-bit 0.1 would be 0.10000000149011612.
        return plain_cell(tolist()) if getattr(value, "shape", ()) else _plain_scalar(value)
    return value


def number_text(value: Any) -> str | None:
    """A number without exponent or trailing zeros: 1990.0 is "1990", 1e-05 is "0.00001". None for bool, infinity and non-numbers."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, Real | Decimal):
        return None
    if isinstance(found, int):
        return str(found)
    try:
        number = Decimal(str(value if type(value).__module__ == "numpy" else found))
    except ArithmeticError:  # a fraction
        number = Decimal(repr(float(found)))
    if not number.is_finite():
        return None
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def name_text(value: Any) -> str | None:
    """An id or name: text, a number by :func:`number_text`, or "" if missing; None for other types."""
    if isinstance(value, str):
        return value
    return "" if is_missing(value) else number_text(value)


def _plain_scalar(value: Any) -> Any:
    found = plain(value)
    return float(str(value)) if isinstance(found, float) else found


class ArrowTable(Protocol):
    """A table of another library with Arrow's interface (pyarrow, polars, DuckDB)."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


class UnreadableFileError(Exception):
    """Rows cannot be read. The message names the place; callers turn it into their own error."""


def is_data_file(path: Path) -> bool:
    """Whether a file's name has a supported suffix."""
    suffixes = (*TABLE_SUFFIXES, *_JSON_SUFFIXES, *_CSV_SUFFIXES, *_TSV_SUFFIXES)
    return path.name.lower().endswith(suffixes)


def read_rows(path: Path, columns: frozenset[str] | None = None) -> Iterator[Row]:
    """Rows in file order, in bounded memory, except JSON.

    Args:
        columns: columns to read from Parquet, if they exist.

    Raises:
        UnreadableFileError: an unsupported format, or a corrupt file.
    """
    name = path.name.lower()
    if name.endswith(_PARQUET_SUFFIXES):
        yield from _parquet_rows(path, columns)
    elif name.endswith(_JSONL_SUFFIXES):
        with _opened(path) as text:
            yield from _jsonl_rows(path, text)
    elif name.endswith(_JSON_SUFFIXES):
        with _opened(path) as text:
            yield from _json_rows(path, text.read())
    elif name.endswith((*_CSV_SUFFIXES, *_TSV_SUFFIXES)):
        with _opened(path) as text:
            yield from _delimited_rows(path, text, "\t" if name.endswith(_TSV_SUFFIXES) else ",")
    else:
        raise UnreadableFileError(
            f"{path} does not have a supported file extension: rename it to {FORMATS}, or convert it"
        )


@contextmanager
def _opened(path: Path) -> Iterator[io.TextIOBase]:
    try:
        opener = gzip.open if path.suffix.lower() == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as text:
            yield text  # pyright: ignore[reportReturnType]  # both modes yield text
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"{path} is not UTF-8 text: {error}") from error
    except (OSError, EOFError) as error:
        raise UnreadableFileError(f"{path} cannot be read: {error}") from error


def _jsonl_rows(path: Path, text: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(text, start=1):
        if line.strip():
            try:
                row = _JSON.decode(line)
            except (ValueError, RecursionError) as error:
                raise UnreadableFileError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UnreadableFileError(f"{path}, line {number} is not a JSON object but {type(row).__name__}")
            yield f"line {number}", row


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    """Rows of a list of objects, of an object with exactly one such list, or of JSONL with this suffix."""
    start = len(text) - len(text.lstrip())
    try:
        found, end = _JSON.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(f"{path} is not JSON: {error}") from error
    if text[end:].strip():
        yield from _jsonl_rows(path, text.split("\n"))
        return
    if isinstance(found, dict):
        lists = [inner for inner in found.values() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
        found = lists[0] if len(lists) == 1 else [found] if not lists and not _is_by_column(found) else None
    if not isinstance(found, list):
        raise UnreadableFileError(
            f"{path} does not hold a list of rows: write a list of objects, one per row (pandas: to_json(orient='records'))"
        )
    for number, row in enumerate(found, start=1):
        if not isinstance(row, dict):
            raise UnreadableFileError(f"{path}, row {number} is not a JSON object but {type(row).__name__}")
        yield f"row {number}", row


def _is_by_column(found: Mapping[str, Any]) -> bool:
    """Whether it is pandas' default layout: ``{"question": {"0": …, "1": …}}``."""
    return bool(found) and all(isinstance(column, dict) and "0" in column for column in found.values())


def _delimited_rows(path: Path, text: Iterable[str], delimiter: str) -> Iterator[Row]:
    """Cells are kept as text: nothing is parsed as a number or missing value."""
    # Strict quoting: in lenient mode, one stray quote swallows the rows after it.
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    line = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise UnreadableFileError(
                f"{path} has the column {twice!r} twice in its first line: column names must be unique"
            )
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                if len(cells) != len(header):
                    raise UnreadableFileError(
                        f"{path}, line {line} has {len(cells)} cells, but the first line has {len(header)} columns: "
                        "quote cells that contain the delimiter or a line break"
                    )
                yield f"line {line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        kind = "TSV" if delimiter == "\t" else "CSV"
        raise UnreadableFileError(f"{path}, line {line} cannot be read as {kind}: {error}") from error


def _parquet_rows(path: Path, columns: frozenset[str] | None) -> Iterator[Row]:
    try:
        frame = scan_parquet(path)
        schema = frame.collect_schema()
        if columns is not None:
            frame = frame.select([name for name in schema.names() if name in columns])
        start = 0
        while True:
            rows = frame.slice(start, _SLICE).collect()
            for number, row in enumerate(rows.iter_rows(named=True), start=start + 1):
                yield f"row {number}", row
            start += rows.height
            if rows.height < _SLICE:
                return
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UnreadableFileError(f"{path} cannot be read as Parquet: {error}") from error


class MemoryRows:
    """The rows (or values) of an in-memory table, repeatable.

    Args:
        source: a frame, a data set, an Arrow table, or an iterable of rows; an iterator is consumed here.

    Raises:
        UnreadableFileError: none of these.
    """

    def __init__(self, source: object) -> None:
        self.kind = "frame"
        """``"frame"``, ``"dataset"`` or ``"rows"``."""
        self._source: Any = source
        self._is_pandas = all(hasattr(source, name) for name in ("iloc", "columns", "to_dict"))
        if isinstance(source, pl.LazyFrame):
            self._source = source.collect()
        elif isinstance(source, pl.DataFrame):
            pass
        elif self._is_pandas:
            names = list(self._source.columns)
            if len(set(names)) < len(names):
                raise UnreadableFileError(f"the frame has duplicate column names: {', '.join(map(str, names))}")
        elif hasattr(source, "column_names") and hasattr(source, "features") and isinstance(source, Iterable):
            self.kind = "dataset"
            self._source = self._source.with_format(None) if hasattr(source, "with_format") else source
        elif hasattr(source, "__arrow_c_stream__"):
            self._source = pl.DataFrame(self._source)
        elif isinstance(source, Iterable) and not isinstance(source, str | bytes | Mapping):
            self.kind = "rows"
            self._source = tuple(source)
        else:
            raise UnreadableFileError(
                f"{shown_with_kind(source)} is not a table: pass a file name, a frame, a data set, or a list with a dict per row"
            )

    @property
    def name(self) -> str:
        """For messages."""
        return f"the {self.kind}"

    def first(self) -> Any:
        """The first value; None if empty."""
        return next(self._values(), None)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Place and value of each row; the value is a dict if the source has rows."""
        for number, value in enumerate(self._values(), start=1):
            yield f"row {number}", value

    def rows(self) -> Iterator[Row]:
        """Like iteration, but only dicts.

        Raises:
            UnreadableFileError: a value is not a dict.
        """
        for place, value in self:
            if not isinstance(value, dict):
                raise UnreadableFileError(f"{self.name}, {place} is a {type(value).__name__}: expected a dict per row")
            yield place, value

    def _values(self) -> Iterator[Any]:
        if isinstance(self._source, pl.DataFrame):
            yield from self._source.iter_rows(named=True)
        elif self._is_pandas:
            for start in range(0, len(self._source), _SLICE):
                for row in self._source.iloc[start : start + _SLICE].to_dict(orient="records"):
                    yield plain_cell(row)
        else:
            for value in self._source:
                yield plain_cell(value) if isinstance(value, Mapping) else value


def renamed(rows: Iterable[Row], columns: Columns | None, known: Sequence[str], source: str | Path) -> Iterator[Row]:
    """Renames the columns of rows to the package's names.

    Args:
        columns: ``{"question": "q"}``; replaces a source column that already has the package's name.
        known: the package's names.
        source: origin of the rows, for messages.

    Raises:
        UnreadableFileError: ``columns`` has an unknown key, or the first row lacks a column it names.
    """
    if not columns:
        return iter(rows)
    if not isinstance(columns, Mapping):
        raise UnreadableFileError(f"columns is {shown(columns)}: expected a dict, such as {{{known[0]!r}: 'q'}}")
    for own, theirs in columns.items():
        if own not in known:
            raise UnreadableFileError(
                f"columns has the key {own!r}, which is not a column of this package{did_you_mean(str(own), known)}: "
                f"map any of {', '.join(known)} to a column's name, such as {{{known[0]!r}: 'q'}}"
            )
        if not isinstance(theirs, str):
            raise UnreadableFileError(f"columns[{own!r}] is {shown(theirs)}: expected the name of a column in {source}")
    return _renamed(rows, {theirs: own for own, theirs in columns.items()}, source)


def _renamed(rows: Iterable[Row], own_names: Mapping[str, str], source: str | Path) -> Iterator[Row]:
    replaced = {*own_names, *own_names.values()}
    for number, (place, row) in enumerate(rows):
        for name in () if number else own_names:
            if name not in row:
                raise UnreadableFileError(
                    f"{source}, {place} lacks the column {name!r} given in columns: its columns are "
                    f"{', '.join(map(str, row))}{did_you_mean(name, row)}"
                )
        taken = {own: row[name] for name, own in own_names.items() if name in row}
        yield place, taken | {name: value for name, value in row.items() if name not in replaced}


def did_you_mean(name: str, there: Iterable[Any], others: Sequence[str] = ()) -> str:
    """A suggestion to append to a message; empty if no name is similar.

    Args:
        name: the missing name.
        there: available names.
        others: synonyms of the name.
    """
    lowered = {str(each).lower(): str(each) for each in there}
    for wanted in (name, *others):
        if found := difflib.get_close_matches(wanted.lower(), lowered, n=1, cutoff=0.8 if len(wanted) > 2 else 1.0):
            return f" (did you mean {lowered[found[0]]!r}?)"
    return ""
