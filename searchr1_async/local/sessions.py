"""Client sessions: creation, lookup, listing and search; and the persistent records of sessions and training runs.

There is one user, ``local``. A project is just a name on a session and need not be created. A record is one small JSON file,
``<checkpoints>/_records/<id>.json``, with dots for the id's colons. A run's id starts with its session's
(``SESSION:train:NUMBER``); a session id has no colon.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio.to_thread
from aiohttp import web

from searchr1_async.boundary.paths import write_atomically
from searchr1_async.local.checkpoint_files import Checkpoint, CheckpointStore
from searchr1_async.local.protocol import Body, MalformedRequest, optional
from searchr1_async.local.responses import Gone, NotFound, json_answer, page_of, texts, timestamp

logger = logging.getLogger(__name__)

FOLDER = "_records"
"""Cannot clash with run folders, whose names start with a letter or digit."""
DEFAULT_PROJECT = "local"
"""The project of sessions that name none."""
OWNER = "local"
_ACTIVE = {"type": "active"}
_MAX_PAGE = 200


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A training run. ``last_request_at`` is seconds since the epoch."""

    id: str
    base_model: str
    lora_rank: int
    last_request_at: float
    user_metadata: Mapping[str, Any] | None = None


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
    """All records of a checkpoint folder, including those of earlier processes, in memory.

    :meth:`note` and :meth:`flush` belong to one event loop; :meth:`read` blocks on disk I/O.
    """

    def __init__(self, checkpoints: Path) -> None:
        self._folder = checkpoints / FOLDER
        self.runs: dict[str, RunRecord] = {}
        self.sessions: dict[str, SessionRecord] = {}
        self._unwritten: dict[str, Record] = {}
        self._writing = threading.Lock()
        self._has_warned = False

    def read(self) -> None:
        """Reads the records of earlier processes. Corrupt files are logged and ignored."""
        for path in self._folder.glob("*.json"):
            try:
                fields = json.loads(path.read_text())
                if ":" in fields["id"]:
                    self._put(RunRecord(**fields))
                else:
                    self._put(SessionRecord(**{**fields, "run_ids": tuple(fields["run_ids"])}))
            except (OSError, ValueError, TypeError, KeyError) as error:
                logger.warning("ignoring the corrupt record %s: %s", path, error)

    def note(self, record: Record) -> None:
        """Adds or replaces a record in memory; :meth:`flush` writes it."""
        if self.runs.get(record.id, self.sessions.get(record.id)) != record:
            self._put(record)
            self._unwritten[record.id] = record

    def _put(self, record: Record) -> None:
        if isinstance(record, RunRecord):
            self.runs[record.id] = record
        else:
            self.sessions[record.id] = record

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
                record = self.runs.get(id) or self.sessions[id]
                try:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    write_atomically(self._folder / f"{id.replace(':', '.')}.json", json.dumps(asdict(record)).encode())
                except OSError as error:
                    # Warn once: the folder may be read-only, and nothing else depends on it.
                    level = logging.DEBUG if self._has_warned else logging.WARNING
                    logger.log(level, "cannot write the record of %s: %s", id, error)
                    self._has_warned = True
                    left[id] = record
        return left


@dataclass(slots=True)
class Session:
    """One ``ServiceClient``. ``heartbeat_at`` is monotonic time in seconds, ``created_at`` seconds since the epoch."""

    id: str
    created_at: float
    user_metadata: Mapping[str, Any] | None
    display_name: str | None
    project_id: str
    heartbeat_at: float
    model_ids: list[str] = field(default_factory=list)
    samplers: dict[str, str | None] = field(default_factory=dict)
    """Sampler ids with the path of their checkpoint, if any."""
    finished: bool = False
    status: Mapping[str, Any] | None = None
    """How it ended, as reported by the client."""

    def record(self) -> SessionRecord:
        """The session's persistent record."""
        return SessionRecord(
            id=self.id,
            created_at=self.created_at,
            user_metadata=self.user_metadata,
            display_name=self.display_name,
            project_id=self.project_id,
            run_ids=tuple(self.model_ids),
            samplers=dict(self.samplers),
            status=self.status,
        )


