"""The simulated prefix cache of the scripted backend."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from searchr1_async.local.backend import Int32Array
from searchr1_async.local.packing import common_prefix_length

MOST_TOKENS = 2_000_000
"""Maximum tokens cached per sampler; beyond it the cache is cleared."""


class PrefixCache:
    """The token sequences that one sampler has run; a sequence replaces its own prefixes."""

    def __init__(self) -> None:
        # Sorted. Big-endian bytes sort like the integers, so sequences with the longest common prefix are neighbours.
        self._texts: list[bytes] = []
        self._tokens = 0

    def hits(self, prompt: Int32Array) -> int:
        """Number of cached tokens of ``prompt``, excluding the last one, whose logits are always needed."""
        key = _key(prompt)
        place = bisect.bisect(self._texts, key)
        near = self._texts[max(0, place - 1) : place + 1]
        known = (common_prefix_length(np.frombuffer(text, ">i4"), prompt) for text in near)
        return min(max(known, default=0), len(prompt) - 1)

    def add(self, prompt: Int32Array, continuations: Sequence[Int32Array]) -> None:
        """Cache a prompt with each continuation, without the last token, which was never run."""
        if self._tokens > MOST_TOKENS:
            self._texts.clear()
            self._tokens = 0
        for tokens in continuations:
            key = _key(np.concatenate([prompt, tokens[:-1]]))
            place = bisect.bisect_left(self._texts, key)
            if place < len(self._texts) and self._texts[place].startswith(key):
                continue
            while place and key.startswith(self._texts[place - 1]):
                place -= 1
                self._tokens -= len(self._texts.pop(place)) // 4
            self._texts.insert(place, key)
            self._tokens += len(key) // 4


def _key(tokens: Int32Array) -> bytes:
    return np.ascontiguousarray(tokens, dtype=">i4").tobytes()
