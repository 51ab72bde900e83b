"""What stays known of sessions and training runs when they are over, and after a restart: one small JSON file each.

The files lie beside the checkpoints: ``<checkpoints>/_records/<id>.json``, with a dot for each colon of the id. A run's id
starts with that of its session (``SESSION:train:NUMBER``), a session's has no colon.
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

from searchr1_async.files import write_atomically

logger = logging.getLogger(__name__)

FOLDER = "_records"
"""Beside the folders of the runs, whose names start with a letter or digit."""
DEFAULT_PROJECT = "local"
"""The project of every session that names none."""


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
    """A session, which is one ``ServiceClient``. ``created_at`` is seconds since the epoch."""

    id: str
    created_at: float
    user_metadata: Mapping[str, Any] | None = None
    display_name: str | None = None
    project_id: str = DEFAULT_PROJECT
    run_ids: tuple[str, ...] = ()
    samplers: Mapping[str, str | None] | None = None
    """Sampler ids, each with the path of its checkpoint; None: the base model, or weights that were never saved."""
    status: Mapping[str, Any] | None = None
    """How it ended, in the protocol's form; None: it has not, or nobody said."""


Record = RunRecord | SessionRecord


class RecordStore:
    """The records below one folder of checkpoints, those of earlier processes included.

    All of them are in memory. :meth:`note` and :meth:`flush` belong to one event loop; :meth:`read` blocks on the disk.
    """

    def __init__(self, checkpoints: Path) -> None:
        self._folder = checkpoints / FOLDER
        self._runs: dict[str, RunRecord] = {}
        self._sessions: dict[str, SessionRecord] = {}
        self._unwritten: dict[str, Record] = {}
        self._writing = threading.Lock()
        self._is_told = False

    @property
    def runs(self) -> Mapping[str, RunRecord]:
        """By id."""
        return self._runs

    @property
    def sessions(self) -> Mapping[str, SessionRecord]:
        """By id."""
        return self._sessions

    def read(self) -> None:
        """Reads what earlier processes wrote. A damaged file is named in the log and ignored."""
        for path in self._folder.glob("*.json"):
            try:
                fields = json.loads(path.read_text())
                self._put(RunRecord(**fields) if ":" in fields["id"] else _session(fields))
            except (OSError, ValueError, TypeError, KeyError) as error:
                logger.warning("ignoring the damaged record %s: %s", path, error)

    def note(self, record: Record) -> None:
        """Adds a record, or replaces the one of the same id; :meth:`flush` writes it."""
        if self._runs.get(record.id, self._sessions.get(record.id)) != record:
            self._put(record)
            self._unwritten[record.id] = record

    def _put(self, record: Record) -> None:
        if isinstance(record, RunRecord):
            self._runs[record.id] = record
        else:
            self._sessions[record.id] = record

    async def flush(self) -> None:
        """Writes what has changed. What cannot be written is told once in the log and tried again the next time."""
        if self._unwritten:
            batch, self._unwritten = self._unwritten, {}
            left = await anyio.to_thread.run_sync(self._write, batch)
            self._unwritten = left | self._unwritten

    def _write(self, batch: Mapping[str, Record]) -> dict[str, Record]:
        left: dict[str, Record] = {}
        with self._writing:
            for id in batch:
                # As it is by now: a batch that was taken later may have been written before this one.
                record = self._runs.get(id) or self._sessions[id]
                try:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    write_atomically(self._folder / f"{id.replace(':', '.')}.json", json.dumps(asdict(record)).encode())
                except OSError as error:
                    # Once: the folder may be one that is only read, and nothing else fails for it.
                    logger.log(
                        logging.DEBUG if self._is_told else logging.WARNING,
                        "cannot write the record of %s: %s",
                        id,
                        error,
                    )
                    self._is_told = True
                    left[id] = record
        return left


def _session(fields: Mapping[str, Any]) -> SessionRecord:
    return SessionRecord(**{**fields, "run_ids": tuple(fields["run_ids"])})
