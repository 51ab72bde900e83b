"""A report as HTML: one self-contained page without scripts, with links into the episodes page, and a notebook cell. Pure.

Untrusted text is escaped and bidi-isolated.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

import polars as pl

from searchr1_async.episodes.table import storable
from searchr1_async.evaluation.published import beside_published
from searchr1_async.evaluation.report_charts import OUTCOME_COLOURS
from searchr1_async.evaluation.report_episodes import Chosen, EpisodeKey, flip_links, href
from searchr1_async.evaluation.report_frames import ReportFrames
from searchr1_async.evaluation.report_tables import (
    METRIC_MEANINGS,
    OUTCOME_MEANINGS,
    OUTCOME_WORDS,
    Cell,
    Table,
    comparison_table_of,
    condition_table,
    cost_table,
    counted,
    flip_rows,
    metric_words,
    metrics_table,
    one_line,
    outcome_table,
    published_table,
    result_table,
    table_of,
)
from searchr1_async.evaluation.report_text import notes_of
from searchr1_async.records.scores import ALL_SUITES, MACRO, OUTCOMES
from searchr1_async.records.statistics import Estimate
from searchr1_async.watch.viewer.markup import DARK, LIGHT, STYLE, isolated

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


_MAX_IDS = 50
"""Question ids shown per suite; manifest.json has all of them."""
_REPEATED = "<p>evaluate(folder) repeats this evaluation from manifest.json and questions.parquet beside this page.</p>"

_PAGE_STYLE = (
    STYLE
    + """
a { color: var(--accent); } .detail { display: block; font-size: .82em; font-weight: 400; color: var(--soft); }
.better { color: var(--good); } .worse { color: var(--bad); } p { max-width: 62rem; } ul { padding-left: 1.2rem; max-width: 62rem; } li { margin: .3rem 0; } p, li, summary { overflow-wrap: anywhere; }
td, th { vertical-align: top; } tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; max-width: 18rem; }
.bars { display: grid; grid-template-columns: minmax(4rem, 8rem) 1fr 9rem; gap: .3rem .8rem; align-items: center; margin: .3rem 0 1rem; }
.stacks { display: grid; grid-template-columns: minmax(4rem, 10rem) 1fr; gap: .3rem .8rem; align-items: center; margin: .5rem 0; }
.bar { width: 100%; height: 1.25rem; display: block; } .bar-label { overflow-wrap: anywhere; }
.bar-figure { font-variant-numeric: tabular-nums; color: var(--soft); font-size: .9rem; }
.track { fill: var(--card); } .mean { fill: var(--accent); opacity: .75; } .interval { fill: var(--ink); }
.suites { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 2rem; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; margin-right: .4rem; vertical-align: -.05rem; }
.legend { list-style: none; padding: 0; font-size: .92rem; }
table.flips td, table.flips th { white-space: normal; overflow-wrap: anywhere; text-align: left; min-width: 6rem; max-width: 20rem; }
table.conditions td, table.conditions th { white-space: normal; overflow-wrap: anywhere; text-align: left; min-width: 7rem; max-width: 16rem; }
table.settings th { white-space: nowrap; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1rem .75rem 3rem; } th, td { padding: .35rem .5rem; }
  .bars { grid-template-columns: minmax(0, 1fr) auto; grid-auto-flow: dense; gap: .1rem .8rem; } .bars .bar { grid-column: 1 / -1; margin-bottom: .5rem; }
  .bars .bar-label { grid-column: 1; } .bars .bar-figure { grid-column: 2; }
  .stacks { grid-template-columns: 1fr; } }
