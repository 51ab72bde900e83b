"""Checkpoints on disk: ``<folder>/<run>/<kind>/<name>/`` with ``checkpoint.json`` and one safetensors file.

``checkpoint.json`` names its safetensors file and is replaced atomically after that file is safely on disk: it is the
point at which a checkpoint exists or is replaced. A crash at any moment leaves the old checkpoint or the new one, and at
worst a safetensors file that nothing names, which goes at the next start. Clients name a checkpoint by its path
``tinker://RUN/weights/NAME`` (training state), ``tinker://RUN/sampler_weights/NAME`` or ``tinker://RUN/external_weights/NAME``
(an adapter to be downloaded: :mod:`searchr1_async.local.external`).

All functions block on the disk; call them in a worker thread. The store is thread-safe.
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
from typing import Literal, get_args

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from searchr1_async.errors import CheckpointError
from searchr1_async.files import write_atomically
from searchr1_async.local.backend import LoraConfig, State, UserFault

logger = logging.getLogger(__name__)

Kind = Literal["weights", "sampler_weights", "external_weights"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_SCHEME = "tinker://"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_:-]{0,127}")
_METADATA = "checkpoint.json"
_SLACK_BYTES = 1 << 20
_LEFT_SECONDS = 600.0
"""An unfinished file that was last written longer ago belongs to a process that is gone: writing one takes seconds."""


class NoSuchCheckpoint(UserFault):
    """It does not exist, or its time to live is over."""


@dataclass(frozen=True, slots=True)
class CheckpointId:
    """Which checkpoint: its run (the id of the model that saved it), kind and name."""

    run: str
    kind: Kind
    name: str

    @property
    def path(self) -> str:
        return f"{_SCHEME}{self.run}/{self.kind}/{self.name}"

    @classmethod
    def of(cls, run: str, kind: str, name: str) -> CheckpointId:
        """Raises :class:`UserFault` for a name that is no safe name of a folder."""
        if kind not in KINDS:
            raise UserFault(f"{kind!r} is no kind of checkpoint: expected one of {', '.join(KINDS)}")
        if not _RUN.fullmatch(run):
            raise UserFault(f"{run!r:.200} is no run id")
        if not _NAME.fullmatch(name):
            raise UserFault(
                f"{name!r:.200} cannot be a checkpoint's name: use at most 128 letters, digits, '.', '_' and '-', "
                "the first a letter or digit"
            )
        return cls(run, kind, name)

    @classmethod
    def parse(cls, path: str) -> CheckpointId:
        """From ``tinker://RUN/KIND/NAME``. Raises :class:`UserFault`."""
        parts = path.removeprefix(_SCHEME).split("/")
        if not path.startswith(_SCHEME) or len(parts) != 3:
            raise UserFault(f"{path!r:.300} is no checkpoint path: expected {_SCHEME}RUN/weights/NAME")
        return cls.of(*parts)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is known of a checkpoint without reading its arrays. Times are seconds since the epoch."""

    id: CheckpointId
    base_model: str
    lora: LoraConfig
    has_optimizer: bool
    created_at: float
    expires_at: float | None
    size_bytes: int
    user_metadata: Mapping[str, str] | None = None
    file: str = ""
    """The safetensors file in its folder."""
    public: bool = False
    """Whether it is published, which shows in listings: there is nobody else who could load it."""

    def is_expired(self, now: float) -> bool:
        return self.expires_at is not None and now >= self.expires_at


class CheckpointStore:
    """The checkpoints below one folder, those of earlier processes included."""

    def __init__(self, folder: Path) -> None:
        """Creates the folder. Raises :class:`CheckpointError` if it cannot be created."""
        self.folder = folder
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot create the checkpoint folder {folder}: {error}") from error

    def save(self, checkpoint: Checkpoint, state: State, *, overwrite: bool) -> Checkpoint:
        """Writes it; returns it with its size and file filled in.

        Raises :class:`UserFault` if the name is taken and ``overwrite`` is false, and :class:`CheckpointError` when the
        disk is full or cannot be written; nothing half-written stays behind then.
        """
        with self._lock:
            place = self._place(checkpoint.id)
            earlier = self._read(checkpoint.id)
            if earlier is not None and not overwrite and not earlier.is_expired(checkpoint.created_at):
                raise UserFault(f"{checkpoint.id.path} exists already: choose another name, or pass overwrite=True")
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
        """Raises :class:`NoSuchCheckpoint` if there is none or it has expired, :class:`CheckpointError` if it is damaged."""
        checkpoint = self.find(id, now)
        try:
            return checkpoint, load_file(self.file_of(checkpoint))
        except FileNotFoundError:
            raise NoSuchCheckpoint(f"{id.path} was deleted") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the checkpoint {id.path} cannot be read from {self._place(id)}: {error}") from error

    def find(self, id: CheckpointId, now: float) -> Checkpoint:
        """Raises :class:`NoSuchCheckpoint` if there is none or it has expired; an expired one is removed."""
        with self._lock:
            checkpoint = self._read(id)
            if checkpoint is None:
                raise NoSuchCheckpoint(f"{id.path} does not exist in {self.folder}")
            if checkpoint.is_expired(now):
                self._remove(id)
                raise NoSuchCheckpoint(f"{id.path} has expired: its time to live is over")
            return checkpoint

    def file_of(self, checkpoint: Checkpoint) -> Path:
        """The safetensors file of a checkpoint that was found."""
        return self._place(checkpoint.id) / checkpoint.file

    def delete(self, id: CheckpointId, now: float) -> None:
        """Raises :class:`NoSuchCheckpoint` if there is none."""
        self.find(id, now)
        with self._lock:
            self._remove(id)

    def set_expiry(self, id: CheckpointId, expires_at: float | None, now: float) -> Checkpoint:
        """Raises :class:`NoSuchCheckpoint` if there is none and :class:`CheckpointError` if the disk cannot be written."""
        return self._change(replace(self.find(id, now), expires_at=expires_at))

    def set_public(self, id: CheckpointId, public: bool, now: float) -> Checkpoint:
        """Raises :class:`NoSuchCheckpoint` if there is none and :class:`CheckpointError` if the disk cannot be written."""
        return self._change(replace(self.find(id, now), public=public))

    def _change(self, checkpoint: Checkpoint) -> Checkpoint:
        with self._lock:
            try:
                self._write_metadata(checkpoint)
            except OSError as error:
                raise self._explain(error, 0) from error
        return checkpoint

    def copy(self, source: CheckpointId, to: CheckpointId, expires_at: float | None, now: float) -> Checkpoint:
        """A copy under another id, which outlives its source. Its arrays take no space of their own where the disk allows that.

        Raises :class:`NoSuchCheckpoint` if there is no source and :class:`CheckpointError` if the disk cannot be written.
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
        """All that have not expired, oldest first; those of one run if ``run`` is given."""
        with self._lock:
            found = [checkpoint for checkpoint in self._scan(run) if not checkpoint.is_expired(now)]
        return sorted(found, key=lambda checkpoint: (checkpoint.created_at, checkpoint.id.path))

    def sweep(self, now: float) -> int:
        """Removes what has expired; returns how many."""
        with self._lock:
            expired = [checkpoint.id for checkpoint in self._scan() if checkpoint.is_expired(now)]
            for id in expired:
                self._remove(id)
        return len(expired)

    def clean(self, now: float) -> None:
        """Removes what a killed process left half-written.

        Another process may be writing: of a run under way elsewhere, whose weights are asked here. So what is young stays.
        """
        with self._lock:
            for file in [*self.folder.glob("*/*/*/state-*.safetensors"), *self.folder.glob("*/*/*/*.partial")]:
                id = _id_of(file.parent)
                checkpoint = None if id is None else self._read(id)
                if id is not None and (checkpoint is None or checkpoint.file != file.name) and _is_left(file, now):
                    logger.info("removing the unfinished file %s", file)
                    file.unlink(missing_ok=True)
                    self._remove_if_empty(file.parent)

    def _place(self, id: CheckpointId) -> Path:
        # Not every file system takes a colon; run ids hold one before and after "train", and no dot.
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
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("ignoring the damaged checkpoint %s: %s", path.parent, error)
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
        # The metadata first: from then on the checkpoint does not exist, whatever happens to the rest.
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
    except OSError:  # not every disk has links
        shutil.copyfile(file, other)


def _is_left(file: Path, now: float) -> bool:
    try:
        return now - file.stat().st_mtime > _LEFT_SECONDS
    except FileNotFoundError:  # it was finished, or removed, just now
        return False


def _bytes_needed(state: State) -> int:
    return sum(array.nbytes for array in state.values())
