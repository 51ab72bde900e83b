"""Text that is not ours, made fit to be shown to a model: nothing in it can pass for markup."""

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
"""Markup of both formats: defused wherever text that is not ours is shown to the model."""


@dataclass(frozen=True, slots=True)
class PlainText:
    """Encodes text that is not ours so that nothing in it can pass for markup."""

    tokenizer: Any
    markup: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: Any) -> PlainText:
        """For a Hugging Face tokenizer and the tokens that were added to it."""
        added = [str(token) for token in tokenizer.get_added_vocab()]
        words = sorted({*added, *_MARKUP} - {""}, key=len, reverse=True)
        return cls(tokenizer, re.compile("|".join(map(re.escape, words))))

    def defuse(self, text: str) -> str:
        """The text with every special token and tag broken by a space: a passage cannot end its message or fake a call."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates have no tokens
        return self.markup.sub(lambda match: match.group()[0] + " " + match.group()[1:], text)

    def encode(self, text: str) -> list[int]:
        """Its tokens, as they stand: what is not ours must have been defused."""
        return self.tokenizer.encode(text, add_special_tokens=False)


def query_blocks(plain: PlainText, queries: Sequence[str], results: Sequence[Sequence[Passage]]) -> str:
    """The results of several queries as the model reads them: each query with its passages below it."""
    blocks = [
        f"Query: {plain.defuse(query)}\n{passage_lines(plain, passages)}"
        for query, passages in zip(queries, results, strict=True)
    ]
    return "\n\n".join(blocks)


def passage_lines(plain: PlainText, passages: Sequence[Passage]) -> str:
    """Passages as the model reads them: title and text, numbered only where there are several."""
    lines = []
    for number, passage in enumerate(passages, 1):
        text = (
            f"{passage.title}: {passage.text}" if passage.title and passage.title not in passage.text else passage.text
        )
        text = " ".join(plain.defuse(text).split())
        lines.append(f"({number}) {text}" if len(passages) > 1 else text)
    return "\n".join(lines) if lines else "Nothing was found."
