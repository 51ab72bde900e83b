"""Writes a report's files.

A report as HTML for a notebook cell, without scripts, following the notebook's light or dark theme. Pure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from searchr1_async.boundary.paths import parquet_bytes, write_atomically
from searchr1_async.episodes.table import storable
from searchr1_async.errors import RunFolderError
from searchr1_async.evaluation.manifest import QUESTIONS_NAME
from searchr1_async.evaluation.report_charts import plot_figure, plot_outcomes
from searchr1_async.evaluation.report_frames import ReportFrames
from searchr1_async.evaluation.report_links import EPISODES_NAME, choose, chosen_rows, key_of
from searchr1_async.evaluation.report_page import episodes_title, paragraph, report_page, table_html
from searchr1_async.evaluation.report_tables import result_table
from searchr1_async.evaluation.report_text import latex_report, markdown_report, notes_of
from searchr1_async.records.scores import SCORE_SCHEMA
from searchr1_async.watch.viewer import load_tokenizer, page_of
from searchr1_async.watch.viewer.markup import DARK, LIGHT

REPORT_NAME = "report.html"


def save_report(report: ReportFrames, folder: Path) -> Path:
    """See :meth:`Report.save`. The page is written last, so that everything it links to exists."""
    is_own = report.folder is not None and report.folder.resolve() == folder.resolve()
    if not is_own:
        _refuse_taken(folder)
    chosen = choose(report)
    rows = chosen_rows(report, chosen.keys)
    available = frozenset(map(key_of, rows))
    files: dict[str, bytes] = {}
    if rows:
        tokenizer = load_tokenizer(report.folder) if report.folder is not None else None
        page = page_of(rows, title=episodes_title(report), tokenizer=tokenizer)
        files[EPISODES_NAME] = storable(page).encode("utf-8")
    files |= {
        "scores.parquet": _parquet(report),
        "report.md": storable(markdown_report(report)).encode("utf-8"),
        "report.tex": storable(latex_report(report)).encode("utf-8"),
        **_figures(report),
        REPORT_NAME: report_page(report, chosen, available).encode("utf-8"),
    }
    if not is_own and report.manifest is not None and report.load_questions is not None:
        files[QUESTIONS_NAME] = parquet_bytes(report.load_questions())
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        if not rows:
            (folder / EPISODES_NAME).unlink(missing_ok=True)  # of an earlier report
        last = files.pop(REPORT_NAME)
        for name, content in files.items():
            write_atomically(folder / name, content)
        if QUESTIONS_NAME in files and report.manifest is not None:
            report.manifest.save(folder)
        write_atomically(folder / REPORT_NAME, last)
    except OSError as error:
        raise RunFolderError(f"the report could not be written to {folder}: {error.strerror or error}") from error
    return folder / REPORT_NAME


def _refuse_taken(folder: Path) -> None:
    """Refuses folders whose questions or manifest the report would overwrite."""
    if any((folder / name).exists() for name in ("run.lock", "state.json", "episodes")):
        raise RunFolderError(
            f"{folder} is the folder of a run or of another evaluation: save the report elsewhere, such as in {folder}/report"
        )


def _parquet(report: ReportFrames) -> bytes:
    columns = list(SCORE_SCHEMA)
    return parquet_bytes(
        pl.concat([pl.DataFrame(schema=SCORE_SCHEMA), *(own.scores.select(columns) for own in report.values())])
    )


def _figures(report: ReportFrames) -> dict[str, bytes]:
    if not report:
        return {}
    files = {}
    for name, chart in (("exact_match", plot_figure(report, "exact_match")), ("outcomes", plot_outcomes(report))):
        for kind, content in _drawn(chart).items():
            files[f"figures/{name}.{kind}"] = content
    return files


def _drawn(chart: Any) -> dict[str, bytes]:
    import vl_convert

    svg = vl_convert.vegalite_to_svg(chart.to_dict())
    return {"svg": svg.encode("utf-8"), "png": vl_convert.svg_to_png(svg, scale=2)}


_ROOT = ".searchr1-report"
_RULES = """
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
    return f'<style>{_style()}</style><div class="searchr1-report">{body}</div>'


def _style() -> str:
    return "\n".join(
        (
            f"{_ROOT} {{ {LIGHT} }}",
            f"@media (prefers-color-scheme: dark) {{ {_ROOT} {{ {DARK} }} }}",
            f'[data-jp-theme-light="true"] {_ROOT}, .vscode-light {_ROOT}, html[theme="light"] {_ROOT} {{ {LIGHT} }}',
            f'[data-jp-theme-light="false"] {_ROOT}, .vscode-dark {_ROOT}, html[theme="dark"] {_ROOT} {{ {DARK} }}',
            f"{_ROOT} {{ {_RULES} }}",
        )
    )
