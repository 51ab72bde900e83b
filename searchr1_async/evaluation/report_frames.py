"""Evaluations of one or several systems as frames: scores, paired differences, outcomes, costs. Pure.

Renderers take these frames; the public :class:`~searchr1_async.evaluation.report.Report` adds the presentation. Every frame has a
deterministic row order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import polars as pl

from searchr1_async.billing import Billing, TokenUsage, billing_of, is_tinker_host
from searchr1_async.episodes.table import storable
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.manifest import Manifest, SystemRecord
from searchr1_async.records.scores import ALL_SUITES, COSTS, MACRO, METRICS, QUESTION, check_metric
from searchr1_async.records.statistics import PairedDifference, holm_correction
from searchr1_async.runs.evaluation import Evaluation, compare, flips

COST_SCHEMA = pl.Schema(
    {
        "system": pl.String,
        "suite": pl.String,  # also "all" if there are several
        "questions": pl.Int64,
        "episodes": pl.Int64,  # finished ones; failed ones count only in dollars
        **dict.fromkeys(COSTS, pl.Float64),  # per question over all its samples, averaged
        "seconds_p95": pl.Float64,  # per episode
        "dollars": pl.Float64,  # per question; null if the price is unknown
        "dollars_total": pl.Float64,
        "cost": pl.String,  # the total as text
    }
)


def priced_costs(systems: Sequence[tuple[Evaluation, SystemRecord | None]], manifest: Manifest | None) -> pl.DataFrame:
    """One row per system and suite, with schema :data:`COST_SCHEMA`."""
    rows = []
    for evaluation, record in systems:
        costs, billing = evaluation.costs(), _billing(record, manifest)
        for (suite,), own in costs.group_by("suite", maintain_order=True):
            by_cost = {row["cost"]: row for row in own.iter_rows(named=True)}
            cost = billing.cost(_used(evaluation.scores, str(suite)))
            questions = own["questions"][0]
            rows.append(
                {
                    "system": evaluation.label,
                    "suite": suite,
                    "questions": questions,
                    "episodes": own["episodes"][0],
                    **{name: by_cost[name]["question_mean"] for name in COSTS},
                    "seconds_p95": by_cost["seconds"]["p95"],
                    "dollars": None if cost.dollars is None or not questions else cost.dollars / questions,
                    "dollars_total": cost.dollars,
                    "cost": "not known" if cost.dollars is None else cost.text,
                }
            )
    return pl.DataFrame(rows, schema=COST_SCHEMA)


def _used(scores: pl.DataFrame, suite: str) -> TokenUsage:
    """Tokens of a suite's episodes, including failed ones, which are billed too."""
    is_all = suite == ALL_SUITES and suite not in scores["suite"]
    own = scores if is_all else scores.filter(suite=suite)
    prompt, cached, sampled = own.select(pl.col("prompt_tokens", "cached_prompt_tokens", "sampled_tokens").sum()).row(0)
    return TokenUsage(prompt or 0, cached or 0, sampled or 0)


def _billing(record: SystemRecord | None, manifest: Manifest | None) -> Billing:
    if record is None or manifest is None:
        return Billing(reason="the model and the service were not recorded")
    service = manifest.service
    # Older manifests record only an explicit address.
    is_tinker = service.get("tinker", is_tinker_host(service.get("host")))
    return billing_of(record.model, is_embedded=bool(service.get("embedded")), is_tinker=is_tinker)


COMPARISON_SCHEMA = pl.Schema(
    {
        "before": pl.String,
        "after": pl.String,
        "suite": pl.String,  # also "all" and "macro" if there are several
        "difference": pl.Float64,  # mean over questions of after - before
        "low": pl.Float64,  # 95 %
        "high": pl.Float64,
        "p_value": pl.Float64,
        "p_holm": pl.Float64,  # Holm-adjusted, see comparison_frame
        "better": pl.Int64,  # questions
        "worse": pl.Int64,
        "questions": pl.Int64,
        "method": pl.String,
    }
)

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class ComparisonOf:
    before: Evaluation
    after: Evaluation

    @property
    def is_paired(self) -> bool:
        """Whether both have the same questions."""
        asked_before, asked_after = (own.by_question.select(QUESTION) for own in (self.before, self.after))
        return (
            asked_before.height == asked_after.height
            and not asked_before.join(asked_after, on=list(QUESTION), how="anti").height
        )

    @property
    def suites(self) -> tuple[str, ...]:
        """Each suite; with several, also ``all`` and ``macro``."""
        own = self.before.suites
        return (*own, ALL_SUITES, MACRO) if len(own) > 1 else own

    def difference(self, suite: str, metric: str) -> PairedDifference | None:
        """None if no question was finished on both sides."""
        try:
            return compare(self.before, self.after, metric, suite=suite)
        except ConfigurationError:
            return None


