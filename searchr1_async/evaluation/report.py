"""The public report of an evaluation: frames, notes, charts and files, also read back from a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from searchr1_async.boundary.paths import absolute_path, parquet_bytes, write_atomically
from searchr1_async.episodes.table import storable
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.evaluation.episode_store import EpisodeStore
from searchr1_async.evaluation.manifest import QUESTIONS_NAME, Manifest, read_questions
from searchr1_async.evaluation.published import Beside, PublishedRow, beside_published
from searchr1_async.evaluation.report_charts import plot_figure, plot_outcomes
from searchr1_async.evaluation.report_episodes import EPISODES_NAME, choose, chosen_rows, key_of
from searchr1_async.evaluation.report_frames import ReportFrames
from searchr1_async.evaluation.report_page import episodes_title, report_cell, report_page
from searchr1_async.evaluation.report_tables import result_table
from searchr1_async.evaluation.report_text import latex_report, markdown_report, notes_of, plain_table
from searchr1_async.records.scores import SCORE_SCHEMA
from searchr1_async.runs.evaluation import Evaluation
from searchr1_async.watch.viewer import load_tokenizer, page_of, remember_tokenizer


class Report(ReportFrames):
    """Evaluations of one or several systems over the same suites: a mapping from label to
    :class:`~searchr1_async.runs.evaluation.Evaluation`, in the order the systems were given.

    Renders as a table in notebooks. :class:`~searchr1_async.evaluation.report_frames.ReportFrames` documents the arguments.
    """

    def beside(self, published: Sequence[PublishedRow] | None = None) -> Beside:
        """Our exact match beside published results, with the differing conditions
        (:mod:`searchr1_async.evaluation.published`).

        Args:
            published: None is :data:`searchr1_async.evaluation.published.PUBLISHED`.
        """
        return beside_published(self, published)

    def notes(self) -> tuple[str, ...]:
        """Caveats about these results, as sentences."""
        return notes_of(self)

    def figures(self) -> str:
        """All results as JSON, identical for a resumed and an uninterrupted evaluation.

        Excludes timings, dates, versions, prices and cache hits.
        """
        costs = self.costs()
        values: dict[str, Any] = {
            "scores": self.frame().rows(named=True),
            "comparisons": self.comparisons().rows(named=True),
            "flips": [
                {"before": before, "after": after, "flips": self.flips(before, after).rows(named=True)}
                for before, after in self.pairs()
                if self.is_paired(before, after)
            ],
            "outcomes": self.outcomes().rows(named=True),
            "costs": costs.select(name for name in costs.columns if not _is_volatile(name)).rows(named=True),
            "notes": list(self.notes()),
        }  # fmt: skip
        if self.manifest is not None:
            values["manifest"] = {
                name: value for name, value in asdict(self.manifest).items() if name not in ("created", "versions")
            }
        return json.dumps(values, indent=1, ensure_ascii=True, default=str)

    # --- presentation -------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return plain_table(result_table(self)) if len(self) else "Report of no systems"

    def _repr_html_(self) -> str:
        return report_cell(self)

    def plot(self, metric: str = "exact_match", **options: Any) -> Any:
        """An Altair bar chart of a metric per suite and system, with 95 % intervals.

        Args:
            metric: as in :meth:`table`.
            options: ``title``, ``width`` and ``height`` (pixels).

        Raises:
            ConfigurationError: unknown metric.
        """
        return plot_figure(self, metric, **options)

    def plot_outcomes(self, **options: Any) -> Any:
        """An Altair chart of outcome shares, one bar per system; options as in :meth:`plot`."""
        return plot_outcomes(self, **options)

    def markdown(self) -> str:
        """The whole report as Markdown."""
        return markdown_report(self)

    def latex(self) -> str:
        """The tables as LaTeX ``table`` environments for ``booktabs``."""
        return latex_report(self)

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


def _is_volatile(cost: str) -> bool:
    """Whether a cost column can differ between two evaluations with equal episodes."""
    return cost == "cost" or any(word in cost for word in ("second", "dollar", "cached"))


def open_report(folder: str | Path) -> Report:
    """The report of an evaluation's folder, finished or not. Reads all episodes.

    Raises:
        RunFolderError: the folder contains no evaluation, or cannot be read.
    """
    path = absolute_path(folder, "folder")
    manifest = Manifest.load(path)
    if manifest is None:
        raise RunFolderError(f"{path} contains no evaluation: pass the out_dir of an evaluate() call")
    store = EpisodeStore(path)
    store.load()
    if (tokenizer := load_tokenizer(path)) is not None:
        remember_tokenizer(tokenizer)
    return make_report(store, manifest)


def make_report(store: EpisodeStore, manifest: Manifest) -> Report:
    """The report of a store, with systems in the manifest's order."""
    scores = store.scores()
    evaluations = [evaluation_of(system.label, scores, system.step, store) for system in manifest.systems]
    return Report(evaluations, manifest, store.folder if store.is_kept else None, partial(_questions, store))


def _questions(store: EpisodeStore) -> pl.DataFrame:
    # Takes the store, not its folder: a temporary folder lives only as long as its store.
    return read_questions(store.folder)


def evaluation_of(label: str, scores: pl.DataFrame, step: int | None, store: EpisodeStore | None = None) -> Evaluation:
    """One system's scores; without a store, its episodes cannot be loaded."""
    own = scores.filter(system=label)
    return Evaluation(label, own, step, None if store is None else partial(store.episodes, label))


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
