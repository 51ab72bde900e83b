"""What the service keeps on disk: checkpoints, and records of sessions and training runs.

A checkpoint is a folder ``<folder>/<run>/<kind>/<name>/`` with ``checkpoint.json`` and one safetensors file. The JSON file
names the other and is replaced atomically once that one is synced, which commits the checkpoint: a crash leaves the old or
the new one, and at worst an orphaned file, removed at the next start. A record is a file ``<folder>/_records/<id>.json``,
with dots for the id's colons. All functions of :class:`CheckpointStore`, which is thread-safe, block on disk I/O.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import anyio.to_thread
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from searchr1_async.boundary.paths import write_atomically
from searchr1_async.errors import CheckpointError
from searchr1_async.local.backend import LoraConfig, State, UserFault

logger = logging.getLogger(__name__)

Kind = Literal["weights", "sampler_weights", "external_weights"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_SCHEME = "tinker://"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_:-]{0,127}")
_METADATA = "checkpoint.json"
_SLACK_BYTES = 1 << 20
_STALE_SECONDS = 600.0
"""An unfinished file older than this belongs to a dead process: writing one takes seconds."""
FOLDER = "_records"
"""Cannot clash with run folders, whose names start with a letter or digit."""
DEFAULT_PROJECT = "local"
"""The project of sessions that name none."""


class NoSuchCheckpoint(UserFault):
    """The checkpoint does not exist or has expired."""


@dataclass(frozen=True, slots=True)
class CheckpointId:
    """A checkpoint's run (the id of the model that saved it), kind and name."""

    run: str
    kind: Kind
    name: str

    @property
    def path(self) -> str:
        return f"{_SCHEME}{self.run}/{self.kind}/{self.name}"

    @classmethod
    def of(cls, run: str, kind: str, name: str) -> CheckpointId:
        """Raises :class:`UserFault` for a part that is not a safe folder name."""
        if kind not in KINDS:
            raise UserFault(f"{kind!r} is not a checkpoint kind: expected one of {', '.join(KINDS)}")
        if not _RUN.fullmatch(run):
            raise UserFault(f"{run!r:.200} is not a run id")
        if not _NAME.fullmatch(name):
            raise UserFault(
                f"{name!r:.200} is not a valid checkpoint name: use at most 128 letters, digits, '.', '_' and '-', "
                "starting with a letter or digit"
            )
        return cls(run, kind, name)

    @classmethod
    def parse(cls, path: str) -> CheckpointId:
        """From ``tinker://RUN/KIND/NAME``. Raises :class:`UserFault`."""
        parts = path.removeprefix(_SCHEME).split("/")
        if not path.startswith(_SCHEME) or len(parts) != 3:
            raise UserFault(f"{path!r:.300} is not a checkpoint path: expected {_SCHEME}RUN/weights/NAME")
        return cls.of(*parts)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's metadata. Times are seconds since the epoch."""

    id: CheckpointId
    base_model: str
    lora: LoraConfig
    has_optimizer: bool
    created_at: float
    expires_at: float | None
    size_bytes: int
    user_metadata: Mapping[str, str] | None = None
    file: str = ""
    """Name of its safetensors file."""
    public: bool = False
    """Whether it is published. Only shown in listings."""

    def is_expired(self, now: float) -> bool:
        return self.expires_at is not None and now >= self.expires_at


