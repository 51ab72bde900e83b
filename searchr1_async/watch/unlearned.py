"""Finished groups on disk until a recorded step holds them, so that a killed run need not play them again.

One append-only file between two steps, deleted with the last of its groups. A record is a place, a group as lines of JSON,
their CRC-32, and one byte that is changed when the group is forgotten before its file is. JSON, since a run's folder may come from somebody else, and reading it must not run code.
A group comes back equal to what was written, log-probability for log-probability; only a question's metadata come back as
their JSON does (a tuple as a list), and two surrogates that are a pair as their character.

A process may be killed at any moment: a record cut short ends its file. Nothing is synced to the disk: a kill loses nothing
that was written, a power cut what the system had not written yet, and such a group is played again.
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

from searchr1_async.episodes.types import Episode, Group, Passage, Question, SearchCall, StopReason, Turn
from searchr1_async.files import write_all

logger = logging.getLogger(__name__)

_MAGIC = b"SR1GRP01"
"""Begins every file; its last digits are the format's version."""
_HEAD = struct.Struct("<IIqB")
"""Begins every record: bytes of its body, CRC-32 of its place and body, place, kept or forgotten."""
_PLACE = struct.Struct("<q")
_KEPT, _FORGOTTEN = 0xA5, 0x5A
"""No flipped bit makes one of the other."""
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What reading lines raises that are whole and yet no group."""
_FILE = re.compile(r"(\d{6,})\.groups")


class _At(NamedTuple):
    """Where a record is."""

    file: int
    offset: int


class UnlearnedGroups:
    """The finished groups that no recorded step holds yet, each with its place.

    All methods block on the disk: call them in a worker thread. Thread-safe; for one process at a time (the run's lock).

    Args:
        folder: made when something is first written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        self._lock = threading.Lock()
        self._held: dict[int, _At] = {}
        self._files = {number for number, _ in self._listed()}
        # Never appended to what an earlier process left: its end may be torn.
        self._current = max(self._files, default=0) + 1

    def write(self, groups: Sequence[tuple[int, Group]]) -> None:
        """Keeps finished groups; one of a place that is held already takes its place.

        Several at once cost less: one write. 0.16 ms of CPU for an episode of 1,500 tokens with its passages; the interpreter's lock
        is held for an episode at a time, 4 ms for one of 54,000 tokens.

        Args:
            groups: each after its place.

        Raises:
            OSError: they cannot be written (a full disk); none of them is kept, what was is as it was.
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
                if place in self._held:
                    replaced.append(self._held[place])
                self._held[place] = _At(self._current, offset)
                offset += _HEAD.size + len(body)
            self._bury(replaced)

    def _append(self, records: bytes) -> int:
        """Where in the current file they begin."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._path(self._current).open("ab", buffering=0) as file:
            before = file.tell()
            try:
                write_all(file, records if before else _MAGIC + records)
            except OSError:  # the half that was written would hide what is appended later
                with suppress(OSError):
                    file.truncate(before)
                raise
        self._files.add(self._current)
        return before or len(_MAGIC)

    def load(self, is_open: Callable[[int], bool] = lambda place: True) -> dict[int, Group]:
        """The groups on disk, by place; they are held from now on as those written are. Call it before :meth:`write`.

        What is torn, half or of another format is passed over: such groups are played again.

        Args:
            is_open: whether the group of a place is in no recorded step yet: :meth:`ResumePoint.is_open
                <searchr1_async.learn.checkpoints.ResumePoint.is_open>`. The others are forgotten: those that a step holds which was
                recorded right before a kill.

        Raises:
            OSError: the folder cannot be read, or written where something is to be forgotten.
        """
        found: dict[int, Group] = {}
        with self._lock:
            over: list[_At] = []
            for number, path in self._listed():
                for place, offset, body in _records(path):
                    if not is_open(place):
                        over.append(_At(number, offset))
                        continue
                    try:
                        found[place] = _decoded(body)
                    except _UNREADABLE as error:
                        logger.warning(
                            "%s: the group of place %d cannot be read (%s)", path, place, type(error).__name__
                        )
                        continue
                    if place in self._held:
                        over.append(self._held[place])
                    self._held[place] = _At(number, offset)
            self._bury(over)
        return found

    def forget(self, places: Iterable[int]) -> None:
        """A recorded step holds the groups of these places now, or nobody wants them; unknown places are passed over.

        A file goes with the last of its groups, so a group that waits long keeps those on disk that were written between the same
        two steps.

        Raises:
            OSError: the folder cannot be written.
        """
        with self._lock:
            gone = [self._held.pop(place) for place in places if place in self._held]
            if self._current in self._files:
                self._current += 1
            self._bury(gone)

    def _bury(self, gone: Iterable[_At]) -> None:
        """Marks records whose file others need still, so that no later load finds them; deletes the other files."""
        needed = {at.file for at in self._held.values()}
        by_file: defaultdict[int, list[int]] = defaultdict(list)
        for at in gone:
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
        """Forgets all: the run begins anew."""
        with self._lock:
            self._held.clear()
            self._files.clear()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _listed(self) -> list[tuple[int, Path]]:
        """In the order in which they were written."""
        if not self._folder.is_dir():
            return []
        named = ((_FILE.fullmatch(path.name), path) for path in self._folder.iterdir())
        return sorted((int(name[1]), path) for name, path in named if name)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.groups"


def _checksum(place: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(_PLACE.pack(place)))


def _records(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Place, offset and body of a file's records that are kept, up to the first that is not whole; none of another format."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(_MAGIC)) != _MAGIC:
            return
        while (offset := file.tell()) + _HEAD.size <= size:
            length, checksum, place, state = _HEAD.unpack(file.read(_HEAD.size))
            if length > size - file.tell():  # torn, or no length at all: nothing of that many bytes is to be read
                return
            body = file.read(length)
            if state not in (_KEPT, _FORGOTTEN) or _checksum(place, body) != checksum:
                return
            if state == _KEPT:
                yield place, offset, body


def _encoded(group: Group) -> bytes:
    """The question, then each episode, complete ones first: a line each, for one call of orjson holds the interpreter's lock."""
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
    # orjson writes null for what is no finite number, which is no log-probability but might be a score.
    return _line(values) if math.isfinite(_sum(episode)) else _slow_line(values)


def _sum(episode: Episode) -> float:
    """Finite only if every number of the episode is."""
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
    """What orjson does not write: lone surrogates, infinities, whole numbers of more than 64 bits, keys that are no text."""
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
    head, *lines = body.split(b"\n")  # within JSON a line's end is escaped
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
