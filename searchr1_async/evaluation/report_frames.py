"""Evaluations of one or several systems as frames, each in a deterministic row order: scores, paired differences, outcomes, costs.

Tables and notes are made from these; the public :class:`~searchr1_async.evaluation.report.Report` adds the presentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import polars as pl

from searchr1_async.billing import Billing, TokenUsage, billing_of, is_tinker_host
from searchr1_async.episodes.table import storable
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.episode_store import EpisodeStore
from searchr1_async.evaluation.manifest import Manifest, SystemRecord
from searchr1_async.records.scores import ALL_SUITES, MACRO, QUESTION, SCORES, SUITE_COSTS, check_metric
from searchr1_async.records.statistics import holm_adjusted
from searchr1_async.runs.evaluation import Evaluation, compare, flips

_ESTIMATES = pl.Schema({"system": pl.String, "suite": pl.String, **dict.fromkeys(("mean", "low", "high"), pl.Float64)})
COMPARISON_SCHEMA = pl.Schema(
    {
        "before": pl.String,
        "after": pl.String,
        "suite": pl.String,  # also "all" and "macro" if there are several
        "difference": pl.Float64,  # mean over questions of after - before
        "low": pl.Float64,  # 95 %
        "high": pl.Float64,
        "p_value": pl.Float64,
        "p_holm": pl.Float64,  # Holm-adjusted, see Report.comparisons
        "better": pl.Int64,  # questions
        "worse": pl.Int64,
        "questions": pl.Int64,
        "method": pl.String,
    }
)
COST_SCHEMA = pl.Schema(
    {
        "system": pl.String,
        **SUITE_COSTS,
        "dollars": pl.Float64,  # per question, failed episodes included; null if the price is unknown
        "dollars_total": pl.Float64,
        "cost": pl.String,  # the total as text
    }
)


class ReportFrames(Mapping[str, Evaluation]):
    """The frames of a :class:`~searchr1_async.evaluation.report.Report`.

    Args:
        evaluations: one per system; labels must be unique.
        manifest: what was measured and how, if recorded.
        store: the evaluation's questions and episodes, if they were kept.

    Raises:
        ConfigurationError: two evaluations have the same label.
    """

    def __init__(
        self,
        evaluations: Sequence[Evaluation],
        manifest: Manifest | None = None,
        store: EpisodeStore | None = None,
    ) -> None:
        # A lone surrogate in a label would fail in every frame.
        named = [replace(evaluation, label=storable(evaluation.label)) for evaluation in evaluations]
        self._evaluations = {evaluation.label: evaluation for evaluation in named}
        if len(self._evaluations) < len(evaluations):
            labels = ", ".join(repr(evaluation.label) for evaluation in evaluations)
            raise ConfigurationError(f"two evaluations have the same label ({labels}): give each system its own")
        self.manifest = manifest
        self.store = store

    @property
    def folder(self) -> Path | None:
        """The evaluation's folder; None if it has none."""
        return self.store.folder if self.store is not None and self.store.is_kept else None

    def __getitem__(self, label: str) -> Evaluation:
        return self._evaluations[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._evaluations)

    def __len__(self) -> int:
        return len(self._evaluations)

    @property
    def only(self) -> Evaluation:
        """The evaluation of a single-system report.

        Raises:
            ConfigurationError: the report has no system, or several.
        """
        if len(self) != 1:
            raise ConfigurationError(
                f"this report has {len(self)} systems ({', '.join(map(repr, self)) or 'none'}): pick one with report[label]"
            )
        return next(iter(self.values()))

    @cached_property
    def suites(self) -> tuple[str, ...]:
        """Suites of all evaluations, in question order."""
        return tuple(dict.fromkeys(suite for evaluation in self.values() for suite in evaluation.suites))

    @property
    def columns(self) -> tuple[str, ...]:
        """The suites; with several, also ``all`` (pooled questions) and ``macro`` (unweighted mean over suites)."""
        return _columns_of(self.suites)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The four scores, plus ``judged`` if a judge ran."""
        judged = any(evaluation.scores["judged"].is_not_null().any() for evaluation in self.values())
        return (*SCORES, "judged") if judged else SCORES

    def record(self, label: str) -> SystemRecord | None:
        """The manifest's record of a system, if there is one."""
        records = self.manifest.systems if self.manifest is not None else ()
        return next((record for record in records if record.label == label), None)

    # --- frames -------------------------------------------------------------------------------------------------------

    def frame(self) -> pl.DataFrame:
        """:meth:`Evaluation.summary` of every system, with a leading column ``system``."""
        return self._of_all(Evaluation.summary)

    def _of_all(self, frame_of: Callable[[Evaluation], pl.DataFrame]) -> pl.DataFrame:
        frames = [frame_of(own).select(pl.lit(label).alias("system"), pl.all()) for label, own in self.items()]
        return pl.concat(frames) if frames else pl.DataFrame()

    def estimates(self, metric: str = "exact_match") -> pl.DataFrame:
        """``system``, ``suite`` (one of :attr:`columns`), ``mean``, ``low`` and ``high`` (95 %; NaN without data).

        Args:
            metric: a score, or another numeric column of ``scores`` (``turns``, ``searches``, ``prompt_tokens``, …).

        Raises:
            ConfigurationError: unknown metric.
        """
        check_metric(metric)
        rows = [
            (label, column, *own.estimate(metric, column))
            for label, own in self.items()
            for column in self.columns
            if column in (*own.suites, ALL_SUITES, MACRO)
        ]
        return pl.DataFrame(rows, schema=_ESTIMATES, orient="row")

    def table(self, metric: str = "exact_match") -> pl.DataFrame:
        """One row per system, one column per suite, ``all`` and ``macro``: means, null if not measured.

        Arguments and errors as in :meth:`estimates`.
        """
        means = {(label, suite): mean for label, suite, mean, *_ in self.estimates(metric).iter_rows()}
        rows = [[label, *(means.get((label, column)) for column in self.columns)] for label in self]
        schema = {"system": pl.String, **dict.fromkeys(self.columns, pl.Float64)}
        return pl.DataFrame(rows, schema=schema, orient="row").fill_nan(None)

    def comparisons(self, baseline: str | None = None, *, metric: str = "exact_match") -> pl.DataFrame:
        """Paired differences between systems: :data:`COMPARISON_SCHEMA`.

        ``p_holm`` is adjusted within three families: all ``all`` rows, all ``macro`` rows, and all single-suite rows (Holm 1979).
        Pairs with different questions are excluded; :meth:`notes` lists them.

        Args:
            baseline: the system to compare all others with; None is the first.
            metric: as in :meth:`estimates`.

        Raises:
            ConfigurationError: unknown system or metric.
        """
        check_metric(metric)
        rows = []
        for before, after in self.pairs(baseline):
            for suite in _columns_of(before.suites) if have_same_questions(before, after) else ():
                try:
                    own = compare(before, after, metric, suite=suite)
                except ConfigurationError:  # no question was finished on both sides
                    continue
                counts = (own.improved, own.worsened, own.questions, own.method)
                rows.append((before.label, after.label, suite, own.mean, *own.interval, own.p_value, None, *counts))
        family = pl.when(pl.col("suite").is_in([ALL_SUITES, MACRO])).then("suite").otherwise(pl.lit(""))
        found = pl.DataFrame(rows, schema=COMPARISON_SCHEMA, orient="row")
        return found.with_columns(p_holm=holm_adjusted("p_value").over(family))

    def pairs(self, baseline: str | None = None) -> list[tuple[Evaluation, Evaluation]]:
        """The pairs (before, after) that :meth:`comparisons` compares."""
        if not self:
            return []
        before = self._named(next(iter(self)) if baseline is None else baseline)
        return [(before, own) for own in self.values() if own is not before]

    def _named(self, label: str) -> Evaluation:
        if label not in self:
            raise ConfigurationError(f"there is no system {label!r}: choose one of {', '.join(self)}")
        return self[label]

    def flips(self, before: str, after: str, metric: str = "exact_match", *, suite: str | None = None) -> pl.DataFrame:
        """Questions whose score changed between two systems (:func:`searchr1_async.runs.evaluation.flips`).

        Raises:
            ConfigurationError: unknown system, suite or metric, or the systems have different questions.
        """
        return flips(self._named(before), self._named(after), metric, suite=suite)

    def all_flips(self) -> Iterator[tuple[str, str, pl.DataFrame]]:
        """The flips of each of :meth:`pairs` that has the same questions, some of them finished on both sides."""
        for before, after in self.pairs():
            try:
                yield before.label, after.label, flips(before, after)
            except ConfigurationError:
                continue

    def outcomes(self) -> pl.DataFrame:
        """Columns ``system``, ``suite``, ``outcome`` (:data:`searchr1_async.records.scores.OUTCOMES`), ``episodes`` and
        ``share``."""
        return self._of_all(Evaluation.outcomes)

    def costs(self) -> pl.DataFrame:
        """Cost per question over all its samples: :data:`COST_SCHEMA`."""
        rows = []
        for label, evaluation in self.items():
            billing = self._billing(label)
            for row in evaluation.costs().iter_rows(named=True):
                cost = billing.cost(_used(evaluation.scores, row["suite"]))
                each = None if cost.dollars is None else cost.dollars / row["questions"]
                rows.append((label, *row.values(), each, cost.dollars, cost.text))
        return pl.DataFrame(rows, schema=COST_SCHEMA, orient="row")

    def _billing(self, label: str) -> Billing:
        record = self.record(label)
        if record is None or self.manifest is None:
            return Billing(reason="the model and the service were not recorded")
        service = self.manifest.service
        # Older manifests record only an explicit address.
        is_tinker = service.get("tinker", is_tinker_host(service.get("host")))
        return billing_of(record.model, is_embedded=bool(service.get("embedded")), is_tinker=is_tinker)


def _used(scores: pl.DataFrame, suite: str) -> TokenUsage:
    """Tokens of a suite's episodes, including failed ones, which are billed too."""
    is_all = suite == ALL_SUITES and suite not in scores["suite"]
    own = scores if is_all else scores.filter(suite=suite)
    return TokenUsage(*own.select(pl.col("prompt_tokens", "cached_prompt_tokens", "sampled_tokens").sum()).row(0))


def _columns_of(suites: Sequence[str]) -> tuple[str, ...]:
    return (*suites, ALL_SUITES, MACRO) if len(suites) > 1 else tuple(suites)


def have_same_questions(before: Evaluation, after: Evaluation) -> bool:
    return set(before.by_question.select(QUESTION).iter_rows()) == set(after.by_question.select(QUESTION).iter_rows())
