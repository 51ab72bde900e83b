"""Vectors made of words, without a model: what an embedding service answers where only its manners are measured.

A text's vector is the sum of its words' directions, which come from the words' hashes. Long words count for more and stop
words for little, so a query finds the passage that shares its rarer words.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")
_STOP_WORDS = frozenset(
    _WORD.findall(
        """a an and are as at be by did do does for from had has have how in is it its of on or that the their there they
        this to was were what when where which who whom whose why will with"""
    )
)
_PLACES = 32
"""Numbers of a word's direction that are not zero: of 768, two words share 1.3 places on average, with either sign."""
_MOST_WORDS = 200_000
"""Words whose direction is kept, 40 MB in all."""


class WordVectors:
    """Equal texts have equal vectors, in every process. About 65 us for a passage of 100 words, on one core."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._hashes = np.empty((1_024, _PLACES), np.uint16)
        self._weights = np.empty(1_024, np.float32)

    def embed(self, text: str, dimension: int = 768) -> NDArray[np.float32]:
        """The vector, float32; its length lies between 0.6 and 0.75, as those of Gemini at 768 dimensions do."""
        if len(self._rows) > _MOST_WORDS:
            self._rows.clear()
        counts = Counter(_WORD.findall(text.lower())) or Counter([""])
        rows = np.fromiter(map(self._row, counts), np.intp, len(counts))
        hashes = self._hashes[rows]
        weights = self._weights[rows] * np.sqrt(np.fromiter(counts.values(), np.float32, len(counts)))
        signed = np.where(hashes & 1, weights[:, None], -weights[:, None])
        vector = np.bincount(((hashes >> 1) % dimension).ravel(), signed.ravel(), minlength=dimension)
        length = 0.6 + 0.15 * hashlib.blake2b(text.encode(), digest_size=1).digest()[0] / 255
        return (vector * (length / np.linalg.norm(vector))).astype(np.float32)

    def _row(self, word: str) -> int:
        """Where the word's hash and weight stand."""
        row = self._rows.get(word)
        if row is None:
            row = self._rows[word] = len(self._rows)
            if row == len(self._hashes):
                self._hashes = np.concatenate([self._hashes, np.empty_like(self._hashes)])
                self._weights = np.concatenate([self._weights, np.empty_like(self._weights)])
            self._hashes[row] = np.frombuffer(hashlib.blake2b(word.encode(), digest_size=2 * _PLACES).digest(), "<u2")
            self._weights[row] = 0.05 if word in _STOP_WORDS else 0.4 + 0.1 * min(len(word), 12)
        return row
