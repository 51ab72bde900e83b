"""Finished groups kept on disk until a step that contains them is recorded, so a killed run need not redo them.

One append-only file between two steps, deleted with the last of its groups. A record is a place, a group as JSON lines, their
CRC-32, and a state byte that is flipped when the group is forgotten before its file is. JSON rather than pickle: reading a
foreign run folder must not execute code. Groups round-trip exactly, except that question metadata become plain JSON (tuples
become lists) and surrogate pairs become characters.

The process may be killed at any moment: a truncated record ends its file. Nothing is fsynced: a kill loses nothing written, a
power loss may lose recent groups, which are then redone.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import struct
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from searchr1_async.boundary.paths import write_all
from searchr1_async.episodes.types import Episode, Group, Passage, Question, SearchCall, StopReason, Turn

logger = logging.getLogger(__name__)

_MAGIC = b"SR1GRP01"
"""File header; the last digits are the format version."""
_HEAD = struct.Struct("<IIqB")
"""Record header: body length, CRC-32 of place and body, place, kept or forgotten."""
_PLACE = struct.Struct("<q")
_KEPT, _FORGOTTEN = 0xA5, 0x5A
"""Differ in every bit, so that a flipped bit cannot turn one into the other."""
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""Raised by records that are intact but do not decode to a group."""
_FILE = re.compile(r"(\d{6,})\.groups")


class _At(NamedTuple):
    file: int
    offset: int


class UnlearnedGroups:
    """Finished groups that no recorded step contains yet, keyed by place.

    All methods block on disk I/O: call them in a worker thread. Thread-safe; one process at a time (the run's lock).

    Args:
        folder: created on first write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        self._lock = threading.Lock()
        self._stored: dict[int, _At] = {}
        self._files = {number for number, _ in self._listed()}
        # Never append to a file of an earlier process: its end may be truncated.
        self._current = max(self._files, default=0) + 1

    def write(self, groups: Sequence[tuple[int, Group]]) -> None:
        """Store finished groups, replacing stored ones of the same place. Batching is cheaper: one call is one write.

        Args:
            groups: pairs of place and group.

        Raises:
            OSError: the write failed (disk full); none of the groups is stored, earlier ones are unchanged.
        """
        if not groups:
            return
        bodies = [(place, _encoded(group)) for place, group in groups]
        heads = [_HEAD.pack(len(body), _checksum(place, body), place, _KEPT) for place, body in bodies]
        records = b"".join(part for head, (_, body) in zip(heads, bodies, strict=True) for part in (head, body))
        with self._lock:
            offset = self._append(records)
            replaced: list[_At] = []
            for place, body in bodies:
                if place in self._stored:
                    replaced.append(self._stored[place])
                self._stored[place] = _At(self._current, offset)
                offset += _HEAD.size + len(body)
            self._delete(replaced)

    def _append(self, records: bytes) -> int:
        """Append to the current file; returns the offset of the first record."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._path(self._current).open("ab", buffering=0) as file:
            before = file.tell()
            try:
                write_all(file, records if before else _MAGIC + records)
            except OSError:  # a partial record would hide later ones
                with suppress(OSError):
                    file.truncate(before)
                raise
        self._files.add(self._current)
        return before or len(_MAGIC)

    def load(self, is_open: Callable[[int], bool] = lambda place: True) -> dict[int, Group]:
        """The groups on disk, by place. Call it before :meth:`write`. Truncated or unreadable records are skipped: their groups are
        redone.

        Args:
            is_open: whether no recorded step contains the group of this place: :meth:`ResumePoint.is_open
                <searchr1_async.runs.checkpoints.ResumePoint.is_open>`. The other groups are forgotten: their step was recorded
                right before a kill.

        Raises:
            OSError: the folder is not readable, or not writable when something must be forgotten.
        """
        found: dict[int, Group] = {}
        with self._lock:
            obsolete: list[_At] = []
            for number, path in self._listed():
                for place, offset, body in _records(path):
                    if not is_open(place):
                        obsolete.append(_At(number, offset))
                        continue
                    try:
                        found[place] = _decoded(body)
                    except _UNREADABLE as error:
                        logger.warning(
                            "%s: the group of place %d cannot be read (%s)", path, place, type(error).__name__
                        )
                        continue
                    if place in self._stored:
                        obsolete.append(self._stored[place])
                    self._stored[place] = _At(number, offset)
            self._delete(obsolete)
        return found

    def forget(self, places: Iterable[int]) -> None:
        """Drop groups that a recorded step contains or that are no longer needed; unknown places are ignored.

        A file is deleted with the last of its groups.

        Raises:
            OSError: the folder is not writable.
        """
        with self._lock:
            dropped = [self._stored.pop(place) for place in places if place in self._stored]
            if self._current in self._files:
                self._current += 1
            self._delete(dropped)

    def _delete(self, dropped: Iterable[_At]) -> None:
        """Mark records as forgotten in files that are still needed; delete the other files."""
        needed = {at.file for at in self._stored.values()}
        by_file: defaultdict[int, list[int]] = defaultdict(list)
        for at in dropped:
            by_file[at.file].append(at.offset)
        for number in needed & set(by_file):
            with self._path(number).open("r+b", buffering=0) as file:
                for offset in by_file[number]:
                    file.seek(offset + _HEAD.size - 1)
                    file.write(bytes([_FORGOTTEN]))
        for number in self._files - needed:
            self._path(number).unlink(missing_ok=True)
            self._files.discard(number)

    def clear(self) -> None:
        """Delete everything: the run starts over."""
        with self._lock:
            self._stored.clear()
            self._files.clear()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _listed(self) -> list[tuple[int, Path]]:
        """Files in write order."""
        if not self._folder.is_dir():
            return []
        named = ((_FILE.fullmatch(path.name), path) for path in self._folder.iterdir())
        return sorted((int(name[1]), path) for name, path in named if name)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.groups"


