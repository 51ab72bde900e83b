"""Segments of a turn's text: thoughts, tool calls, the answer, chat markup, and other text. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

Kind = Literal["thought", "call", "answer", "markup", "said"]

_OPENING: dict[str, Kind] = {"think": "thought", "tool_call": "call", "search": "call", "answer": "answer"}
_TAG = re.compile(r"<(/?)(think|tool_call|search|answer)>|<\|[A-Za-z0-9_]{1,40}\|>")


def segments(text: str, content: str = "") -> list[tuple[Kind, int]]:
    """Kinds of a turn's segments with their lengths in characters, which add up to the text's length.

    Args:
        text: of the turn, markup included.
        content: the turn without chat markup and reasoning. If ``text`` has no thought tags, what precedes its content is the
            reasoning.

    Tags belong to their segment; an unclosed one extends to the end. A closing ``</think>`` without an opening one ends a thought
    that began in the prompt. Takes linear time.
    """
    out: list[tuple[Kind, int]] = []
    inside: Kind | None = None
    closing = ""
    start = 0
    has_thought = False

    def add(kind: Kind, end: int) -> None:
        nonlocal start
        if end > start:
            if out and out[-1][0] == kind:
                out[-1] = (kind, out[-1][1] + end - start)
            else:
                out.append((kind, end - start))
        start = end

    for match in _TAG.finditer(text):
        name = match[2]
        if inside is not None:
            if name == closing and match[1]:
                add(inside, match.end())
                inside = None
        elif name is None:
            add("said", match.start())
            add("markup", match.end())
        elif not match[1]:
            add("said", match.start())
            inside, closing = _OPENING[name], name
            has_thought |= inside == "thought"
        elif name == "think" and not has_thought:
            out.clear()
            start = 0
            add("thought", match.end())
            has_thought = True
    add(inside or "said", len(text))
    return out if has_thought or not content else _before(text, content, out)


def _before(text: str, content: str, found: list[tuple[Kind, int]]) -> list[tuple[Kind, int]]:
    """``found``, with the text before the turn's content as thought."""
    place = text.find(content)
    if place <= 0:
        return found
    out: list[tuple[Kind, int]] = []
    at = 0
    for kind, length in found:
        ahead = min(max(place - at, 0), length)
        said = text[at : at + ahead]
        if kind == "said" and said.strip():
            out.append(("thought", ahead))
            if length > ahead:
                out.append((kind, length - ahead))
        else:
            out.append((kind, length))
        at += length
    return out


T = TypeVar("T")


def overlaid(
    text: str, kinds: Iterable[tuple[Kind, int]], pieces: Iterable[tuple[str, T]], limit: int
) -> Iterator[tuple[Kind, list[tuple[str, T]]]]:
    """The first ``limit`` characters by kind, each segment split at piece boundaries. A piece that spans two kinds is in both."""
    queue = iter(pieces)
    piece, value = next(queue, ("", None))
    left = min(limit, len(text))
    for kind, length in kinds:
        length = min(length, left)
        left -= length
        inside: list[tuple[str, T]] = []
        while length > 0:
            if not piece:
                following = next(queue, None)
                if following is None:
                    break
                piece, value = following
                continue
            taken = piece[:length]
            inside.append((taken, value))  # type: ignore[arg-type]
            piece = piece[len(taken) :]
            length -= len(taken)
        if inside:
            yield kind, inside