class Sessions:
    """All sessions: those of this process, and the records of earlier ones."""

    def __init__(self, records: RecordStore, checkpoints: CheckpointStore) -> None:
        self.known: dict[str, Session] = {}
        """This process's sessions by id, including finished ones."""
        self._records = records
        self._checkpoints = checkpoints

    def add_routes(self, app: web.Application, prefix: str) -> None:
        app.router.add_get(f"{prefix}/sessions", self.list_sessions)
        app.router.add_post(f"{prefix}/sessions/search", self.search)
        app.router.add_get(f"{prefix}/sessions/{{session}}", self.get_session)
        app.router.add_put(f"{prefix}/sessions/{{session}}/project", self.assign_project)

    def open(self, fields: Mapping[str, Any]) -> Session:
        """Creates a session from the fields of ``create_session``."""
        metadata, name, project = (fields.get(key) for key in ("user_metadata", "display_name", "project_id"))
        # Random: must not collide with ids of earlier processes that used the same checkpoint folder.
        session = Session(
            id=secrets.token_hex(8),
            created_at=time.time(),
            user_metadata=metadata if isinstance(metadata, dict) else None,
            display_name=name if isinstance(name, str) else None,
            project_id=project if isinstance(project, str) and project else DEFAULT_PROJECT,
            heartbeat_at=time.monotonic(),
        )
        self.known[session.id] = session
        self._records.note(session.record())
        return session

    def get(self, id: str) -> Session:
        """An open session. Raises :class:`NotFound` if this process does not know it, :class:`Gone` if it has ended."""
        session = self.known.get(id)
        if session is None:
            raise NotFound(f"no session {id!r}: unknown id, or the service was restarted")
        if session.finished:
            raise Gone(f"session {id!r} has ended")
        return session

    def add_ended(self, id: str, display_name: str, project_id: str, run_id: str) -> None:
        """Adds the record of a session that has already ended."""
        status = {"type": "client_finished", "reason": {"type": "success"}}
        self._records.note(
            SessionRecord(
                id, time.time(), display_name=display_name, project_id=project_id, run_ids=(run_id,), status=status
            )
        )

    def note(self) -> None:
        """Updates the records of open sessions."""
        for session in self.known.values():
            if not session.finished:
                self._records.note(session.record())

    def sampler(self, id: str) -> str | None:
        """The checkpoint path of an ended session's sampler, if it had one. Raises :class:`NotFound`."""
        record = self._records.sessions.get(id.partition(":")[0])
        if record is None or id not in (record.samplers or {}):
            raise NotFound(f"no sampler {id!r}: unknown id")
        return (record.samplers or {})[id]

    def project_of(self, session_id: str) -> str:
        record = self._records.sessions.get(session_id)
        return DEFAULT_PROJECT if record is None else record.project_id

    # -- routes --------------------------------------------------------------------------------------------------

    async def list_sessions(self, request: web.Request) -> web.Response:
        page, _ = page_of(request, [record.id for record in self._newest_first()])
        return json_answer(sessions=page)

    async def get_session(self, request: web.Request) -> web.Response:
        record = self._record(request.match_info["session"])
        return json_answer(
            training_run_ids=record.run_ids,
            sampler_ids=list(record.samplers or {}),
            user_metadata=texts(record.user_metadata),
            display_name=record.display_name,
        )

    async def assign_project(self, request: web.Request) -> web.Response:
        record = self._record(request.match_info["session"])
        project = Body.parse(await request.read()).fields.get("project_id")
        if not isinstance(project, str) or not project:
            raise MalformedRequest("project_id: a string is required", status=400)
        session = self.known.get(record.id)
        if session is not None:
            session.project_id = project
        self._records.note(replace(record, project_id=project))
        await self._records.flush()
        return web.Response(status=204)

    async def search(self, request: web.Request) -> web.Response:
        """``SessionSearchRequest``: one page of matching sessions, newest first."""
        body = Body.parse(await request.read())
        limit = optional(body.fields, "limit", int, 50)
        if not 1 <= limit <= _MAX_PAGE:
            raise MalformedRequest(f"limit: must be between 1 and {_MAX_PAGE}, got {limit}")
        query = _Query.parse(body.fields)
        found = [record for record in self._newest_first() if query.fits(record, self._status(record))]
        if body.fields.get("cursor") is not None:
            last = _cursor(body.fields["cursor"])
            found = [record for record in found if _place(record) < last]
        page = found[:limit]
        cursor = None
        if len(found) > limit:
            cursor = {"last_created_at": timestamp(page[-1].created_at), "last_session_id": page[-1].id}
        listing = await anyio.to_thread.run_sync(self._checkpoints.listing, time.time())
        return json_answer(sessions=list(self._summaries(page, listing)), next_cursor=cursor)

    def _record(self, id: str) -> SessionRecord:
        self.note()
        record = self._records.sessions.get(id)
        if record is None:
            raise NotFound(f"no session {id!r}")
        return record

    def _newest_first(self) -> list[SessionRecord]:
        self.note()
        return sorted(self._records.sessions.values(), key=_place, reverse=True)

    def _status(self, record: SessionRecord) -> Mapping[str, Any] | None:
        session = self.known.get(record.id)
        return _ACTIVE if session is not None and not session.finished else record.status

    def _summaries(self, page: Sequence[SessionRecord], listing: Sequence[Checkpoint]) -> Iterator[dict[str, Any]]:
        for record in page:
            sizes = [item.size_bytes for item in listing if item.id.run.partition(":")[0] == record.id]
            yield {
                "session_id": record.id,
                "created_at": timestamp(record.created_at),
                "owner": OWNER,
                "project_id": record.project_id,
                "status": self._status(record),
                "checkpoints_count": len(sizes),
                "display_name": record.display_name,
                "user_metadata": texts(record.user_metadata),
                "checkpoint_storage_bytes": sum(sizes),
            }


