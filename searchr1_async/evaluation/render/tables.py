"""Tables before they are drawn: one value that a cell, a page, Markdown, LaTeX and a terminal show alike. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from searchr1_async.watch.html import visible_text

MISSING = "–"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell. Its texts are of unknown origin: whoever draws it escapes them."""

    text: str
    detail: str = ""
    """Stands below or behind the text, smaller: an interval, a count."""
    mark: Literal["", "better", "worse"] = ""
    """It is told apart from chance."""
    href: str | None = None
    """Relative address; made by this package, never by a user."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the first cell of each row is its heading."""

    headings: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    """What is read from it, in one or two sentences."""


def table_of(headings: Sequence[Cell | str], rows: Sequence[Sequence[Cell | str]], caption: str = "") -> Table:
    """A table of cells, plain texts among them."""
    return Table(tuple(map(_cell, headings)), tuple(tuple(map(_cell, row)) for row in rows), caption)


def _cell(value: Cell | str) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)


def one_line(text: str, longest: int = 120) -> str:
    """A text of unknown origin on one line, nothing unseen in it, cut where it is too long."""
    # Cut before it is searched for what is unseen: 1 MB would take a second.
    shown = visible_text(" ".join(text[: 4 * longest].split()))
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


def percent(value: float | None) -> str:
    """``0.4123`` as ``41.2``; of nothing a dash."""
    return MISSING if _is_missing(value) else f"{100 * value:.1f}"  # type: ignore[operator]


def points(value: float | None) -> str:
    """A difference of shares, ``0.041`` as ``+4.1``; of nothing a dash."""
    return MISSING if _is_missing(value) else f"{100 * value:+.1f}"  # type: ignore[operator]


def interval(low: float | None, high: float | None, *, signed: bool = False) -> str:
    """``[36.9, 45.6]``; of nothing empty."""
    if _is_missing(low) or _is_missing(high):
        return ""
    shown = points if signed else percent
    return f"[{shown(low)}, {shown(high)}]"


def p_value(value: float | None) -> str:
    """Two digits, and never 0."""
    if _is_missing(value):
        return MISSING
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"  # type: ignore[operator]


def number(value: float | None, digits: int = 0) -> str:
    """With thousands in groups; of nothing a dash."""
    return MISSING if _is_missing(value) else f"{value:,.{digits}f}"


def counted(count: int, noun: str) -> str:
    """``1 question``, ``1,200 questions``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _is_missing(value: float | None) -> bool:
    return value is None or math.isnan(value)
