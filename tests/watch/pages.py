"""Shared by viewer tests: a byte tokenizer, a strict HTML parser, and access to a page's data."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

from searchr1_async.episodes.types import Turn

VOID = {"meta", "img", "br", "input"}


class BytesTokenizer:
    """One token per byte: the hardest case for pieces."""

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")


def spoken(text: str, logprob: float = -0.5, **changes: Any) -> Turn:
    """A turn with ``text``, tokenized by :class:`BytesTokenizer`."""
    tokens = tuple(text.encode("utf-8"))
    return Turn(tokens, (logprob,) * len(tokens), text, **{"content": text, **changes})


class Page(HTMLParser):
    """Checks that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        return "".join(data for tag, data in self.words if tag not in ("style", "script"))


def data_of(page: str) -> dict[str, Any]:
    """The unpacked blocks of a page, by name."""
    found = re.findall(r'<script type="application/octet-stream" id="([^"]+)">([A-Za-z0-9+/=]*)</script>', page)
    return {name: json.loads(gzip.decompress(base64.b64decode(content))) for name, content in found}
