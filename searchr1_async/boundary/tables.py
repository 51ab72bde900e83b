"""The only reader of Parquet tables: a path names one file, whatever characters it contains.

polars expands ``*``, ``?`` and ``[…]`` in paths, treats ``~`` as the home folder and ``file:`` as a URL, reads all files of a folder,
and makes columns of folders named ``name=value``; so no other module reads tables with polars.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import polars as pl

_MAGIC = b"PAR1"
"""First and last bytes of every Parquet file."""


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
