"""What the search remembers: answers in memory, and what outlives the process on disk."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ConfigurationError
from searchr1_async.search.disk_cache import DiskCache

__all__ = ["DiskCache", "LeastRecentlyUsed", "decode_passages", "encode_passages"]

Key = TypeVar("Key")
Value = TypeVar("Value")

_PASSAGES_VERSION = 1
_HEAD = struct.Struct("<BI")
_PASSAGE = struct.Struct("<dIII")


class LeastRecentlyUsed(Generic[Key, Value]):
    """A mapping in memory that forgets what was asked for least recently.

    Args:
        max_entries: entries that it holds at most; 0 holds none.

    Raises:
        ConfigurationError: a negative ``max_entries``.
    """

    def __init__(self, max_entries: int) -> None:
        if max_entries < 0:
            raise ConfigurationError(f"max_entries is {max_entries}: give 0 or more")
        self._max_entries = max_entries
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The key's value, which is now the most recently used; None where there is none."""
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
        return value

    def put(self, key: Key, value: Value) -> None:
        """Keeps a value (not None), as the most recently used."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


def encode_passages(passages: Sequence[Passage]) -> bytes:
    """Passages as bytes, to the last bit of the score; lone surrogates in the texts are kept."""
    parts = [_HEAD.pack(_PASSAGES_VERSION, len(passages))]
    for passage in passages:
        texts = [text.encode("utf-8", "surrogatepass") for text in (passage.id, passage.title, passage.text)]
        parts += (_PASSAGE.pack(passage.score, *map(len, texts)), *texts)
    return b"".join(parts)


def decode_passages(data: bytes) -> tuple[Passage, ...] | None:
    """What :func:`encode_passages` was given; None where the bytes are no passages, or of another version: a miss."""
    try:
        version, count = _HEAD.unpack_from(data)
        if version != _PASSAGES_VERSION:
            return None
        passages: list[Passage] = []
        at = _HEAD.size
        for _ in range(count):
            score, *lengths = _PASSAGE.unpack_from(data, at)
            at += _PASSAGE.size
            texts: list[str] = []
            for length in lengths:
                texts.append(data[at : at + length].decode("utf-8", "surrogatepass"))
                at += length
            passages.append(Passage(texts[0], texts[1], texts[2], score))
    except (struct.error, UnicodeDecodeError):
        return None
    return tuple(passages) if at == len(data) else None
