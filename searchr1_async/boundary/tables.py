"""The one reader of Parquet tables: a path is the name of one file, whatever characters it holds.

polars expands ``*``, ``?`` and ``[…]`` in plain paths, takes a folder ``~`` for the user's home and ``file:`` for a URL, reads all
files of a folder, and makes columns of folders called ``name=value``; no other module reads tables by polars.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import polars as pl

_MAGIC = b"PAR1"
"""Begins and ends every Parquet file."""


def read_parquet(path: Path, columns: Sequence[str] | None = None, n_rows: int | None = None) -> pl.DataFrame:
    """The rows of one file.

    Args:
        columns: those to read; None for all.
        n_rows: those at the beginning; None for all.

    Raises:
        OSError: there is no such file, or it cannot be read.
        polars.exceptions.PolarsError: it is no whole Parquet file, or lacks a column.
    """
    names = None if columns is None else list(columns)
    return pl.read_parquet(_one_file(path), columns=names, n_rows=n_rows, glob=False, hive_partitioning=False)


def scan_parquet(path: Path) -> pl.LazyFrame:
    """The rows of one file, read when they are collected.

    Raises:
        OSError: it is a folder.
        OSError, polars.exceptions.PolarsError: when the rows are collected, as :func:`read_parquet`.
    """
    return pl.scan_parquet(_one_file(path), glob=False, hive_partitioning=False)


def scan_rows(paths: Sequence[Path], schema: pl.Schema) -> pl.LazyFrame:
    """The rows of several files of one schema, in the order of the files; of no file, an empty frame.

    A column, or a field of a struct, that a file of an earlier version lacks is null.

    Raises:
        OSError, polars.exceptions.PolarsError: when the rows are collected, as :func:`read_parquet`.
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
    """Whether a file begins and ends as a Parquet file does: an empty one, one that was cut short, or one of another kind does not.

    Costs some 20 microseconds, where a scan would fail only when its rows are collected.

    Raises:
        OSError: there is no such file, or it cannot be read.
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
    """The path, which begins with no character that polars takes for more than a name."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a Parquet file")
    return path.absolute()