def comparison_frame(pairs: Sequence[ComparisonOf], metric: str) -> pl.DataFrame:
    """Compares the pairs per suite, with schema :data:`COMPARISON_SCHEMA`; pairs with different questions are excluded.

    ``p_holm`` is adjusted within three families: all ``all`` rows, all ``macro`` rows, and all single-suite rows (Holm 1979).
    """
    found = [
        (pair, suite, difference)
        for pair in pairs
        if pair.is_paired
        for suite in pair.suites
        if (difference := pair.difference(suite, metric)) is not None
    ]
    rows = [
        {
            "before": pair.before.label,
            "after": pair.after.label,
            "suite": suite,
            "difference": difference.mean,
            "low": difference.interval.low,
            "high": difference.interval.high,
            "p_value": difference.p_value,
            "p_holm": p_holm,
            "better": difference.improved,
            "worse": difference.worsened,
            "questions": difference.questions,
            "method": difference.method,
        }
        for (pair, suite, difference), p_holm in zip(found, _adjusted(found), strict=True)
    ]
    return pl.DataFrame(rows, schema=COMPARISON_SCHEMA)


def _adjusted(found: Sequence[tuple[ComparisonOf, str, PairedDifference]]) -> list[float]:
    adjusted = [math.nan] * len(found)
    kinds = [suite if suite in (ALL_SUITES, MACRO) else "suite" for _, suite, _ in found]
    for kind in dict.fromkeys(kinds):
        places = [place for place, own in enumerate(kinds) if own == kind]
        for place, p in zip(places, holm_correction([found[place][2].p_value for place in places]), strict=True):
            adjusted[place] = p
    return adjusted


def best_systems(evaluations: Sequence[Evaluation], columns: Sequence[str], metric: str) -> dict[str, str]:
    """Per column, the best system if it beats the next one at the 5 % level, Holm-adjusted over columns."""
    tested: list[tuple[str, str, float]] = []
    for column in columns:
        means = {
            evaluation.label: (evaluation.estimate(metric, column).mean, evaluation)
            for evaluation in evaluations
            if column in evaluation.suites or (column in (ALL_SUITES, MACRO) and evaluation.suites)
        }
        ranked = sorted((pair for pair in means.values() if not math.isnan(pair[0])), key=lambda pair: -pair[0])
        if len(ranked) < 2 or ranked[0][0] == ranked[1][0]:
            continue
        pair = ComparisonOf(ranked[1][1], ranked[0][1])
        if pair.is_paired and (difference := pair.difference(column, metric)) is not None:
            tested.append((column, ranked[0][1].label, difference.p_value))
    adjusted = holm_correction([p for _, _, p in tested])
    return {column: label for (column, label, _), p in zip(tested, adjusted, strict=True) if p < SIGNIFICANT}


