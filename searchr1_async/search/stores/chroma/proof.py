"""Checks the files of a Chroma folder before Chroma loads them: Chroma trusts its files, and corrupt ones may crash the process."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio.from_thread
import numpy as np

from searchr1_async.boundary.paths import write_atomically
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.faults import PassingFault
from searchr1_async.search.index_folder import building_call
from searchr1_async.search.sources.chroma_tables import DATABASE_NAME, ChromaTables
from searchr1_async.search.sources.hnsw_check import FILE_NAMES, ROWS_NAME, SPOTS, WHOLE_BYTES, check_segment
from searchr1_async.search.sources.hnsw_segment import LABELS_NAME, BrokenSegmentError, HnswSegment
from searchr1_async.search.stores.checksums import FileRecord, record_of, refuse_other
from searchr1_async.search.stores.proof import SAMPLE, DamagedIndexError

RECORD_NAME = "files.json"
"""File in the index folder with sizes and checksums of the vector files, and the last change they contain."""


@dataclass(frozen=True, slots=True)
class Looked:
    """The checked files of a collection."""

    space: str
    sample: Vectors
    """Vectors that a search must find, ``[n, dimension]``; empty if all vectors are in the log."""


def look_at(folder: Path, collection: str) -> Looked | None:
    """Checks the files of a collection; None if it does not exist or is empty. Blocking.

    Raises:
        DamagedIndexError: a file is missing, truncated or not Chroma's, or passages have lost their vectors.
        PassingFault: another process is writing to the folder.
    """
    if not (folder / DATABASE_NAME).is_file():
        if any(folder.glob(f"*/{ROWS_NAME}")):
            raise DamagedIndexError(f"{folder / DATABASE_NAME} is missing", advice_for(folder))
        return None
    with _store_errors(folder):
        try:
            tables = ChromaTables(folder, collection, is_read_only=False)
        except StoreError:
            return None  # no such collection, or a layout only Chroma can read
        try:
            return _looked_at(tables) if tables.count and tables.dimension else None
        finally:
            tables.close()


def record_files(folder: Path, collection: str) -> None:
    """Records sizes and checksums of the vector files of a complete index. Blocking.

    A later change also changes Chroma's database, which invalidates the record.

    Raises:
        OSError: the files cannot be read, or the record cannot be written.
        sqlite3.Error, StoreError: not such a folder.
    """
    tables = ChromaTables(folder, collection)
    try:
        segment, changes = tables.segment_folder, tables.vectors_changed
    finally:
        tables.close()
    names = [name for name in FILE_NAMES if (segment / name).is_file()]
    if LABELS_NAME not in names or changes is None:  # all vectors are in the log
        return
    records = {name: asdict(record_of(segment / name, anyio.from_thread.check_cancelled)) for name in names}
    content = {"segment": segment.name, "changes": changes, "files": records}
    write_atomically(folder / RECORD_NAME, json.dumps(content).encode())


def advice_for(folder: Path) -> str:
    """How to restore a damaged index."""
    if (call := building_call(folder)) is not None:
        return f"To rebuild it: {call}"
    return "Restore the folder from a copy, or delete it and rebuild the index"


def _looked_at(tables: ChromaTables) -> Looked:
    folder, segment_folder = tables.folder, tables.segment_folder
    before = _state(segment_folder)
    try:
        are_known = _are_recorded(folder, tables)
        segment = None
        if (segment_folder / LABELS_NAME).exists() or tables.vectors_changed:
            is_cosine = tables.space == "cosine"
            segment = check_segment(segment_folder, tables.dimension, is_cosine=is_cosine, are_known=are_known)
        return Looked(tables.space, _proven_vectors(tables, segment))
    except (BrokenSegmentError, DamagedIndexError) as error:
        if _state(segment_folder) != before:
            raise PassingFault(f"{tables.name} is being written by another process", cause="locked") from error
        fault = error.fault if isinstance(error, DamagedIndexError) else str(error)
        raise DamagedIndexError(f"{tables.name} is damaged: {fault}", advice_for(folder)) from error


def _are_recorded(folder: Path, tables: ChromaTables) -> bool:
    """Whether the vector files match the record. False if there is none, or Chroma has rewritten the files since.

    Raises:
        DamagedIndexError: they should match, but do not.
    """
    try:
        record = json.loads((folder / RECORD_NAME).read_bytes())
        if (record["segment"], record["changes"]) != (tables.vector_segment, tables.vectors_changed):
            return False
        files = {str(name): FileRecord(**values) for name, values in record["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False  # missing, or corrupt itself
    for name, file in files.items():
        refuse_other(tables.segment_folder / name, file, check=anyio.from_thread.check_cancelled)
    return ROWS_NAME in files


def _proven_vectors(tables: ChromaTables, segment: HnswSegment | None) -> Vectors:
    """A sample of the stored vectors. Raises if a passage has no vector in the files or the log."""

    def is_in_segment(own_id: str) -> bool:
        return segment is not None and bool(segment.labels.of([own_id])[0] >= 0)

    changes = -1
    if segment is not None:
        changes = tables.vectors_changed or segment.labels.max_seq_id or -1
    logged = tables.replayed(changes, is_in_segment)
    held = 0 if segment is None else len(segment.labels.labels)
    for own_id, change in logged.items():
        held += (change is not None) - is_in_segment(own_id)
    if held < tables.count:
        raise BrokenSegmentError(f"{tables.count - held:,} of {tables.count:,} passages have lost their vectors")
    if segment is None:
        return np.empty((0, tables.dimension), np.float32)
    unchanged = np.setdiff1d(segment.labels.labels, segment.labels.of(list(logged)))
    is_small = (tables.segment_folder / ROWS_NAME).stat().st_size <= WHOLE_BYTES
    count = min(len(unchanged), SAMPLE if is_small else SPOTS)
    chosen = unchanged[np.linspace(0, len(unchanged) - 1, count).astype(int)] if count else unchanged
    if is_small or not count:
        vectors = segment.vectors(chosen)
    else:
        vectors = np.concatenate(
            [segment.vectors(np.array([label])) for label in chosen]
        )  # one by one: far apart on disk
    return vectors[vectors.any(axis=1)]  # a zero vector is near nothing, not even itself


def _state(folder: Path) -> list[tuple[str, int, int]]:
    """Sizes and times of the files, which change while another process writes."""
    if not folder.is_dir():
        return []
    found = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


@contextlib.contextmanager
def _store_errors(folder: Path) -> Iterator[None]:
    path = folder / DATABASE_NAME
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            raise PassingFault(f"{path} is locked by another process ({error})", cause="locked") from error
        if any(folder.glob(f"*/{ROWS_NAME}")):
            raise DamagedIndexError(f"{path} is damaged ({error})", advice_for(folder)) from error
    except sqlite3.DatabaseError as error:
        raise DamagedIndexError(f"{path} is damaged ({error})", advice_for(folder)) from error
    except OSError as error:
        raise StoreError(f"{folder} cannot be read ({error.strerror or error})", is_fatal=True) from error
