"""Tables, notes and bars as HTML. Pure; untrusted text is escaped and bidi-isolated."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from searchr1_async.evaluation.render.tables import Cell, Table
from searchr1_async.records.statistics import Estimate
from searchr1_async.watch.viewer.markup import isolated

_LONGEST = 300
"""Characters shown per cell; an answer may have a million."""


def paragraph(text: str, tag: str = "p", css: str = "") -> str:
    """A paragraph of untrusted text."""
    return isolated(_cut(text, 2000), tag, css)


def table_html(table: Table, css: str = "") -> str:
    """A table; marked cells are bold and coloured."""
    head = "".join(f'<th scope="col">{_content(cell)}</th>' for cell in table.headings)
    body = "".join(
        "<tr>" + "".join(_element(place, cell) for place, cell in enumerate(row)) + "</tr>" for row in table.rows
    )
    attribute = f' class="{css}"' if css else ""
    caption = paragraph(table.caption, css="soft") if table.caption else ""
    return f'<div class="wide"><table{attribute}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{caption}'


def _element(place: int, cell: Cell) -> str:
    return f'<th scope="row">{_content(cell)}</th>' if place == 0 else f"<td>{_content(cell)}</td>"


def _content(cell: Cell) -> str:
    text = isolated(_cut(cell.text))
    if cell.mark:
        text = f'<strong class="{cell.mark}" title="significant">{text}</strong>'
    if cell.href is not None:
        text = f'<a href="{escape(cell.href)}">{text}</a>'
    return text + (isolated(_cut(cell.detail), "span", "detail") if cell.detail else "")


def _cut(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def interval_bars(rows: Sequence[tuple[str, Estimate]]) -> str:
    """Bars of means in [0, 1] with their intervals; NaN draws nothing."""
    parts = [
        f'<div class="bar-label">{isolated(_cut(label, 80))}</div>'
        f'<svg class="bar" viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" aria-label="{_percents(mean, low, high)}">'
        f'<rect class="track" width="1000" height="20"/>{_bar(mean, low, high)}</svg>'
        f'<div class="bar-figure">{_percents(mean, low, high)}</div>'
        for label, (mean, low, high) in rows
    ]
    return f'<div class="bars">{"".join(parts)}</div>'


def _bar(mean: float, low: float, high: float) -> str:
    if mean != mean:
        return ""
    x, left, right = (round(1000 * min(max(value, 0.0), 1.0), 1) for value in (mean, low, high))
    line = (
        f'<rect class="interval" x="{left}" y="8.5" width="{max(right - left, 1):.1f}" height="3"/>'
        if low == low
        else ""
    )
    return f'<rect class="mean" y="3" width="{x}" height="14"/>{line}'


def _percents(mean: float, low: float, high: float) -> str:
    if mean != mean:
        return "–"
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def stacked_bar(label: str, shares: Sequence[tuple[str, str, float]]) -> str:
    """A stacked bar of (CSS class, text, share) that sum to at most 1."""
    x = 0.0
    pieces = []
    for css, words, share in shares:
        if share == share and share > 0:
            title = f"<title>{escape(words)} {share:.1%}</title>"
            pieces.append(
                f'<rect class="{css}" x="{1000 * x:.1f}" width="{1000 * share:.1f}" height="20">{title}</rect>'
            )
            x += share
    described = escape(", ".join(f"{words} {share:.1%}" for _, words, share in shares if share > 0))
    return (
        f'<div class="bar-label">{isolated(_cut(label, 80))}</div>'
        f'<svg class="bar" viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" aria-label="{described}">'
        f'<rect class="track" width="1000" height="20"/>{"".join(pieces)}</svg>'
    )