class ReportFrames(Mapping[str, Evaluation]):
    """Evaluations of one or several systems over the same suites: a mapping from label to
    :class:`~searchr1_async.runs.evaluation.Evaluation`, in the order the systems were given.

    Renders as a table in notebooks. Every frame has a deterministic row order.

    Args:
        evaluations: one per system; labels must be unique.
        manifest: what was measured and how, if recorded.
        folder: the evaluation's folder with its episodes, if it has one.
        load_questions: returns the questions table (:mod:`searchr1_async.evaluation.manifest`), needed to repeat the
            evaluation; None if the questions were not kept.

    Raises:
        ConfigurationError: two evaluations have the same label.
    """

    def __init__(
        self,
        evaluations: Sequence[Evaluation],
        manifest: Manifest | None = None,
        folder: Path | None = None,
        load_questions: Callable[[], pl.DataFrame] | None = None,
    ) -> None:
        # A lone surrogate in a label would fail in every frame.
        named = [replace(evaluation, label=storable(evaluation.label)) for evaluation in evaluations]
        self._evaluations = {evaluation.label: evaluation for evaluation in named}
        if len(self._evaluations) < len(evaluations):
            labels = ", ".join(repr(evaluation.label) for evaluation in evaluations)
            raise ConfigurationError(f"two evaluations have the same label ({labels}): give each system its own")
        self.manifest = manifest
        self.folder = folder
        self.load_questions = load_questions
        self._best: dict[str, dict[str, str]] = {}

    # --- evaluations --------------------------------------------------------------------------------------------------

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
        return (*self.suites, ALL_SUITES, MACRO) if len(self.suites) > 1 else self.suites

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The four scores, plus ``judged`` if a judge ran."""
        judged = any(evaluation.scores["judged"].is_not_null().any() for evaluation in self.values())
        return (*METRICS, "judged") if judged else METRICS

    def record(self, label: str) -> SystemRecord | None:
        """The manifest's record of a system, if there is one."""
        records = self.manifest.systems if self.manifest is not None else ()
        return next((record for record in records if record.label == label), None)

    # --- frames -------------------------------------------------------------------------------------------------------

    def frame(self) -> pl.DataFrame:
        """:meth:`Evaluation.summary` of every system, with a leading column ``system``."""
        schema = {"system": pl.String, "suite": pl.String, "metric": pl.String}
        schema |= dict.fromkeys(("mean", "low", "high"), pl.Float64)
        empty = pl.DataFrame(schema=schema | dict.fromkeys(("questions", "episodes"), pl.Int64))
        parts = [
            evaluation.summary().select(pl.lit(label).alias("system"), pl.all()) for label, evaluation in self.items()
        ]
        return pl.concat([empty, *parts])

    def table(self, metric: str = "exact_match") -> pl.DataFrame:
        """One row per system, one column per suite, ``all`` and ``macro``: means, null if not measured.

        Raises:
            ConfigurationError: unknown metric.
        """
        check_metric(metric)
        rows = [
            {"system": label, **{column: self.mean(label, metric, column) for column in self.columns}} for label in self
        ]
        return pl.DataFrame(rows, schema={"system": pl.String, **dict.fromkeys(self.columns, pl.Float64)}).fill_nan(
            None
        )

    def mean(self, label: str, metric: str, column: str) -> float | None:
        """One cell of :meth:`table`; None if the system was not evaluated on this suite."""
        evaluation = self[label]
        has = column in evaluation.suites or (column in (ALL_SUITES, MACRO) and len(evaluation.suites) > 0)
        return evaluation.estimate(metric, column).mean if has else None

    def comparisons(
        self, baseline: str | None = None, *, metric: str = "exact_match", neighbours: bool = False
    ) -> pl.DataFrame:
        """Paired differences between systems: :data:`COMPARISON_SCHEMA`.

        Args:
            baseline: the system to compare all others with; None is the first.
            metric: as in :meth:`table`.
            neighbours: compare each system with the previous one instead.

        Pairs with different questions are excluded; :meth:`notes` lists them.

        Raises:
            ConfigurationError: unknown system or metric.
        """
        check_metric(metric)
        return comparison_frame([self._pair(*pair) for pair in self.pairs(baseline, neighbours=neighbours)], metric)

    def pairs(self, baseline: str | None = None, *, neighbours: bool = False) -> list[tuple[str, str]]:
        """The ``(before, after)`` labels that :meth:`comparisons` compares."""
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
        """Whether both systems have the same questions."""
        return self._pair(before, after).is_paired

    def _pair(self, before: str, after: str) -> ComparisonOf:
        return ComparisonOf(self[before], self[after])

    def best(self, metric: str = "exact_match") -> dict[str, str]:
        """Per column of :meth:`table`, the best system if it beats the next one at the 5 % level (paired by question,
        Holm-adjusted over columns); other columns are absent."""
        if metric not in self._best:
            self._best[metric] = best_systems(list(self.values()), self.columns, metric)
        return dict(self._best[metric])

    def flips(self, before: str, after: str, metric: str = "exact_match", *, suite: str | None = None) -> pl.DataFrame:
        """Questions whose score changed between two systems (:func:`searchr1_async.runs.evaluation.flips`).

        Raises:
            ConfigurationError: unknown system, suite or metric, or the systems have different questions.
        """
        for label in (before, after):
            if label not in self:
                raise ConfigurationError(f"there is no system {label!r}: choose one of {', '.join(self)}")
        return flips(self[before], self[after], metric, suite=suite)

    def outcomes(self) -> pl.DataFrame:
        """Columns ``system``, ``suite``, ``outcome`` (:data:`searchr1_async.records.scores.OUTCOMES`), ``episodes`` and
        ``share``."""
        schema = {"system": pl.String, "suite": pl.String, "outcome": pl.String}
        empty = pl.DataFrame(schema={**schema, "episodes": pl.Int64, "share": pl.Float64})
        parts = [
            evaluation.outcomes().select(pl.lit(label).alias("system"), pl.all()) for label, evaluation in self.items()
        ]
        return pl.concat([empty, *parts])

    def costs(self) -> pl.DataFrame:
        """Cost per question over all its samples: :data:`COST_SCHEMA`."""
        return priced_costs([(evaluation, self.record(label)) for label, evaluation in self.items()], self.manifest)
