"""An in-memory LRU cache, and the encoding of cached passages."""

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
    """An LRU cache of at most ``max_entries``; 0 disables it. Raises ConfigurationError if negative."""

    def __init__(self, max_entries: int) -> None:
        if max_entries < 0:
            raise ConfigurationError(f"max_entries is {max_entries}: give 0 or more")
        self._max_entries = max_entries
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The key's value, marked as most recently used; None if missing."""
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
        return value

    def put(self, key: Key, value: Value) -> None:
        """Stores a value (not None) as the most recently used."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def __len__(self) -> int:
        return len(self._entries)


def encode_passages(passages: Sequence[Passage]) -> bytes:
    """Lossless encoding, including the score's bits and lone surrogates."""
    parts = [_HEAD.pack(_PASSAGES_VERSION, len(passages))]
    for passage in passages:
        texts = [text.encode("utf-8", "surrogatepass") for text in (passage.id, passage.title, passage.text)]
        parts += (_PASSAGE.pack(passage.score, *map(len, texts)), *texts)
    return b"".join(parts)


def decode_passages(data: bytes) -> tuple[Passage, ...] | None:
    """Inverse of :func:`encode_passages`; None for invalid bytes or another version."""
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