"""
    + "".join(f".{outcome} {{ fill: {colour}; background: {colour}; }} " for outcome, colour in OUTCOME_COLOURS.items())
)


def report_page(report: ReportFrames, chosen: Chosen, available: frozenset[EpisodeKey]) -> str:
    """The page. Of the episodes in ``chosen``, only those in ``available`` are linked."""
    parts = [_head("Evaluation"), _result(report)]
    parts += [
        _differences(report, chosen, available),
        _scores(report),
        _outcomes(report, chosen, available),
        _costs(report),
    ]
    parts += [_published(report), _repeat(report), "</body></html>\n"]
    return storable("\n".join(part for part in parts if part))


def _head(title: str) -> str:
    digest = base64.b64encode(hashlib.sha256(_PAGE_STYLE.encode("utf-8")).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_PAGE_STYLE}</style></head>\n<body><h1>{title}</h1>"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def _notes(notes: tuple[str, ...]) -> str:
    items = "".join(f"<li>{paragraph(note, tag='span')}</li>" for note in notes)
    return f"<ul>{items}</ul>" if notes else ""


def _result(report: ReportFrames) -> str:
    if not report:
        return "<p>This report has no systems.</p>"
    parts = []
    for column in report.columns:
        rows = [
            (label, own.estimate("exact_match", column))
            for label, own in report.items()
            if column in own.suites or column in (ALL_SUITES, MACRO)
        ]
        name = {ALL_SUITES: "all questions", MACRO: "mean over suites"}.get(column)
        parts.append(f"<div><h3>{isolated(one_line(column)) if name is None else name}</h3>{interval_bars(rows)}</div>")
    when = report.manifest.created if report.manifest is not None else None
    facts = [counted(len(report), "system"), counted(len(report.suites), "suite")]
    facts += [f"started {when}"] if when else []
    head = f'<p class="soft">{isolated(" · ".join(facts))}</p>'
    return _section(
        "Exact match",
        head,
        table_html(result_table(report)),
        "<h3>Notes on these results</h3>",
        _notes(notes_of(report)),
        f'<div class="suites">{"".join(parts)}</div>',
    )


def _differences(report: ReportFrames, chosen: Chosen, available: frozenset[EpisodeKey]) -> str:
    comparisons = report.comparisons()
    if not comparisons.height:
        return ""
    parts = _comparisons(comparisons)
    for (before, after), flips in chosen.flips.items():
        total = chosen.flip_counts[before, after]
        if not total:
            continue
        better = flips.filter(direction="improved").height
        some = f", {flips.height:,} shown" if flips.height < total else ""
        title = f"{one_line(before, 60)} → {one_line(after, 60)}: {counted(total, 'question')} changed{some}"
        table = flip_rows(flips, flip_links(before, after, flips, available))
        counts = f"{better:,} better and {flips.height - better:,} worse, largest change first."
        how = " Answers link to their episode, with the other one beside it." if available else ""
        parts.append(
            f"<details><summary>{isolated(title)}</summary><p class='soft'>{counts}{how}</p>{table_html(table, 'flips')}</details>"
        )
    return _section("Differences", *parts)


def _comparisons(frame: pl.DataFrame) -> list[str]:
    """All questions first; single suites collapsed, because there may be many rows."""
    overall = frame.filter(pl.col("suite").is_in([ALL_SUITES, MACRO]))
    if not overall.height:
        return [table_html(comparison_table_of(frame))]
    single = comparison_table_of(frame.filter(~pl.col("suite").is_in([ALL_SUITES, MACRO])))
    return [
        table_html(comparison_table_of(overall)),
        f"<details><summary>By suite</summary>{table_html(single)}</details>",
    ]


def _scores(report: ReportFrames) -> str:
    if not report:
        return ""
    meanings = "; ".join(f"{metric_words(metric)}: {METRIC_MEANINGS[metric]}" for metric in report.metrics)
    tables = [
        f"<details><summary>{metric_words(metric)} by suite</summary>{table_html(result_table(report, metric))}</details>"
        for metric in report.metrics
        if metric != "exact_match" and len(report.suites) > 1
    ]
    return _section("All scores", table_html(metrics_table(report)), paragraph(meanings, css="soft"), *tables)


def _outcomes(report: ReportFrames, chosen: Chosen, available: frozenset[EpisodeKey]) -> str:
    if not report:
        return ""
    shown = [outcome for outcome in OUTCOMES if outcome != "failed"]
    frame = report.outcomes()
    bars = []
    for label, own in report.items():
        suite = ALL_SUITES if len(own.suites) > 1 else next(iter(own.suites), "")
        shares = dict(frame.filter(system=label, suite=suite).select("outcome", "share").iter_rows())
        bars.append(
            stacked_bar(label, [(outcome, OUTCOME_WORDS[outcome], shares.get(outcome) or 0.0) for outcome in shown])
        )
    legend = "".join(
        f'<li><span class="key {outcome}"></span>{OUTCOME_WORDS[outcome]}: {OUTCOME_MEANINGS[outcome]}</li>'
        for outcome in shown
    )
    listed = "".join(_listed(label, report, chosen, available) for label in report)
    return _section(
        "Outcomes",
        f'<div class="stacks">{"".join(bars)}</div><ul class="legend">{legend}</ul>',
        table_html(outcome_table(report)),
        listed,
    )


def _listed(label: str, report: ReportFrames, chosen: Chosen, available: frozenset[EpisodeKey]) -> str:
    """A table of some episodes of each outcome."""
    rows = []
    for outcome in OUTCOMES:
        if (own := chosen.outcomes.get((label, outcome))) is None:
            continue
        for row in own.iter_rows(named=True):
            key = (label, row["suite"], row["question_id"], row["sample"])
            answer = "no answer" if row["answer"] is None else row["answer"]
            rows.append(
                [
                    Cell(row["question"], href=href(key) if key in available else None),
                    row["suite"],
                    OUTCOME_WORDS[outcome],
                    answer,
                    " / ".join(row["golden_answers"] or [])[:200],
                ]
            )
    if not rows:
        return ""
    table = table_of(["question", "suite", "outcome", "answer", "golden answers"], rows)
    return (
        f"<details><summary>Episodes of {isolated(one_line(label, 60))}</summary>{table_html(table, 'flips')}</details>"
    )


def _costs(report: ReportFrames) -> str:
    return _section("Costs", table_html(cost_table(report))) if report else ""


def _published(report: ReportFrames) -> str:
    found = beside_published(report)
    if not (found.frame["kind"] == "published").any():
        return ""
    return _section(
        "Beside published results",
        table_html(published_table(found)),
        _notes(found.notes),
        f"<details><summary>Conditions</summary>{table_html(condition_table(found), 'conditions')}</details>",
    )


def _repeat(report: ReportFrames) -> str:
    manifest = report.manifest
    if manifest is None:
        return ""
    values = asdict(manifest)
    tables = [
        _table(name, values[name]) for name in ("settings", "service", "search", "judge", "versions") if values[name]
    ]
    suites = table_of(
        ["suite", "asked", "of", "seed", "split", "source", "sha256", "questions"],
        [
            [s.name, f"{len(s.question_ids):,}", f"{s.total:,}", _plain(s.seed), _plain(s.split), s.source, _plain(s.sha256), _ids(s.question_ids)]
            for s in manifest.suites
        ],
    )  # fmt: skip
    systems = table_of(
        ["system", "method", "model", "checkpoint", "step", "run", "format", "renderer", "prompt"],
        [
            [s.label, s.method, s.model, _plain(s.checkpoint), _plain(s.step), _plain(s.run), s.format, _plain(s.renderer),
             _plain(s.instructions, "the method's own")]
            for s in manifest.systems
        ],
    )  # fmt: skip
    return _section(
        "Reproduction",
        *([] if report.load_questions is None else [_REPEATED]),
        f"<details open><summary>Systems</summary>{table_html(systems, 'conditions')}</details>",
        f"<details><summary>Suites</summary>{table_html(suites, 'conditions')}</details>",
        *tables,
        f'<p class="soft">sha256 of the questions: {isolated(manifest.questions_sha256)}</p>',
    )


def _table(name: str, values: Any) -> str:
    rows = list(_flat(values))
    return f"<details><summary>{name.capitalize()}</summary>{table_html(_settings(rows), 'settings')}</details>"


def _settings(rows: list[tuple[str, str]]) -> Table:
    return table_of(["", ""], rows)


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)


def _plain(value: object, missing: str = "none") -> str:
    return missing if value is None else str(value)


def _ids(ids: tuple[str, ...]) -> str:
    return ", ".join(ids[:_MAX_IDS]) + (f", … {len(ids) - _MAX_IDS:,} more" if len(ids) > _MAX_IDS else "")


def episodes_title(report: ReportFrames) -> str:
    """Title of the episodes page."""
    return f"Episodes of {', '.join(one_line(label, 40) for label in report)}"


_ROOT = ".searchr1-report"
_CELL_RULES = """
font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: none; padding: .25rem 0; min-width: 0;
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .95em; font-variant-numeric: tabular-nums; margin: .25em 0; }
th, td { text-align: right; padding: .25em .8em; border-bottom: 1px solid var(--line); white-space: nowrap; background: none;
  color: var(--ink); vertical-align: top; }