def _place(record: SessionRecord) -> tuple[datetime, str]:
    """Sort key: creation time as clients see it, then id."""
    return datetime.fromtimestamp(record.created_at, UTC), record.id


def _cursor(cursor: Any) -> tuple[datetime, str]:
    try:
        at = datetime.fromisoformat(cursor["last_created_at"])
        return at.astimezone(UTC), str(cursor["last_session_id"])
    except (TypeError, KeyError, ValueError):
        raise MalformedRequest("cursor: pass the last page's next_cursor unchanged") from None


@dataclass(frozen=True, slots=True)
class _Query:
    """Search filters; a session must match all of them."""

    session_id: str | None
    words: tuple[str, ...]
    """All must occur in the display name, case-insensitively. If ``session_id`` is also given, either may match."""
    projects: list[Any] | None
    owners: list[Any] | None
    user_metadata: Mapping[str, Any]
    statuses: list[Any] | None

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> _Query:
        """Raises :class:`UserFault` for a field of the wrong type."""
        owner = optional(fields, "owner", dict, {})
        return cls(
            session_id=optional(fields, "session_id", str, "") or None,
            words=tuple(optional(fields, "display_name", str, "").casefold().split()),
            projects=optional(fields, "project_ids", list, []) if fields.get("project_ids") is not None else None,
            owners=optional(owner, "owner_urns", list, []) if owner.get("type") == "user" else None,
            user_metadata=optional(fields, "user_metadata", dict, {}),
            statuses=optional(fields, "statuses", list, []) if fields.get("statuses") is not None else None,
        )

    def fits(self, record: SessionRecord, status: Mapping[str, Any] | None) -> bool:
        name = (record.display_name or "").casefold()
        is_named = bool(self.words) and all(word in name for word in self.words)
        if (self.session_id or self.words) and record.id != self.session_id and not is_named:
            return False
        if self.projects is not None and record.project_id not in self.projects:
            return False
        if self.owners is not None and OWNER not in self.owners:
            return False
        metadata = texts(record.user_metadata) or {}
        if any(metadata.get(key) != value for key, value in self.user_metadata.items()):
            return False
        return self.statuses is None or any(_has_status(status, wanted) for wanted in self.statuses)


def _has_status(status: Mapping[str, Any] | None, wanted: Any) -> bool:
    if status is None or not isinstance(wanted, dict) or status.get("type") != wanted.get("type"):
        return False
    reasons = wanted.get("reasons")
    return reasons is None or (status.get("reason") or {}).get("type") in reasons
