"""Entry point to all charts of a run, by name, from the run's folder."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.errors import ConfigurationError
from searchr1_async.records.run_records import RunRecords
from searchr1_async.trackers.tracker import EVENTS_FILE, read_events
from searchr1_async.watch.charts.curves import plot_learning, plot_metric, plot_reward_by_turns, plot_suites
from searchr1_async.watch.charts.theme import METRICS, enable_renderer, evaluation_scores, metric_named
from searchr1_async.watch.charts.timeline import plot_timeline

if TYPE_CHECKING:
    import altair as alt

    Chart = alt.Chart | alt.LayerChart | alt.ConcatChart | alt.VConcatChart


def draw(run: RunRecords | Path | str, kind: str | Sequence[str] = "learning", **options: Any) -> Chart:
    """A chart of a running or finished run as an Altair object: adjust it, concatenate it (``a | b``), or save it with
    ``chart.save("chart.png")`` or ``.svg``. Without data it is a chart that says so.

    Args:
        run: its records or its folder.
        kind: ``learning`` (reward, exact match, turns, valid calls), ``timeline`` (``step=…``), ``reward_by_turns``,
            ``reward_by_searches``, ``suites``; or one or more metrics (``reward``, ``exact_match``, ``turns``, ``valid_calls``, any
            column of ``run.metrics``).
        options: of the chart's function in :mod:`searchr1_async.watch.charts`: ``title``, ``width``, ``height``, ``smooth``,
            ``step``, ``first_step``, ``last_step``. ``evaluations=None`` omits the evaluations.

    Raises:
        ConfigurationError: an unknown kind or metric, or an unsupported option.
    """
    records = run if isinstance(run, RunRecords) else RunRecords(absolute_path(run, "run"))
    if in_notebook():
        enable_renderer()
    if isinstance(kind, str) and (drawn := _KINDS.get(kind)) is not None:
        return _called(kind, drawn, records, options)
    metrics = records.metrics()
    names = [kind] if isinstance(kind, str) else list(kind)
    if not names:
        raise ConfigurationError(f"no metric to draw: choose from {', '.join(METRICS)}, or a column of run.metrics")
    if metrics.height:
        for name in names:
            _checked(name, metrics.columns)
    elif unknown := next((name for name in names if name not in METRICS), None):
        if isinstance(kind, str) and "/" not in unknown:
            _refuse_kind(unknown)
        # Before the first step it is unknown which columns there will be.
        return plot_metric(
            pl.DataFrame(schema={"step": pl.Int64}), "reward", title=options.get("title") or ", ".join(names)
        )
    return _called(", ".join(names), lambda own, **rest: _metric(own, metrics, names, **rest), records, options)


def in_notebook() -> bool:
    """Whether an IPython kernel runs in this process."""
    import sys

    if "IPython" not in sys.modules:
        return False
    from IPython.core.getipython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


def _checked(name: str, columns: Sequence[str]) -> None:
    try:
        metric_named(name, columns)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error} Chart kinds: {', '.join(_KINDS)}.{_near_kind(name)}") from None


def _refuse_kind(name: str) -> None:
    raise ConfigurationError(
        f"there is no chart {name!r}. Kinds: {', '.join(_KINDS)}; metrics: {', '.join(METRICS)}, and, after the first step, "
        f"every column of run.metrics.{_near_kind(name)}"
    )


def _near_kind(name: str) -> str:
    near = difflib.get_close_matches(name, [*_KINDS, *METRICS], n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def _called(kind: str, function: Callable[..., Any], records: RunRecords, options: dict[str, Any]) -> Chart:
    try:
        return function(records, **options)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise ConfigurationError(f"{kind}: {str(error).partition(') ')[2] or str(error)}") from error


def _scores(records: RunRecords, options: dict[str, Any]) -> dict[str, Any]:
    if "evaluations" not in options:
        options["evaluations"] = evaluation_scores(records.evaluations())
    return options


def _metric(records: RunRecords, metrics: pl.DataFrame, names: Sequence[str], **options: Any) -> Chart:
    is_measured = any(name in METRICS and METRICS[name].part for name in names)
    return plot_metric(metrics, names, **(_scores(records, options) if is_measured else options))


def _learning(records: RunRecords, **options: Any) -> Chart:
    return plot_learning(records.metrics(), **_scores(records, options))


def _timeline(records: RunRecords, **options: Any) -> Chart:
    return plot_timeline(read_events(records.folder / EVENTS_FILE), **options)


def _suites(records: RunRecords, **options: Any) -> Chart:
    return plot_suites(evaluation_scores(records.evaluations()), **options)


_KINDS: dict[str, Callable[..., Chart]] = {
    "learning": _learning,
    "timeline": _timeline,
    "reward_by_turns": lambda records, **options: plot_reward_by_turns(records.episodes(), **options),
    "reward_by_searches": lambda records, **options: plot_reward_by_turns(
        records.episodes(), **{"by": "searches", **options}
    ),
    "suites": _suites,
}
