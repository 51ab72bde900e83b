"""Tokenizer with a cache for texts encoded repeatedly."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

REMEMBERED = 2048
"""Cached texts; about 15 MB with three passages each."""


class RememberingTokenizer:
    """A Hugging Face tokenizer whose ``encode`` caches recent texts.

    Members of a group search for much the same, and encoding is a large part of an episode's CPU time. Cached tokens are also
    shared objects, which saves memory.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._encode = lru_cache(maxsize=REMEMBERED)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
        )

    def encode(self, text: str, *, add_special_tokens: bool = True, **options: Any) -> list[int]:
        """As the tokenizer's; cached only without special tokens and options."""
        if add_special_tokens or options:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens, **options)
        return list(self._encode(text))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._tokenizer(*arguments, **options)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
