"""Writes a report's files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from searchr1_async.boundary.paths import parquet_bytes, write_atomically
from searchr1_async.episodes.table import storable
from searchr1_async.errors import RunFolderError
from searchr1_async.evaluation.asked import QUESTIONS_NAME
from searchr1_async.evaluation.render.document import latex_report, markdown_report
from searchr1_async.evaluation.render.links import EPISODES_NAME, choose, chosen_rows, key_of
from searchr1_async.evaluation.render.page import episodes_title, report_page
from searchr1_async.records.scores import SCORE_SCHEMA
from searchr1_async.watch.viewer import load_tokenizer, page_of

if TYPE_CHECKING:
    from searchr1_async.evaluation.report import Report

REPORT_NAME = "report.html"


def save_report(report: Report, folder: Path) -> Path:
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


def _parquet(report: Report) -> bytes:
    columns = list(SCORE_SCHEMA)
    return parquet_bytes(
        pl.concat([pl.DataFrame(schema=SCORE_SCHEMA), *(own.scores.select(columns) for own in report.values())])
    )


def _figures(report: Report) -> dict[str, bytes]:
    if not report:
        return {}
    files = {}
    for name, chart in (("exact_match", report.plot()), ("outcomes", report.plot_outcomes())):
        for kind, content in _drawn(chart).items():
            files[f"figures/{name}.{kind}"] = content
    return files


def _drawn(chart: Any) -> dict[str, bytes]:
    import vl_convert

    svg = vl_convert.vegalite_to_svg(chart.to_dict())
    return {"svg": svg.encode("utf-8"), "png": vl_convert.svg_to_png(svg, scale=2)}
