"""What an evaluation of one or several systems found, for people and for further work."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.compared import ComparisonOf, best_systems, comparison_frame
from searchr1_async.evaluation.figures import ALL_SUITES, MACRO, check_metric
from searchr1_async.evaluation.manifest import Manifest, SystemRecord
from searchr1_async.evaluation.priced import priced_costs
from searchr1_async.evaluation.published import Beside, PublishedRow, beside_published
from searchr1_async.evaluation.result import Evaluation, flips
from searchr1_async.evaluation.scores import METRICS
from searchr1_async.watch.rows import storable


class Report(Mapping[str, Evaluation]):
    """The evaluations of one or several systems over the same suites: a mapping from label to
    :class:`~searchr1_async.evaluation.result.Evaluation`, in the order in which the systems were given.

    In a notebook it shows itself as a table. Every frame has a fixed order of rows.

    Args:
        evaluations: one for each system; their labels differ.
        manifest: what was measured and how; None where nobody wrote it down.
        folder: of the evaluation, where its episodes lie; None where it has none.
        load_questions: gives the table of the questions that were asked (:mod:`searchr1_async.evaluation.asked`), with which the
            evaluation can be repeated; None where nobody kept them.

    Raises:
        ConfigurationError: two evaluations have one label.
    """

    def __init__(
        self,
        evaluations: Sequence[Evaluation],
        manifest: Manifest | None = None,
        folder: Path | None = None,
        load_questions: Callable[[], pl.DataFrame] | None = None,
    ) -> None:
        # A label as a file can hold it: a lone surrogate in it would fail in every frame.
        named = [replace(evaluation, label=storable(evaluation.label)) for evaluation in evaluations]
        self._evaluations = {evaluation.label: evaluation for evaluation in named}
        if len(self._evaluations) < len(evaluations):
            labels = ", ".join(repr(evaluation.label) for evaluation in evaluations)
            raise ConfigurationError(f"two evaluations have one label ({labels}): give each system its own")
        self.manifest = manifest
        self.folder = folder
        self.load_questions = load_questions
        self._best: dict[str, dict[str, str]] = {}

    # --- the evaluations ----------------------------------------------------------------------------------------------

    def __getitem__(self, label: str) -> Evaluation:
        return self._evaluations[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._evaluations)

    def __len__(self) -> int:
        return len(self._evaluations)

    @property
    def only(self) -> Evaluation:
        """The one evaluation of a report on one system.

        Raises:
            ConfigurationError: there are several, or none.
        """
        if len(self) != 1:
            raise ConfigurationError(
                f"this report is on {len(self)} systems ({', '.join(map(repr, self)) or 'none'}): name one, report[label]"
            )
        return next(iter(self.values()))

    @cached_property
    def suites(self) -> tuple[str, ...]:
        """Of all evaluations, in the order in which they were asked."""
        return tuple(dict.fromkeys(suite for evaluation in self.values() for suite in evaluation.suites))

    @property
    def columns(self) -> tuple[str, ...]:
        """The suites, and with several of them ``all`` (every question alike) and ``macro`` (every suite alike)."""
        return (*self.suites, ALL_SUITES, MACRO) if len(self.suites) > 1 else self.suites

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The four scores, and ``judged`` where a judge was asked."""
        judged = any(evaluation.scores["judged"].is_not_null().any() for evaluation in self.values())
        return (*METRICS, "judged") if judged else METRICS

    def record(self, label: str) -> SystemRecord | None:
        """What the manifest says of a system; None where it says nothing."""
        records = self.manifest.systems if self.manifest is not None else ()
        return next((record for record in records if record.label == label), None)

    # --- frames -------------------------------------------------------------------------------------------------------

    def frame(self) -> pl.DataFrame:
        """Columns ``system``, ``suite``, ``metric``, ``mean``, ``low``, ``high`` (95 %), ``questions`` and ``episodes`` (with a
        score): a row for each system, suite and score, and for ``all`` and ``macro`` where a system has several suites."""
        schema = {"system": pl.String, "suite": pl.String, "metric": pl.String}
        schema |= dict.fromkeys(("mean", "low", "high"), pl.Float64)
        empty = pl.DataFrame(schema=schema | dict.fromkeys(("questions", "episodes"), pl.Int64))
        parts = [
            evaluation.summary().select(pl.lit(label).alias("system"), pl.all()) for label, evaluation in self.items()
        ]
        return pl.concat([empty, *parts])

    def table(self, metric: str = "exact_match") -> pl.DataFrame:
        """A row for each system, a column for each suite, ``all`` and ``macro``: means from 0 to 1, null where nothing was
        measured.

        Raises:
            ConfigurationError: no such figure.
        """
        check_metric(metric)
        rows = [
            {"system": label, **{column: self.mean(label, metric, column) for column in self.columns}} for label in self
        ]
        return pl.DataFrame(rows, schema={"system": pl.String, **dict.fromkeys(self.columns, pl.Float64)}).fill_nan(
            None
        )

    def mean(self, label: str, metric: str, column: str) -> float | None:
        """One figure of :meth:`table`; None where the system was not asked this suite."""
        evaluation = self[label]
        has = column in evaluation.suites or (column in (ALL_SUITES, MACRO) and len(evaluation.suites) > 0)
        return evaluation.estimate(metric, column).mean if has else None

    def comparisons(
        self, baseline: str | None = None, *, metric: str = "exact_match", neighbours: bool = False
    ) -> pl.DataFrame:
        """Paired differences between systems: :data:`searchr1_async.evaluation.compared.COMPARISON_SCHEMA`.

        Args:
            baseline: what every other system is compared with; None is the first.
            metric: what is compared.
            neighbours: compare each system with the one before it instead.

        Systems that were asked different questions are left out; :meth:`notes` says so.

        Raises:
            ConfigurationError: no such system or figure.
        """
        check_metric(metric)
        return comparison_frame([self._pair(*pair) for pair in self.pairs(baseline, neighbours=neighbours)], metric)

    def pairs(self, baseline: str | None = None, *, neighbours: bool = False) -> list[tuple[str, str]]:
        """The labels that :meth:`comparisons` compares: before and after."""
        labels = list(self)
        if baseline is not None and baseline not in self:
            raise ConfigurationError(
                f"there is no system {baseline!r} to compare with: choose one of {', '.join(labels)}"
            )
        if neighbours:
            return list(itertools.pairwise(labels))
        first = baseline if baseline is not None else next(iter(labels), None)
        return [(first, label) for label in labels if label != first] if first is not None else []

    def is_paired(self, before: str, after: str) -> bool:
        """Both were asked the same questions, and so can be compared."""
        return self._pair(before, after).is_paired

    def _pair(self, before: str, after: str) -> ComparisonOf:
        return ComparisonOf(self[before], self[after])

    def best(self, metric: str = "exact_match") -> dict[str, str]:
        """For each suite, ``all`` and ``macro`` the system with the highest mean, where it is better than the next at the 5 %
        level (paired by question, adjusted over the columns by Holm); columns without such a system are left out."""
        if metric not in self._best:
            self._best[metric] = best_systems(list(self.values()), self.columns, metric)
        return dict(self._best[metric])

    def flips(self, before: str, after: str, metric: str = "exact_match", *, suite: str | None = None) -> pl.DataFrame:
        """The questions whose score changed between two systems (:func:`searchr1_async.evaluation.result.flips`).

        Raises:
            ConfigurationError: no such system, suite or figure, or they did not ask the same questions.
        """
        for label in (before, after):
            if label not in self:
                raise ConfigurationError(f"there is no system {label!r}: choose one of {', '.join(self)}")
        return flips(self[before], self[after], metric, suite=suite)

    def outcomes(self) -> pl.DataFrame:
        """Columns ``system``, ``suite``, ``outcome``, ``episodes`` and ``share``: where it went wrong
        (:data:`searchr1_async.evaluation.scores.OUTCOMES`)."""
        schema = {"system": pl.String, "suite": pl.String, "outcome": pl.String}
        empty = pl.DataFrame(schema={**schema, "episodes": pl.Int64, "share": pl.Float64})
        parts = [
            evaluation.outcomes().select(pl.lit(label).alias("system"), pl.all()) for label, evaluation in self.items()
        ]
        return pl.concat([empty, *parts])

    def costs(self) -> pl.DataFrame:
        """What a question took, with all its samples: :data:`searchr1_async.evaluation.priced.COST_SCHEMA`."""
        return priced_costs([(evaluation, self.record(label)) for label, evaluation in self.items()], self.manifest)

    def beside(self, published: Sequence[PublishedRow] | None = None) -> Beside:
        """Our exact match beside the published one, with what differs (:mod:`searchr1_async.evaluation.published`).

        Args:
            published: rows to stand beside; None is :data:`searchr1_async.evaluation.published.PUBLISHED`.
        """
        return beside_published(self, published)

    def notes(self) -> tuple[str, ...]:
        """What a careful reader must know of these figures, in sentences."""
        from searchr1_async.evaluation.render.notes import notes_of

        return notes_of(self)

    def figures(self) -> str:
        """Every figure, as JSON: the same text for an evaluation that was interrupted and one that was not.

        Measured times, dates, versions, prices of the day and what the service had cached are left out.
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
            "costs": costs.select(name for name in costs.columns if not _is_of_the_day(name)).rows(named=True),
            "notes": list(self.notes()),
        }  # fmt: skip
        if self.manifest is not None:
            values["manifest"] = {
                name: value for name, value in asdict(self.manifest).items() if name not in ("created", "versions")
            }
        return json.dumps(values, indent=1, ensure_ascii=True, default=str)

    # --- for people ---------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        from searchr1_async.evaluation.render.parts import result_table
        from searchr1_async.evaluation.render.text import plain_table

        return plain_table(result_table(self)) if len(self) else "Report of no systems"

    def _repr_html_(self) -> str:
        from searchr1_async.evaluation.render.cell import report_cell

        return report_cell(self)

    def plot(self, metric: str = "exact_match", **options: Any) -> Any:
        """A figure suite by suite, the systems side by side with their 95 % intervals: an Altair chart.

        Args:
            metric: as in :meth:`table`.
            options: ``title``, ``width`` and ``height`` (pixels).

        Raises:
            ConfigurationError: no such figure.
        """
        from searchr1_async.evaluation.render.charts import plot_figure  # altair: half a second

        return plot_figure(self, metric, **options)

    def plot_outcomes(self, **options: Any) -> Any:
        """What became of the episodes, each system a bar from right to failed: an Altair chart; options as of :meth:`plot`."""
        from searchr1_async.evaluation.render.charts import plot_outcomes

        return plot_outcomes(self, **options)

    def markdown(self) -> str:
        """The whole report as Markdown."""
        from searchr1_async.evaluation.render.document import markdown_report

        return markdown_report(self)

    def latex(self) -> str:
        """Its tables as LaTeX: exact match, differences and outcomes, each a ``table`` for ``booktabs``."""
        from searchr1_async.evaluation.render.document import latex_report

        return latex_report(self)

    def save(self, folder: str | Path | None = None) -> Path:
        """Writes the report and returns the path of its page. Synchronous: call it from a worker thread.

        ``report.html`` (one page, which links to ``episodes.html`` beside it where episodes were kept), ``report.md``,
        ``report.tex``, ``scores.parquet`` and ``figures/``; in another folder than the evaluation's own ``manifest.json`` and
        ``questions.parquet`` too, so that ``evaluate(folder)`` repeats it. Each file is replaced whole or not at all.

        Args:
            folder: made if need be; None is the evaluation's own.

        Raises:
            ConfigurationError: no folder is given, and the evaluation has none.
            RunFolderError: it cannot be written, it is the folder of a run or of another evaluation, or the episodes or
                questions cannot be read.
        """
        from searchr1_async.evaluation.render.saving import save_report

        target = absolute_path(folder, "folder") if folder is not None else self.folder
        if target is None:
            raise ConfigurationError("this report has no folder of its own: name one, report.save(folder)")
        return save_report(self, target)


def _is_of_the_day(cost: str) -> bool:
    """Whether a column of the costs differs between two evaluations whose episodes are the same."""
    return cost == "cost" or any(word in cost for word in ("second", "dollar", "cached"))
