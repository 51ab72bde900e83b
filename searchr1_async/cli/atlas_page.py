"""The report of the demo job: one self-contained HTML file without scripts."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from searchr1_async.episodes.table import storable
from searchr1_async.episodes.types import Episode
from searchr1_async.watch.viewer.cell import given_html, golden_html, turn_html, verdict_html
from searchr1_async.watch.viewer.markup import STYLE, isolated, table, visible

_SECRET = re.compile(r"api_?key|secret|password|credential|authorization", re.IGNORECASE)

_STEP_COLUMNS = (
    ("env/all/reward/total", "reward", "{:+.3f}"),
    ("env/all/correct", "exact match", "{:.1%}"),
    ("env/all/format", "format", "{:.1%}"),
    ("env/all/turns_per_episode", "turns/episode", "{:.2f}"),
    ("env/all/valid_calls", "valid calls", "{:.1%}"),
    ("env/all/answer_in_passage", "answer seen", "{:.1%}"),
    ("env/all/by_group/frac_mixed", "mixed groups", "{:.1%}"),
    ("env/all/stop/failed", "failed", "{:.1%}"),
    ("time/total", "seconds", "{:.1f}"),
)
_MAX_STEP_ROWS = 200


def write_report(
    path: Path,
    *,
    title: str,
    summary: Sequence[Mapping[str, str]],
    curve_png: Path | None,
    metrics: pl.DataFrame,
    episodes: Sequence[tuple[str, Episode]],
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Path:
    """Write the report to ``path`` and return it.

    Untrusted text is escaped, and the page's content security policy forbids scripts and external resources.

    Args:
        path: the HTML file; replaced atomically.
        title: page heading.
        summary: rows of the result table, as from :func:`~searchr1_async.evaluation.report_text.comparison_rows`.
        curve_png: the learning curve, embedded; omitted if None or missing.
        metrics: one row per step.
        episodes: episodes to show turn by turn, each with a label (``before``, ``after``); those of one question are side by side.
        settings: name to value; values of secret-like names are hidden.
        notes: lines below the result table, such as the paired difference.

    Raises:
        OSError: ``path`` is not writable.
    """
    page = "\n".join(
        part
        for part in (
            _head(title),
            _summary_section(summary, notes),
            _curve_section(curve_png),
            _steps_section(metrics),
            _settings_section(settings),
            _episodes_section(episodes),
            "</body></html>\n",
        )
        if part
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(storable(page), encoding="utf-8", newline="\n")
    partial.replace(path)
    return path


def _head(title: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{visible_title(title)}</title><style>{STYLE}</style></head>\n<body><h1>{isolated(title)}</h1>"
    )


def visible_title(title: str) -> str:
    """``title`` as plain text for the title element, without the markup of :func:`visible`."""
    return re.sub(r"<[^>]*>", "", visible(title))


def _summary_section(summary: Sequence[Mapping[str, str]], notes: Sequence[str]) -> str:
    if not summary:
        return ""
    headings = list(summary[0])
    rows = [[row.get(name, "") for name in headings] for row in summary]
    lines = "".join(f"<p>{isolated(note)}</p>" for note in notes)
    return f"<section><h2>Result</h2>{table(headings, rows)}{lines}</section>"


def _curve_section(curve_png: Path | None) -> str:
    if curve_png is None or not curve_png.is_file():
        return ""
    data = base64.b64encode(curve_png.read_bytes()).decode("ascii")
    picture = (
        '<img class="curve" alt="Learning curve: exact match, turns per episode and valid calls by optimiser step" '
        f'src="data:image/png;base64,{data}">'
    )
    return f"<section><h2>Learning curve</h2>{picture}</section>"


def _steps_section(metrics: pl.DataFrame) -> str:
    columns = [column for column in _STEP_COLUMNS if column[0] in metrics.columns]
    if metrics.is_empty() or not columns:
        return ""
    thinned = metrics.gather_every(-(-metrics.height // _MAX_STEP_ROWS))
    rows = [
        [str(row["step"]), *("–" if row[name] is None else form.format(row[name]) for name, _, form in columns)]
        for row in thinned.iter_rows(named=True)
    ]
    headings = ["step", *(heading for _, heading, _ in columns)]
    return f"<section><details><summary>Steps ({metrics.height})</summary>{table(headings, rows)}</details></section>"


def _settings_section(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    rows = [[name, "(not shown)" if _SECRET.search(name) else str(value)] for name, value in settings.items()]
    body = table(["setting", "value"], rows, css="settings")
    return f"<section><details><summary>Settings ({len(rows)})</summary>{body}</details></section>"


def _episodes_section(episodes: Sequence[tuple[str, Episode]]) -> str:
    if not episodes:
        return ""
    by_question: dict[tuple[str, str], list[tuple[str, Episode]]] = {}
    for label, episode in episodes:
        by_question.setdefault((episode.question.data_source, episode.question.id), []).append((label, episode))
    return "<section><h2>Episodes</h2>" + "".join(map(_question, by_question.values())) + "</section>"


def _question(played: Sequence[tuple[str, Episode]]) -> str:
    question = played[0][1].question
    articles = "".join(_episode(label, episode) for label, episode in played)
    return (
        f'<section class="question"><h3>{isolated(question.question)}</h3>'
        f'<div class="soft">golden answer: {golden_html(question)} · {isolated(question.data_source)} · {isolated(question.id)}</div>'
        f'<div class="pair">{articles}</div></section>'
    )


def _episode(label: str, episode: Episode) -> str:
    turns = "".join(
        turn_html(number, turn, episode.question, with_kinds=False)
        for number, turn in enumerate(episode.turns, start=1)
    )
    return f"<article><h4>{isolated(label)}</h4>{given_html(episode)}{turns}{verdict_html(episode)}</article>"
