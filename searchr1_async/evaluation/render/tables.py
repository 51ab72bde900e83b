"""Tables independent of output format (HTML, Markdown, LaTeX, text), and number formatting. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from searchr1_async.watch.viewer.markup import visible_text

MISSING = "–"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell. Its texts are untrusted: renderers escape them."""

    text: str
    detail: str = ""
    """Secondary text in a smaller font: an interval, a count."""
    mark: Literal["", "better", "worse"] = ""
    """Marks a significant result."""
    href: str | None = None
    """Relative address, made by this package only."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the first cell of each row is its heading."""

    headings: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""


def table_of(headings: Sequence[Cell | str], rows: Sequence[Sequence[Cell | str]], caption: str = "") -> Table:
    """A table from cells or plain texts."""
    return Table(tuple(map(_cell, headings)), tuple(tuple(map(_cell, row)) for row in rows), caption)


def _cell(value: Cell | str) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)


def one_line(text: str, longest: int = 120) -> str:
    """Untrusted text as one line without invisible characters, truncated to ``longest``."""
    # Truncated first: scanning a long text for invisible characters is slow.
    shown = visible_text(" ".join(text[: 4 * longest].split()))
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


def percent(value: float | None) -> str:
    """``0.4123`` as ``41.2``; a dash if missing."""
    return MISSING if _is_missing(value) else f"{100 * value:.1f}"  # type: ignore[operator]


def points(value: float | None) -> str:
    """A difference of shares, ``0.041`` as ``+4.1``; a dash if missing."""
    return MISSING if _is_missing(value) else f"{100 * value:+.1f}"  # type: ignore[operator]


def interval(low: float | None, high: float | None, *, signed: bool = False) -> str:
    """``[36.9, 45.6]``; empty if missing."""
    if _is_missing(low) or _is_missing(high):
        return ""
    shown = points if signed else percent
    return f"[{shown(low)}, {shown(high)}]"


def p_value(value: float | None) -> str:
    """Two significant digits, never 0."""
    if _is_missing(value):
        return MISSING
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"  # type: ignore[operator]


def number(value: float | None, digits: int = 0) -> str:
    """With thousands separators; a dash if missing."""
    return MISSING if _is_missing(value) else f"{value:,.{digits}f}"


def counted(count: int, noun: str) -> str:
    """``1 question``, ``1,200 questions``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _is_missing(value: float | None) -> bool:
    return value is None or math.isnan(value)
