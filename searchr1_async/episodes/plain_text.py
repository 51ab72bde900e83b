"""Encodes untrusted text so that it cannot pass for markup."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from searchr1_async.episodes.types import Passage

_MARKUP = tuple(
    f"<{slash}{tag}>"
    for tag in ("search", "information", "answer", "tool_call", "tool_response", "think")
    for slash in ("", "/")
)
"""Markup of both formats, escaped in untrusted text."""


@dataclass(frozen=True, slots=True)
class PlainText:
    """Encoder for untrusted text."""

    tokenizer: Any
    markup: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: Any) -> PlainText:
        """For a Hugging Face tokenizer and its added tokens."""
        added = [str(token) for token in tokenizer.get_added_vocab()]
        words = sorted({*added, *_MARKUP} - {""}, key=len, reverse=True)
        return cls(tokenizer, re.compile("|".join(map(re.escape, words))))

    def defuse(self, text: str) -> str:
        """Breaks every special token and tag with a space, so that a passage cannot end its message or fake a call."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates have no tokens
        return self.markup.sub(lambda match: match.group()[0] + " " + match.group()[1:], text)

    def encode(self, text: str) -> list[int]:
        """Tokens of the text; untrusted parts must have been defused."""
        return self.tokenizer.encode(text, add_special_tokens=False)


def query_blocks(plain: PlainText, queries: Sequence[str], results: Sequence[Sequence[Passage]]) -> str:
    """Formats each query with its passages below."""
    blocks = [
        f"Query: {plain.defuse(query)}\n{passage_lines(plain, passages)}"
        for query, passages in zip(queries, results, strict=True)
    ]
    return "\n\n".join(blocks)


def passage_lines(plain: PlainText, passages: Sequence[Passage]) -> str:
    """Formats passages with title and text, numbered if there are several."""
    lines = []
    for number, passage in enumerate(passages, 1):
        text = (
            f"{passage.title}: {passage.text}" if passage.title and passage.title not in passage.text else passage.text
        )
        text = " ".join(plain.defuse(text).split())
        lines.append(f"({number}) {text}" if len(passages) > 1 else text)
    return "\n".join(lines) if lines else "Nothing was found."
