"""Rows of JSONL and Parquet files, each with the place it stands at, read in bounded memory."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from searchr1_async.boundary.tables import scan_parquet

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
PARQUET_SUFFIXES = (".parquet",)

Row = tuple[str, dict[str, Any]]
"""Where the row stands (``"line 3"``, ``"row 2"``) and what it holds."""


class UnreadableFileError(Exception):
    """A file that is no JSONL or Parquet; its message names the place and is meant for the caller's typed error."""


def is_data_file(path: Path) -> bool:
    return path.name.lower().endswith((*JSONL_SUFFIXES, *PARQUET_SUFFIXES))


def read_rows(path: Path, columns: frozenset[str] | None = None) -> Iterator[Row]:
    """Rows in the file's order; of Parquet only ``columns`` (those that exist) are read, in slices of 10,000 rows.

    Raises:
        UnreadableFileError: not a JSONL or Parquet file, or broken inside.
    """
    name = path.name.lower()
    if name.endswith(PARQUET_SUFFIXES):
        yield from _parquet_rows(path, columns)
    elif name.endswith(JSONL_SUFFIXES):
        yield from _jsonl_rows(path)
    else:
        raise UnreadableFileError(
            f"{path} is neither JSONL nor Parquet: name it *.jsonl, *.jsonl.gz or *.parquet, or convert it"
        )


def _jsonl_rows(path: Path) -> Iterator[Row]:
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as text:
            for number, line in enumerate(text, start=1):
                if line.strip():
                    yield f"line {number}", _json_object(path, number, line)
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"{path} is not UTF-8 text: {error}") from error
    except (OSError, EOFError) as error:
        raise UnreadableFileError(f"{path} cannot be read: {error}") from error


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UnreadableFileError(f"{path}, line {number} is not a JSON object but {type(row).__name__}")
    return row


def _parquet_rows(path: Path, columns: frozenset[str] | None, slice_rows: int = 10_000) -> Iterator[Row]:
    try:
        frame = scan_parquet(path)
        schema = frame.collect_schema()
        if columns is not None:
            frame = frame.select([name for name in schema.names() if name in columns])
        start = 0
        while True:
            rows = frame.slice(start, slice_rows).collect()
            for number, row in enumerate(rows.iter_rows(named=True), start=start + 1):
                yield f"row {number}", row
            start += rows.height
            if rows.height < slice_rows:
                return
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UnreadableFileError(f"{path} cannot be read as Parquet: {error}") from error