class CheckpointStore:
    """All checkpoints below one folder, including those of earlier processes."""

    def __init__(self, folder: Path) -> None:
        """Creates the folder. Raises :class:`CheckpointError` if it cannot be created."""
        self.folder = folder
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot create the checkpoint folder {folder}: {error}") from error

    def save(self, checkpoint: Checkpoint, state: State, *, overwrite: bool) -> Checkpoint:
        """Writes a checkpoint; returns it with size and file filled in.

        Raises :class:`UserFault` if it exists and ``overwrite`` is false, and :class:`CheckpointError` if the disk is full
        or not writable; partial files are then removed.
        """
        with self._lock:
            place = self._place(checkpoint.id)
            earlier = self._read(checkpoint.id)
            if earlier is not None and not overwrite and not earlier.is_expired(checkpoint.created_at):
                raise UserFault(f"{checkpoint.id.path} already exists: choose another name, or pass overwrite=True")
            file = place / f"state-{secrets.token_hex(4)}.safetensors"
            try:
                place.mkdir(parents=True, exist_ok=True)
                self._write_arrays(file, state)
                checkpoint = replace(checkpoint, file=file.name, size_bytes=file.stat().st_size)
                self._write_metadata(checkpoint)
            except (OSError, SafetensorError) as error:
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
                self._remove_if_empty(place)
                raise self._explain(error, _bytes_needed(state)) from error
            for other in place.glob("state-*.safetensors"):
                if other != file:
                    other.unlink(missing_ok=True)
            return checkpoint

    def load(self, id: CheckpointId, now: float) -> tuple[Checkpoint, State]:
        """Raises :class:`NoSuchCheckpoint` if it is missing or expired, :class:`CheckpointError` if it is corrupt."""
        checkpoint = self.find(id, now)
        try:
            return checkpoint, load_file(self.file_of(checkpoint))
        except FileNotFoundError:
            raise NoSuchCheckpoint(f"{id.path} was deleted") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the checkpoint {id.path} cannot be read from {self._place(id)}: {error}") from error

    def find(self, id: CheckpointId, now: float) -> Checkpoint:
        """Raises :class:`NoSuchCheckpoint` if it is missing or expired; removes it if expired."""
        with self._lock:
            checkpoint = self._read(id)
            if checkpoint is None:
                raise NoSuchCheckpoint(f"{id.path} does not exist in {self.folder}")
            if checkpoint.is_expired(now):
                self._remove(id)
                raise NoSuchCheckpoint(f"{id.path} has expired: its time to live (ttl_seconds) is over")
            return checkpoint

    def file_of(self, checkpoint: Checkpoint) -> Path:
        return self._place(checkpoint.id) / checkpoint.file

    def delete(self, id: CheckpointId, now: float) -> None:
        """Raises :class:`NoSuchCheckpoint`."""
        self.find(id, now)
        with self._lock:
            self._remove(id)

    def set_expiry(self, id: CheckpointId, expires_at: float | None, now: float) -> Checkpoint:
        """Raises :class:`NoSuchCheckpoint`, or :class:`CheckpointError` if the disk is not writable."""
        return self._change(replace(self.find(id, now), expires_at=expires_at))

    def set_public(self, id: CheckpointId, public: bool, now: float) -> Checkpoint:
        """Raises :class:`NoSuchCheckpoint`, or :class:`CheckpointError` if the disk is not writable."""
        return self._change(replace(self.find(id, now), public=public))

    def _change(self, checkpoint: Checkpoint) -> Checkpoint:
        with self._lock:
            try:
                self._write_metadata(checkpoint)
            except OSError as error:
                raise self._explain(error, 0) from error
        return checkpoint

    def copy(self, source: CheckpointId, to: CheckpointId, expires_at: float | None, now: float) -> Checkpoint:
        """Copies a checkpoint to another id, hard-linking its arrays where possible. The copy outlives its source.

        Raises :class:`NoSuchCheckpoint` if the source is missing, :class:`CheckpointError` if the disk is not writable.
        """
        found = self.find(source, now)
        copy = replace(found, id=to, created_at=now, expires_at=expires_at, public=False)
        with self._lock:
            place = self._place(to)
            try:
                place.mkdir(parents=True, exist_ok=True)
                _link(self.file_of(found), self.file_of(copy))
                self._write_metadata(copy)
            except FileNotFoundError:
                self._remove_if_empty(place)
                raise NoSuchCheckpoint(f"{source.path} was deleted") from None
            except OSError as error:
                shutil.rmtree(place, ignore_errors=True)
                raise self._explain(error, found.size_bytes) from error
        return copy

    def listing(self, now: float, run: str | None = None) -> list[Checkpoint]:
        """Unexpired checkpoints (of one run, if given), oldest first."""
        with self._lock:
            found = [checkpoint for checkpoint in self._scan(run) if not checkpoint.is_expired(now)]
        return sorted(found, key=lambda checkpoint: (checkpoint.created_at, checkpoint.id.path))

    def sweep(self, now: float) -> int:
        """Removes expired checkpoints; returns how many."""
        with self._lock:
            expired = [checkpoint.id for checkpoint in self._scan() if checkpoint.is_expired(now)]
            for id in expired:
                self._remove(id)
        return len(expired)

    def clean(self, now: float) -> None:
        """Removes partial files left by a killed process. Recent ones stay: another process may be writing them."""
        with self._lock:
            for file in [*self.folder.glob("*/*/*/state-*.safetensors"), *self.folder.glob("*/*/*/*.partial")]:
                id = _id_of(file.parent)
                checkpoint = None if id is None else self._read(id)
                if id is not None and (checkpoint is None or checkpoint.file != file.name) and _is_stale(file, now):
                    logger.info("removing the unfinished file %s", file)
                    file.unlink(missing_ok=True)
                    self._remove_if_empty(file.parent)

    def _place(self, id: CheckpointId) -> Path:
        # Not every file system allows colons; run ids contain colons but no dots.
        return self.folder / id.run.replace(":", ".") / id.kind / id.name

    def _scan(self, run: str | None = None) -> Iterator[Checkpoint]:
        for metadata in self.folder.glob(f"*/*/*/{_METADATA}"):
            id = _id_of(metadata.parent)
            checkpoint = None if id is None or (run is not None and id.run != run) else self._read(id)
            if checkpoint is not None:
                yield checkpoint

    def _read(self, id: CheckpointId) -> Checkpoint | None:
        path = self._place(id) / _METADATA
        try:
            fields = json.loads(path.read_text())
            return Checkpoint(**{**fields, "id": id, "lora": LoraConfig(**fields["lora"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, UserFault) as error:
            logger.warning("ignoring the corrupt checkpoint %s: %s", path.parent, error)
            return None

    def _write_metadata(self, checkpoint: Checkpoint) -> None:
        write_atomically(self._place(checkpoint.id) / _METADATA, json.dumps(asdict(checkpoint)).encode())

    def _write_arrays(self, file: Path, state: State) -> None:
        missing = _bytes_needed(state) + _SLACK_BYTES - shutil.disk_usage(file.parent).free
        if missing > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(dict(state), file)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())

    def _explain(self, error: Exception, needed: int) -> CheckpointError:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            with contextlib.suppress(OSError):
                missing = max(needed + _SLACK_BYTES - shutil.disk_usage(self.folder).free, 1)
                return CheckpointError(
                    f"the disk is full: the checkpoint needs {needed:,} bytes in {self.folder}, about {missing:,} more "
                    "than are free; free some space or let older checkpoints expire"
                )
        return CheckpointError(f"cannot write the checkpoint below {self.folder}: {error}")

    def _remove(self, id: CheckpointId) -> None:
        place = self._place(id)
        # Metadata first: without it the checkpoint no longer exists, even if the rest of the removal fails.
        (place / _METADATA).unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        self._remove_if_empty(place.parent)

    def _remove_if_empty(self, place: Path) -> None:
        with contextlib.suppress(OSError):
            while place != self.folder:
                place.rmdir()
                place = place.parent


def _id_of(place: Path) -> CheckpointId | None:
    try:
        return CheckpointId.of(place.parent.parent.name.replace(".", ":"), place.parent.name, place.name)
    except UserFault:
        return None


def _link(file: Path, other: Path) -> None:
    try:
        os.link(file, other)
    except FileNotFoundError:
        raise
    except OSError:  # not every file system has hard links
        shutil.copyfile(file, other)


def _is_stale(file: Path, now: float) -> bool:
    try:
        return now - file.stat().st_mtime > _STALE_SECONDS
    except FileNotFoundError:  # just renamed or removed
        return False


def _bytes_needed(state: State) -> int:
    return sum(array.nbytes for array in state.values())


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
                kind = RunRecord if ":" in fields["id"] else SessionRecord
                # Older versions kept more of a session.
                known = {name: fields[name] for name in kind.__dataclass_fields__ if name in fields}
                if "run_ids" in known:
                    known["run_ids"] = tuple(known["run_ids"])
                self._put(kind(**known))
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
