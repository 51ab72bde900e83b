"""A report as one self-contained HTML page without scripts, with links into the episodes page. Pure."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import polars as pl

from searchr1_async.episodes.table import storable
from searchr1_async.evaluation.render.charts import OUTCOME_COLOURS
from searchr1_async.evaluation.render.html import interval_bars, paragraph, stacked_bar, table_html
from searchr1_async.evaluation.render.links import Chosen, EpisodeKey, flip_links, href
from searchr1_async.evaluation.render.parts import (
    comparison_table_of,
    condition_table,
    cost_table,
    flip_rows,
    metrics_table,
    outcome_table,
    published_table,
    result_table,
)
from searchr1_async.evaluation.render.tables import Cell, Table, counted, one_line, table_of
from searchr1_async.evaluation.render.words import METRIC_MEANINGS, OUTCOME_MEANINGS, OUTCOME_WORDS, metric_words
from searchr1_async.records.scores import ALL_SUITES, MACRO, OUTCOMES
from searchr1_async.watch.viewer.markup import STYLE, isolated

if TYPE_CHECKING:
    from searchr1_async.evaluation.report import Report

_MAX_IDS = 50
"""Question ids shown per suite; manifest.json has all of them."""
_REPEATED = "<p>evaluate(folder) repeats this evaluation from manifest.json and questions.parquet beside this page.</p>"

_STYLE = (
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


def report_page(report: Report, chosen: Chosen, available: frozenset[EpisodeKey]) -> str:
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
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode("utf-8")).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def _notes(notes: tuple[str, ...]) -> str:
    items = "".join(f"<li>{paragraph(note, tag='span')}</li>" for note in notes)
    return f"<ul>{items}</ul>" if notes else ""


def _result(report: Report) -> str:
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
        _notes(report.notes()),
        f'<div class="suites">{"".join(parts)}</div>',
    )


def _differences(report: Report, chosen: Chosen, available: frozenset[EpisodeKey]) -> str:
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


def _scores(report: Report) -> str:
    if not report:
        return ""
    meanings = "; ".join(f"{metric_words(metric)}: {METRIC_MEANINGS[metric]}" for metric in report.metrics)
    tables = [
        f"<details><summary>{metric_words(metric)} by suite</summary>{table_html(result_table(report, metric))}</details>"
        for metric in report.metrics
        if metric != "exact_match" and len(report.suites) > 1
    ]
    return _section("All scores", table_html(metrics_table(report)), paragraph(meanings, css="soft"), *tables)


def _outcomes(report: Report, chosen: Chosen, available: frozenset[EpisodeKey]) -> str:
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


def _listed(label: str, report: Report, chosen: Chosen, available: frozenset[EpisodeKey]) -> str:
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


def _costs(report: Report) -> str:
    return _section("Costs", table_html(cost_table(report))) if report else ""


def _published(report: Report) -> str:
    found = report.beside()
    if not (found.frame["kind"] == "published").any():
        return ""
    return _section(
        "Beside published results",
        table_html(published_table(found)),
        _notes(found.notes),
        f"<details><summary>Conditions</summary>{table_html(condition_table(found), 'conditions')}</details>",
    )


def _repeat(report: Report) -> str:
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


def episodes_title(report: Report) -> str:
    """Title of the episodes page."""
    return f"Episodes of {', '.join(one_line(label, 40) for label in report)}"
