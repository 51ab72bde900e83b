"""The public report of an evaluation: frames, notes, charts and files, also read back from a folder."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from searchr1_async.boundary.paths import absolute_path, parquet_bytes, write_atomically
from searchr1_async.episodes.table import storable
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.evaluation.episode_store import QUESTIONS_NAME, EpisodeKey, EpisodeStore, read_questions
from searchr1_async.evaluation.judge import verdicts_name
from searchr1_async.evaluation.manifest import Manifest
from searchr1_async.evaluation.report_frames import ReportFrames
from searchr1_async.evaluation.report_notes import Beside, PublishedRow, beside_published, notes_of
from searchr1_async.evaluation.report_tables import (
    linked_episodes,
    overall_outcomes,
    result_table,
    sections_of,
)
from searchr1_async.evaluation.table_forms import (
    EPISODES_NAME,
    FINISHED_OUTCOMES,
    OUTCOME_WORDINGS,
    SCORE_WORDINGS,
    metric_words,
    one_line,
    plain_table,
    rendered,
)
from searchr1_async.records.scores import SCORE_SCHEMA
from searchr1_async.runs.evaluation import Evaluation
from searchr1_async.watch import drawing
from searchr1_async.watch.episode_parts import remember_tokenizer
from searchr1_async.watch.episodes_page import load_tokenizer, page_of
from searchr1_async.watch.markup import STYLE, themed_style


class Report(ReportFrames):
    """Evaluations of one or several systems over the same suites: a mapping from label to
    :class:`~searchr1_async.runs.evaluation.Evaluation`, in the order the systems were given.

    Renders as a table in notebooks. Every frame has a deterministic row order.
    """

    def beside(self, published: Sequence[PublishedRow] | None = None) -> Beside:
        """Our exact match beside published results, with the differing conditions
        (:mod:`searchr1_async.evaluation.report_notes`).

        Args:
            published: None is :data:`searchr1_async.evaluation.report_notes.PUBLISHED`.
        """
        return beside_published(self, published)

    def notes(self) -> tuple[str, ...]:
        """Caveats about these results, as sentences."""
        return notes_of(self)

    def __repr__(self) -> str:
        return plain_table(result_table(self)) if len(self) else "Report of no systems"

    def _repr_html_(self) -> str:
        style = themed_style(".searchr1-report", _asset("report_cell.css"))
        table = result_table(self) if self else None
        return rendered("report_cell.html", style=style, table=table, notes=notes_of(self))

    def plot(self, metric: str = "exact_match") -> Any:
        """An Altair bar chart of a metric per suite and system, with 95 % intervals.

        Args:
            metric: as in :meth:`estimates`.

        Raises:
            ConfigurationError: unknown metric.
        """
        import altair as alt

        drawing.enable_renderer()
        found = _short_names(self.estimates(metric).drop_nans("mean"))
        words = metric_words(metric)
        if found.is_empty():
            return drawing.empty_chart("No results.", title=f"{words} by suite")
        suites, labels = (found[name].unique(maintain_order=True).to_list() for name in ("suite", "system"))
        form, precise = (".0%", ".1%") if metric in SCORE_WORDINGS else ("~g", ".3~g")
        # At least 12 pixels per bar: seven suites and five systems exceed the default width.
        width = min(max(460, len(suites) * (len(labels) * 14 + 24)), 1100)
        angle = 0 if len(suites) * 80 <= width else -30
        names_axis = drawing.axis(grid=False, labelOverlap=False, labelLimit=120, labelAngle=angle)
        scale = alt.Scale(domain=labels, range=[*drawing.SERIES])
        base = alt.Chart(found).encode(
            x=alt.X("suite:N", sort=suites, axis=names_axis, scale=alt.Scale(paddingInner=0.22, paddingOuter=0.1)),
            xOffset=alt.XOffset("system:N", sort=labels, scale=alt.Scale(paddingInner=0.12)),
            color=alt.Color("system:N", sort=labels, scale=scale, legend=drawing.legend(columns=3)),
        )
        y = alt.Y("mean:Q", axis=drawing.values_axis(words, format=form), scale=alt.Scale(zero=True, nice=True))
        ends = (f"mean|{words}|{precise}", f"low|95 % from|{precise}", f"high|to|{precise}")
        bars = base.mark_bar(opacity=0.85).encode(y=y, tooltip=drawing.tooltips("system:N", "suite:N", *ends))
        # In the bar's colour, the part of the interval inside the bar would be invisible.
        lines = base.mark_rule(strokeWidth=1.5).encode(y="low:Q", y2="high:Q", color=alt.value(drawing.NOTE_COLOUR))
        heading = drawing.heading(f"{words} by suite", "lines: 95 % intervals")
        return alt.layer(bars, lines).properties(width=width, height=260, title=heading)

    def plot_outcomes(self) -> Any:
        """An Altair chart of outcome shares, one bar per system."""
        import altair as alt

        drawing.enable_renderer()
        wordings = [msgspec.to_builtins(OUTCOME_WORDINGS[outcome]) for outcome in FINISHED_OUTCOMES]
        told = (
            pl.DataFrame(wordings)
            .drop("colour")
            .with_columns(outcome=pl.Series(FINISHED_OUTCOMES))
            .with_row_index("order")
        )
        found = overall_outcomes(self).filter(pl.col("share") > 0) if self else pl.DataFrame()
        if found.is_empty():
            return drawing.empty_chart("No finished episodes.", title="outcomes")
        found = _short_names(found.join(told, on="outcome", maintain_order="left"))
        colours = alt.Scale(domain=[each["words"] for each in wordings], range=[each["colour"] for each in wordings])
        share_axis = drawing.axis("share of finished episodes", format=".0%")
        labels = found["system"].unique(maintain_order=True).to_list()
        tooltip = drawing.tooltips("system:N", "words:N|outcome", "meaning:N", "share||.1%", "episodes||,d")
        chart = alt.Chart(found).mark_bar(height={"band": 0.7}).encode(
            y=alt.Y("system:N", sort=labels, axis=drawing.axis(grid=False, labelLimit=220)),
            x=alt.X("share:Q", stack="zero", axis=share_axis, scale=alt.Scale(domain=[0, 1])),
            order="order:Q",
            color=alt.Color("words:N", sort=None, scale=colours, legend=drawing.legend(columns=3)),
            tooltip=tooltip,
        )  # fmt: skip
        return chart.properties(width=560, height=34 * len(labels), title=drawing.heading("outcomes"))

    def markdown(self) -> str:
        """The whole report as Markdown."""
        return rendered("report_page.md", sections=sections_of(self))

    def latex(self) -> str:
        """The tables that are not folded on the page, as LaTeX ``table`` environments for ``booktabs``; notes are comments."""
        return rendered("report_page.tex", sections=sections_of(self))

    def save(self, folder: str | Path | None = None) -> Path:
        """Writes the report and returns the path of its HTML page. Blocking: call it from a worker thread.

        Writes ``report.html`` (linking to ``episodes.html`` if episodes were kept), ``report.md``, ``report.tex``,
        ``scores.parquet`` and ``figures/``. Outside the evaluation's own folder it also writes ``manifest.json`` and
        ``questions.parquet``, so ``evaluate(folder)`` can repeat it. Each file is written atomically.

        Args:
            folder: created if missing; None is the evaluation's folder.

        Raises:
            ConfigurationError: no folder was given and the evaluation has none.
            RunFolderError: the folder cannot be written or belongs to a run or another evaluation, or the episodes or
                questions cannot be read.
        """
        target = absolute_path(folder, "folder") if folder is not None else self.folder
        if target is None:
            raise ConfigurationError("this report has no folder: pass one with report.save(folder)")
        return save_report(self, target)


def open_report(folder: str | Path) -> Report:
    """The report of an evaluation's folder, finished or not. Reads all episodes.

    Raises:
        RunFolderError: the folder contains no evaluation, or cannot be read.
    """
    path = absolute_path(folder, "folder")
    manifest = Manifest.load(path)
    if manifest is None:
        raise RunFolderError(f"{path} contains no evaluation: pass the out_dir of an evaluate() call")
    store = EpisodeStore(path, verdicts_name(manifest.judge))
    store.load()
    if (tokenizer := load_tokenizer(path)) is not None:
        remember_tokenizer(tokenizer)
    return make_report(store, manifest)


def make_report(store: EpisodeStore, manifest: Manifest) -> Report:
    """The report of a store, with systems in the manifest's order."""
    scores = store.scores()
    return Report([evaluation_of(each.label, scores, each.step, store) for each in manifest.systems], manifest, store)


