"""A report as HTML for a notebook cell, without scripts, following the notebook's light or dark theme. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from searchr1_async.evaluation.render.html import paragraph, table_html
from searchr1_async.evaluation.render.parts import result_table
from searchr1_async.watch.viewer.markup import DARK, LIGHT

if TYPE_CHECKING:
    from searchr1_async.evaluation.report import Report

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


def report_cell(report: Report) -> str:
    """Exact match by system and suite, with collapsed notes."""
    if not report:
        return _framed(paragraph("This report has no systems."))
    notes = report.notes()
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