th:first-child { text-align: left; padding-left: .2em; max-width: 24em; white-space: normal; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; } .detail { display: block; font-size: .82em; font-weight: 400; color: var(--soft); }
tbody th { font-weight: 500; } .better { font-weight: 700; color: var(--good); } p { margin: .4em 0; max-width: 62rem; }
.soft { color: var(--soft); } details > summary { cursor: pointer; color: var(--accent); } ul { margin: .4em 0; padding-left: 1.3em; }
.mark { font: .75em ui-monospace, monospace; color: var(--bad); border: 1px solid currentColor; border-radius: .2rem; }
"""


def report_cell(report: ReportFrames) -> str:
    """Exact match by system and suite, with collapsed notes."""
    if not report:
        return _framed(paragraph("This report has no systems."))
    notes = notes_of(report)
    items = "".join(f"<li>{paragraph(note, tag='span')}</li>" for note in notes)
    more = f"<details><summary>Notes on these results ({len(notes)})</summary><ul>{items}</ul></details>"
    return _framed(table_html(result_table(report)) + (more if notes else ""))


def _framed(body: str) -> str:
    return f'<style>{_cell_style()}</style><div class="searchr1-report">{body}</div>'


def _cell_style() -> str:
    return "\n".join(
        (
            f"{_ROOT} {{ {LIGHT} }}",
            f"@media (prefers-color-scheme: dark) {{ {_ROOT} {{ {DARK} }} }}",
            f'[data-jp-theme-light="true"] {_ROOT}, .vscode-light {_ROOT}, html[theme="light"] {_ROOT} {{ {LIGHT} }}',
            f'[data-jp-theme-light="false"] {_ROOT}, .vscode-dark {_ROOT}, html[theme="dark"] {_ROOT} {{ {DARK} }}',
            f"{_ROOT} {{ {_CELL_RULES} }}",
        )
    )
