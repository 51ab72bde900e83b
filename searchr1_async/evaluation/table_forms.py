"""How a report shows its values: texts of numbers, scores and outcomes; :class:`Table`; and the templates of each form. Pure.

Labels, questions and answers are untrusted: a template escapes every value that it shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlencode

import jinja2
import msgspec
from markupsafe import Markup

from searchr1_async.episodes.table import storable
from searchr1_async.evaluation.episode_store import EpisodeKey
from searchr1_async.records.scores import OUTCOMES
from searchr1_async.watch.episode_parts import MAX_LISTED
from searchr1_async.watch.markup import visible, visible_text

MISSING = "–"
EPISODES_NAME = "episodes.html"
_MAX_CELL, _MAX_TEXT = 300, 2000
"""Characters shown of a cell and of a sentence: an answer may have a million."""


class Cell(NamedTuple):
    """One cell of untrusted text."""

    text: str
    detail: str = ""
    """Secondary text in a smaller font: an interval, a count."""
    mark: Literal["", "better", "worse"] = ""
    """Marks a significant result."""
    episodes: tuple[EpisodeKey, ...] = ()
    """The episode that it leads to, and the one shown beside it, if any."""

    @property
    def href(self) -> str:
        """The address of its episodes in the episodes page."""
        (system, suite, question, sample), *others = self.episodes
        given = {"system": system, "in": suite, "question": question[:MAX_LISTED], "sample": sample}
        for other in others:
            given |= {"beside": other[0], "beside-sample": other[3]}
        return f"{EPISODES_NAME}#{urlencode({name: storable(str(value)) for name, value in given.items()})}"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the first cell of each row is its heading."""

    headings: list[Cell]
    rows: list[list[Cell]]
    caption: str = ""
    wraps: bool = False
    """Whether its cells are sentences, which the page breaks into lines."""


def table_of(
    headings: Iterable[Cell | str], rows: Iterable[Iterable[Cell | str]], caption: str = "", *, wraps: bool = False
) -> Table:
    """A table from cells or plain texts, which are truncated."""
    return Table([*map(_cell, headings)], [[*map(_cell, row)] for row in rows], caption, wraps)


def table_of_rows(rows: Sequence[Mapping[str, Cell | str]], caption: str = "", *, wraps: bool = False) -> Table:
    """A table from at least one row of cells by their headings."""
    return table_of(rows[0], (row.values() for row in rows), caption, wraps=wraps)


def _cell(value: Cell | str) -> Cell:
    cell = value if isinstance(value, Cell) else Cell(value)
    return cell._replace(text=cut(cell.text, _MAX_CELL), detail=cut(cell.detail, _MAX_CELL))


# --- texts ------------------------------------------------------------------------------------------------------------


class Wording(msgspec.Struct, frozen=True):
    """How a score or an outcome is called and explained."""

    words: str
    meaning: str = ""
    colour: str = ""
    """Of an outcome, in charts; distinguishable by lightness for common colour blindness."""


class _Wordings(msgspec.Struct):
    scores: dict[str, Wording]
    outcomes: dict[str, Wording]


_WORDINGS = msgspec.json.decode(Path(__file__).with_name("wordings.json").read_bytes(), type=_Wordings)
SCORE_WORDINGS = _WORDINGS.scores
"""The scores in [0, 1]; any other figure is a number."""
OUTCOME_WORDINGS = _WORDINGS.outcomes
FINISHED_OUTCOMES = tuple(outcome for outcome in OUTCOMES if outcome != "failed")


def metric_words(metric: str) -> str:
    """A metric's display name."""
    return SCORE_WORDINGS[metric].words if metric in SCORE_WORDINGS else metric.replace("_", " ")


def one_line(text: str, longest: int = 120) -> str:
    """Untrusted text as one line without invisible characters, truncated to ``longest``."""
    # Truncated first: scanning a long text for invisible characters is slow.
    return cut(visible_text(" ".join(text[: 4 * longest].split())), longest)


def cut(text: str, longest: int) -> str:
    """Text truncated to ``longest`` characters."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def number(value: float | None, form: str = ",.0f") -> str:
    """``value`` in this format; a dash if missing."""
    return MISSING if value is None or math.isnan(value) else format(value, form)


def percent(value: float | None, sign: str = "") -> str:
    """``0.4123`` as ``41.2``, with ``sign="+"`` as ``+41.2``; a dash if missing."""
    return number(None if value is None else 100 * value, f"{sign}.1f")


def interval(low: float | None, high: float | None, sign: str = "") -> str:
    """``[36.9, 45.6]``; empty if missing."""
    ends = percent(low, sign), percent(high, sign)
    return "" if MISSING in ends else f"[{ends[0]}, {ends[1]}]"


def p_value(value: float | None) -> str:
    """Two significant digits, never 0."""
    return "< 0.0001" if value is not None and value < 1e-4 else number(value, ".2g")


# --- forms ------------------------------------------------------------------------------------------------------------


_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$^=-])")
_MARKDOWN_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", ":": "&#58;"}
_LATEX = {
    **{char: f"\\{char}" for char in "{}$&#_%"},
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "…": r"\ldots{}",
    "→": r"$\rightarrow$",
    "×": r"$\times$",
    "−": "$-$",
    # After the end of a row, LaTeX reads a bracket as an option.
    "[": "{[}",
    "]": "{]}",
}


def html_text(text: str) -> str:
    """Untrusted text as HTML, truncated."""
    return visible(cut(text, _MAX_TEXT))


def markdown_text(text: str) -> str:
    """Untrusted text escaped as one line of Markdown.

    Colons, at signs and the dot of www become entities, because GitHub autolinks bare URLs and mentions.
    """
    shown = one_line(text, _MAX_TEXT)
    shown = "".join(_MARKDOWN_ENTITIES.get(char, char) if char in "&<>" else char for char in shown)
    shown = _MARKDOWN.sub(r"\\\1", shown)
    shown = re.sub(r"(?<=\w)[:@]|[:@](?=\w|//)", lambda match: _MARKDOWN_ENTITIES[match[0]], shown)
    return re.sub(r"\b(www)\.", r"\1&#46;", shown, flags=re.IGNORECASE)


def latex_text(text: str) -> str:
    """Untrusted text escaped as one line of LaTeX."""
    return "".join(_LATEX.get(char, char) for char in one_line(text, _MAX_TEXT))


def rendered(template: str, **values: Any) -> str:
    """A bundled template with these values; each that is not ``Markup`` is escaped for the template's form."""
    return storable(_templates(Path(template).suffix).get_template(template).render(values))


@cache
def _templates(suffix: str) -> jinja2.Environment:
    escape = {".html": html_text, ".md": markdown_text, ".tex": latex_text}[suffix]
    names = ("block_start", "block_end", "variable_start", "variable_end")
    # LaTeX is full of braces.
    marks = dict(zip(names, ("<%", "%>", "<<", ">>"), strict=True)) if suffix == ".tex" else {}
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escape(str(value))),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **{f"{name}_string": mark for name, mark in marks.items()},  # type: ignore[arg-type]
    )


def plain_table(table: Table) -> str:
    """Aligned text; marked cells have a star."""
    lines = [[_plain_cell(cell) for cell in row] for row in (table.headings, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["─" * width for width in widths])
    aligned = [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip() for first, *others in lines
    ]
    return "\n".join([*aligned, *([one_line(table.caption, 1000)] if table.caption else [])])


def _plain_cell(cell: Cell) -> str:
    text = one_line(cell.text) + ("*" if cell.mark else "")
    return f"{text} {one_line(cell.detail)}".rstrip()