def evaluation_of(label: str, scores: pl.DataFrame, step: int | None, store: EpisodeStore) -> Evaluation:
    """One system's scores in a store."""
    return Evaluation(label, scores.filter(system=label), step, partial(store.episodes, label))


# --- files ---------------------------------------------------------------------------------------------------------------


def save_report(report: Report, folder: Path) -> Path:
    """See :meth:`Report.save`. The page is written last, so that everything it links to exists."""
    is_own = report.folder is not None and report.folder.resolve() == folder.resolve()
    if not is_own and any((folder / name).exists() for name in ("run.lock", "state.json", "episodes")):
        raise RunFolderError(
            f"{folder} is the folder of a run or of another evaluation: save the report elsewhere, such as in {folder}/report"
        )
    sections, charts = sections_of(report), _charts(report)
    episodes = _episodes(report, linked_episodes(sections))
    scores = [own.scores.select(list(SCORE_SCHEMA)) for own in report.values()]
    files = {
        EPISODES_NAME: episodes,
        "scores.parquet": parquet_bytes(pl.concat([pl.DataFrame(schema=SCORE_SCHEMA), *scores])),
        "report.md": rendered("report_page.md", sections=sections).encode(),
        "report.tex": rendered("report_page.tex", sections=sections).encode(),
        **{f"figures/{name}": content for name, content in charts.items()},
    }
    copied = None if is_own or report.store is None else report.manifest
    if copied is not None and report.store is not None:
        files[QUESTIONS_NAME] = parquet_bytes(read_questions(report.store.folder))
    style = STYLE + _asset("report_page.css")
    files["report.html"] = rendered(
        "report_page.html",
        style=style,
        style_digest=_base64(hashlib.sha256(style.encode()).digest()),
        sections=sections,
        is_linked=bool(episodes),
        charts={name: _base64(content) for name, content in charts.items() if name.endswith(".svg")},
    ).encode()
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        if copied is not None:
            copied.save(folder)
        for name, content in files.items():
            if content:
                write_atomically(folder / name, content)
            else:
                (folder / name).unlink(missing_ok=True)  # of an earlier report
    except OSError as error:
        raise RunFolderError(f"the report could not be written to {folder}: {error.strerror or error}") from error
    return folder / "report.html"


def _episodes(report: ReportFrames, keys: Collection[EpisodeKey]) -> bytes:
    """The page of these episodes; empty if none was kept."""
    if report.store is None or not (rows := report.store.rows(keys)):
        return b""
    title = f"Episodes of {', '.join(one_line(label, 40) for label in report)}"
    return storable(page_of(rows, title=title, tokenizer=load_tokenizer(report.store.folder))).encode()


def _charts(report: Report) -> dict[str, bytes]:
    """By file name."""
    import vl_convert

    files = {}
    for name, chart in (("exact_match", report.plot()), ("outcomes", report.plot_outcomes())) if report else ():
        svg = vl_convert.vegalite_to_svg(chart.to_dict())
        files |= {f"{name}.svg": svg.encode(), f"{name}.png": vl_convert.svg_to_png(svg, scale=2)}
    return files


def _short_names(frame: pl.DataFrame) -> pl.DataFrame:
    """A frame for a chart, whose axes have little room for names."""
    names = {name: one_line(name, 40) for column in ("system", "suite") for name in frame[column].unique()}
    return frame.with_columns(pl.col("system", "suite").replace(names))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
