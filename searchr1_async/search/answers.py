"""Cache of answers, in memory and optionally on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from searchr1_async.boundary.waits import OwnThread
from searchr1_async.episodes.types import Passage
from searchr1_async.search.cache import DiskCache, LeastRecentlyUsed, decode_passages, encode_passages

Answer = tuple[Passage, ...]
AnswerKey = tuple[str, int]
"""A cleaned query and the number of passages."""


class AnswerCache:
    """Answers by query, each valid for one index state. ``max_entries`` bounds the LRU in memory (about 3 KB per answer of
    three passages), ``max_bytes`` the optional disk cache at ``path``, which processes may share.
    """

    def __init__(self, max_entries: int, path: Path | None = None, max_bytes: int = 1 << 30) -> None:
        self._memory: LeastRecentlyUsed[tuple[str, AnswerKey], Answer] = LeastRecentlyUsed(max_entries)
        self._disk = None if path is None else DiskCache(path, max_bytes=max_bytes)
        self._thread = OwnThread("searchr1-cache")

    @property
    def is_on_disk(self) -> bool:
        return self._disk is not None

    def recall(self, index: str, keys: Iterable[AnswerKey]) -> dict[AnswerKey, Answer]:
        """Answers from memory. ``index`` identifies everything an answer depends on besides its key."""
        found = {key: self._memory.get((index, key)) for key in keys}
        return {key: answer for key, answer in found.items() if answer is not None}

    async def look_up(self, index: str, keys: Iterable[AnswerKey]) -> dict[AnswerKey, Answer]:
        """Answers from disk, which are then also kept in memory."""
        if self._disk is None:
            return {}
        by_text = {_disk_key(key): key for key in keys}
        values = await self._thread.run(self._disk.get_many, _namespace(index), list(by_text))
        found: dict[AnswerKey, Answer] = {}
        for text, value in values.items():
            if (answer := decode_passages(value)) is not None:
                found[by_text[text]] = answer
                self._memory.put((index, by_text[text]), answer)
        return found

    def remember(self, index: str, answers: Mapping[AnswerKey, Answer]) -> None:
        """Stores answers in memory."""
        for key, answer in answers.items():
            self._memory.put((index, key), answer)

    async def keep(self, index: str, answers: Mapping[AnswerKey, Answer]) -> None:
        """Stores answers on disk."""
        if self._disk is not None and answers:
            encoded = {_disk_key(key): encode_passages(answer) for key, answer in answers.items()}
            await self._thread.run(self._disk.put_many, _namespace(index), encoded)

    async def aclose(self) -> None:
        """Releases the file and the thread; the memory cache stays."""
        if self._disk is not None:
            await self._thread.run(self._disk.close)
        self._thread.close()


def _disk_key(key: AnswerKey) -> str:
    text, n_results = key
    return f"{n_results}\0{text}"


def _namespace(index: str) -> str:
    return hashlib.sha256(index.encode("utf-8", "surrogatepass")).hexdigest()[:32]