def _checksum(place: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(_PLACE.pack(place)))


def _records(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Place, offset and body of each kept record, up to the first truncated one; none if the format differs."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(_MAGIC)) != _MAGIC:
            return
        while (offset := file.tell()) + _HEAD.size <= size:
            length, checksum, place, state = _HEAD.unpack(file.read(_HEAD.size))
            if length > size - file.tell():  # truncated, or a corrupt length
                return
            body = file.read(length)
            if state not in (_KEPT, _FORGOTTEN) or _checksum(place, body) != checksum:
                return
            if state == _KEPT:
                yield place, offset, body


def _encoded(group: Group) -> bytes:
    """The question, then one line per episode, complete ones first. Per episode because each orjson call holds the GIL."""
    question = {**{name: getattr(group.question, name) for name in _QUESTION}, "complete": len(group.episodes)}
    return b"\n".join([_line(question), *map(_episode_line, (*group.episodes, *group.failed))])


_QUESTION = ("id", "question", "golden_answers", "data_source", "metadata")


def _episode_line(episode: Episode) -> bytes:
    values = {
        "prompt_tokens": episode.prompt_tokens,
        "turns": episode.turns,
        "stop_reason": episode.stop_reason,
        "answer": episode.answer,
        "reward": episode.reward,
        "reward_parts": episode.reward_parts,
        "error": episode.error,
        "seconds": episode.seconds,
        "given": episode.given,
    }
    # orjson writes null for NaN and infinities, which a score might be.
    return _line(values) if math.isfinite(_sum(episode)) else _slow_line(values)


def _sum(episode: Episode) -> float:
    """Finite only if every number of the episode is finite."""
    total = episode.reward + sum(episode.reward_parts.values()) + episode.seconds
    for turn in episode.turns:
        total += sum(turn.logprobs) + turn.seconds
    for call in (episode.given, *episode.calls):
        if call is not None:
            total += call.seconds + sum(passage.score for found in call.results for passage in found)
    return total


def _line(values: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(values, default=_plain)
    except orjson.JSONEncodeError:
        return _slow_line(values)


def _slow_line(values: Mapping[str, Any]) -> bytes:
    """For what orjson rejects: lone surrogates, infinities, integers over 64 bits, keys that are not strings."""
    return json.dumps(values, default=_plain, skipkeys=True).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    return str(value)


def _read_line(line: bytes) -> dict[str, Any]:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)


def _decoded(body: bytes) -> Group:
    head, *lines = body.split(b"\n")  # JSON escapes newlines
    row = _read_line(head)
    complete = row.pop("complete")
    row["golden_answers"] = tuple(row["golden_answers"])
    question = Question(**row)
    episodes = tuple(_episode(question, _read_line(line)) for line in lines)
    return Group(question, episodes[:complete], episodes[complete:])


def _episode(question: Question, row: dict[str, Any]) -> Episode:
    row["prompt_tokens"] = tuple(row["prompt_tokens"])
    row["turns"] = tuple(map(_turn, row["turns"]))
    row["stop_reason"] = StopReason(row["stop_reason"])
    row["given"] = _call(row.get("given"))
    return Episode(question, **row)


def _turn(row: dict[str, Any]) -> Turn:
    for name in ("sampled_tokens", "logprobs", "appended_tokens"):
        row[name] = tuple(row[name])
    row["call"] = _call(row["call"])
    return Turn(**row)


def _call(row: dict[str, Any] | None) -> SearchCall | None:
    if row is None:
        return None
    row["queries"] = tuple(row["queries"])
    row["results"] = tuple(tuple(Passage(**passage) for passage in found) for found in row["results"])
    return SearchCall(**row)
