"""Persistent records of sessions and training runs: one small JSON file each.

Stored as ``<checkpoints>/_records/<id>.json``, with dots for the id's colons. A run's id starts with its session's
(``SESSION:train:NUMBER``); a session id has no colon.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread

from searchr1_async.boundary.paths import write_atomically

logger = logging.getLogger(__name__)

FOLDER = "_records"
"""Cannot clash with run folders, whose names start with a letter or digit."""
DEFAULT_PROJECT = "local"
"""The project of sessions that name none."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A training run. ``last_request_at`` is seconds since the epoch."""

    id: str
    base_model: str
    lora_rank: int
    last_request_at: float
    user_metadata: Mapping[str, Any] | None = None

    @property
    def session_id(self) -> str:
        return self.id.partition(":")[0]


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session: one ``ServiceClient``. ``created_at`` is seconds since the epoch."""

    id: str
    created_at: float
    user_metadata: Mapping[str, Any] | None = None
    display_name: str | None = None
    project_id: str = DEFAULT_PROJECT
    run_ids: tuple[str, ...] = ()
    samplers: Mapping[str, str | None] | None = None
    """Sampler ids with their checkpoint path; None: the base model, or unsaved weights."""
    status: Mapping[str, Any] | None = None
    """How it ended, in the protocol's form; None: open or unknown."""


Record = RunRecord | SessionRecord


class RecordStore:
    """All records of a checkpoint folder, including those of earlier processes, held in memory.

    :meth:`note` and :meth:`flush` belong to one event loop; :meth:`read` blocks on disk I/O.
    """

    def __init__(self, checkpoints: Path) -> None:
        self._folder = checkpoints / FOLDER
        self._runs: dict[str, RunRecord] = {}
        self._sessions: dict[str, SessionRecord] = {}
        self._unwritten: dict[str, Record] = {}
        self._writing = threading.Lock()
        self._has_warned = False

    @property
    def runs(self) -> Mapping[str, RunRecord]:
        return self._runs

    @property
    def sessions(self) -> Mapping[str, SessionRecord]:
        return self._sessions

    def read(self) -> None:
        """Reads the records of earlier processes. Corrupt files are logged and ignored."""
        for path in self._folder.glob("*.json"):
            try:
                fields = json.loads(path.read_text())
                self._put(RunRecord(**fields) if ":" in fields["id"] else _session(fields))
            except (OSError, ValueError, TypeError, KeyError) as error:
                logger.warning("ignoring the corrupt record %s: %s", path, error)

    def note(self, record: Record) -> None:
        """Adds or replaces a record in memory; :meth:`flush` writes it."""
        if self._runs.get(record.id, self._sessions.get(record.id)) != record:
            self._put(record)
            self._unwritten[record.id] = record

    def _put(self, record: Record) -> None:
        if isinstance(record, RunRecord):
            self._runs[record.id] = record
        else:
            self._sessions[record.id] = record

    async def flush(self) -> None:
        """Writes changed records. Failures are logged once and retried at the next flush."""
        if self._unwritten:
            batch, self._unwritten = self._unwritten, {}
            left = await anyio.to_thread.run_sync(self._write, batch)
            self._unwritten = left | self._unwritten

    def _write(self, batch: Mapping[str, Record]) -> dict[str, Record]:
        left: dict[str, Record] = {}
        with self._writing:
            for id in batch:
                # The current record: a later batch may have been written before this one.
                record = self._runs.get(id) or self._sessions[id]
                try:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    write_atomically(self._folder / f"{id.replace(':', '.')}.json", json.dumps(asdict(record)).encode())
                except OSError as error:
                    # Warn once: the folder may be read-only, and nothing else depends on it.
                    logger.log(
                        logging.DEBUG if self._has_warned else logging.WARNING,
                        "cannot write the record of %s: %s",
                        id,
                        error,
                    )
                    self._has_warned = True
                    left[id] = record
        return left


def _session(fields: Mapping[str, Any]) -> SessionRecord:
    return SessionRecord(**{**fields, "run_ids": tuple(fields["run_ids"])})
