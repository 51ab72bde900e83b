"""Charts of a run as Altair objects, to adjust, concatenate, or save as PNG or SVG.

``run.plot(kind)`` calls :func:`draw`; the other functions take data frames directly. Labels, bounds and formats are those of
:data:`searchr1_async.records.metrics.METRICS`. Altair is imported on first use.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.signals import in_kernel
from searchr1_async.errors import ConfigurationError
from searchr1_async.records.metrics import CURVES, EXACT_MATCH, METRICS, OF_ALL, Metric, metric_of
from searchr1_async.records.run_records import RunRecords
from searchr1_async.trackers.tracker import EVENTS_FILE, read_events
from searchr1_async.watch.chart_parts import (
    CALLS,
    HEIGHT,
    HELD_OUT,
    MAX_ROWS,
    SEEN,
    SERIES,
    TRAINING,
    TURNS,
    WIDTH,
    empty_chart,
    enable_renderer,
    heading,
    legend,
    plain_text,
    steps_axis,
    table,
    thinned,
    values_axis,
)
from searchr1_async.watch.outcome_charts import evaluation_scores, overall, plot_reward_by_turns, plot_suites
from searchr1_async.watch.timeline import plot_timeline, timeline_of

if TYPE_CHECKING:
    import altair as alt

    Chart = alt.Chart | alt.LayerChart | alt.ConcatChart | alt.VConcatChart

__all__ = [
    "draw",
    "enable_renderer",
    "evaluation_scores",
    "plot_learning",
    "plot_metric",
    "plot_reward_by_turns",
    "plot_suites",
    "plot_timeline",
    "timeline_of",
]

_COLOURS = dict(zip((curve.column for curve in CURVES), (SEEN, TRAINING, TURNS, CALLS), strict=True))
_NO_STEP = "No step has finished yet: nothing to draw."
_NAMES = ("reward", "exact_match", "turns", "valid_calls", "searches", "answer_in_passage", "staleness")
"""Metrics named in messages; every other one is accepted too."""


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
    if in_kernel():
        enable_renderer()
    if isinstance(kind, str) and (drawn := _KINDS.get(kind)) is not None:
        return _called(kind, drawn, records, options)
    metrics = records.metrics()
    names = [kind] if isinstance(kind, str) else list(kind)
    if not names:
        raise ConfigurationError(f"no metric to draw: choose from {', '.join(_NAMES)}, or a column of run.metrics")
    for name in names:
        _check(name, metrics.columns if metrics.height else None, is_only=isinstance(kind, str))
    if not metrics.height and None in map(_named_in_table, names):
        # Before the first step it is unknown which columns there will be.
        return empty_chart(_NO_STEP, title=options.get("title") or ", ".join(names))
    return _called(", ".join(names), lambda own, **rest: _metric(own, metrics, names, **rest), records, options)


def _check(name: str, columns: Sequence[str] | None, *, is_only: bool) -> None:
    """Refuse a name that is neither kind nor metric. ``columns``: None before the first step, when the columns are unknown."""
    if _named_in_table(name) or (columns is None and not (is_only and "/" not in name)):
        return
    near = difflib.get_close_matches(name, [*_KINDS, *_NAMES], n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if columns is None:
        raise ConfigurationError(
            f"there is no chart {name!r}. Kinds: {', '.join(_KINDS)}; metrics: {', '.join(_NAMES)}, and, after the first step, "
            f"every column of run.metrics.{hint}"
        )
    try:
        metric_named(name, columns)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error} Chart kinds: {', '.join(_KINDS)}.{hint}") from None


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
    is_evaluated = any(metric_of(name) is EXACT_MATCH for name in names)
    return plot_metric(metrics, names, **(_scores(records, options) if is_evaluated else options))


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


def plot_metric(
    metrics: pl.DataFrame,
    names: str | Sequence[str],
    *,
    evaluations: pl.DataFrame | None = None,
    smooth: bool = True,
    title: str | None = None,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> alt.LayerChart | alt.Chart:
    """One or several metrics by step.

    Args:
        metrics: one row per step, as from ``run.metrics``.
        names: ``reward``, ``exact_match``, ``turns``, ``valid_calls``, or any other metric of the table or column, with or
            without ``env/all/``. Several share one panel.
        evaluations: as from :func:`evaluation_scores`; drawn with exact match. None omits them.
        smooth: draw the trend (a local mean over a twentieth of the run) with a band of one local standard deviation; otherwise
            points are joined.
        title: None uses the metric's name.
        width: of the panel, in pixels.
        height: of the panel, in pixels.

    Raises:
        ConfigurationError: no such metric; suggests close matches.
    """
    wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    found = [metric_named(name, metrics.columns) for name in wanted]
    shown = overall(evaluations) if evaluations is not None and EXACT_MATCH in found else None
    text = title if title is not None else ", ".join(metric.heading for metric in found)
    rows = [metric_rows(metrics, metric) for metric in found]
    if not any(frame.height for frame in rows) and (shown is None or not shown.height):
        reason = f"No finished step has this metric ({', '.join(metric.column for metric in found)})."
        return empty_chart(reason if metrics.height else _NO_STEP, title=text)
    colours = _colours(found)
    panel = _panel(found, rows, colours, shown, smooth)
    return panel.properties(width=width, height=height, title=heading(text, _legend_text(rows, shown, smooth)))


def plot_learning(
    metrics: pl.DataFrame,
    *,
    evaluations: pl.DataFrame | None = None,
    smooth: bool = True,
    title: str = "",
    width: int = 230,
    height: int = 150,
) -> alt.ConcatChart | alt.Chart:
    """Reward, exact match, turns per episode and valid calls, one panel each; arguments as in :func:`plot_metric`, with
    ``width`` and ``height`` per panel."""
    import altair as alt

    if not metrics.height and (evaluations is None or not evaluations.height):
        return empty_chart(_NO_STEP, title=title)
    panels = []
    for metric in CURVES:
        shown = overall(evaluations) if evaluations is not None and metric is EXACT_MATCH else None
        rows = metric_rows(metrics, metric)
        if rows.height or (shown is not None and shown.height):
            panel = _panel(
                [metric], [rows], [_COLOURS[metric.column]], shown, smooth, most=MAX_ROWS // 4, has_title=False
            )
            panels.append(panel.properties(width=width, height=height, title=heading(metric.heading)))
        else:
            panels.append(empty_chart("No value yet.", title=metric.heading).properties(width=width, height=height))
    grid = alt.concat(*panels, columns=2, spacing={"row": 16, "column": 20})
    return grid.properties(title=heading(title)) if title else grid


def _colours(metrics: Sequence[Metric]) -> list[str]:
    """Each metric's own colour, else the next unused one."""
    own = [_COLOURS.get(metric.column) for metric in metrics]
    free = [colour for colour in SERIES if colour not in own] or list(SERIES)
    taken = iter(free * len(metrics))
    return [colour or next(taken) for colour in own]


def _panel(
    found: Sequence[Metric],
    rows: Sequence[pl.DataFrame],
    colours: Sequence[str],
    evaluations: pl.DataFrame | None,
    smooth: bool,
    *,
    most: int = MAX_ROWS,
    has_title: bool = True,
) -> alt.LayerChart:
    import altair as alt

    labels = [plain_text(metric.heading, 60) for metric in found]
    each = max(2, most // len(found))
    frame = pl.concat(
        [
            thinned(own, each).with_columns(metric=pl.lit(label, dtype=pl.String))
            for own, label in zip(rows, labels, strict=True)
        ]
    )
    y_title = labels[0] if has_title and len(found) == 1 else None
    each_shown = frame.height // len(found)
    is_share = all(metric.is_share for metric in found)
    number = ".1%" if is_share else ",.4~g"
    evaluated = evaluations.height if evaluations is not None else 0
    last = max([float(frame["step"].max() or 0) if frame.height else 0.0, 1.0])  # type: ignore[arg-type]
    scale = alt.Scale(domain=[0 if evaluated else min(1.0, last - 1), last], nice=False, padding=6)
    x = alt.X("step:Q", axis=steps_axis(tickCount=min(8, int(last))), scale=scale)
    # A fixed value, not a scale: concatenated charts would share a scale.
    colour: Any = alt.value(colours[0])
    if len(found) > 1:
        colour = alt.Color("metric:N", scale=alt.Scale(domain=labels, range=list(colours)), legend=legend())
    y_axis = values_axis(y_title, format=".0%" if is_share else "~g")
    base = alt.Chart(_rounded(frame))
    y = alt.Y("value:Q", axis=y_axis, scale=alt.Scale(zero=is_share, nice=True))
    layers: list[alt.Chart] = []
    if smooth and frame.height > 2 * len(found):
        layers.append(base.mark_area(opacity=0.15).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour))
    tooltips = [
        alt.Tooltip("metric:N", title="metric"),
        alt.Tooltip("step:Q", title="step", format=",d"),
        alt.Tooltip("value:Q", title="this step", format=number),
        *([alt.Tooltip("smooth:Q", title="trend", format=number)] if smooth else []),
    ]
    layers += [
        base.mark_circle(size=_dot(each_shown), opacity=0.4 if each_shown < 150 else 0.25).encode(
            x=x, y=y, color=colour, tooltip=tooltips
        ),
        base.mark_line(strokeWidth=2.2).encode(x=x, y=alt.Y("smooth:Q" if smooth else "value:Q"), color=colour),
    ]
    if evaluations is not None and evaluated:
        layers += _evaluation_layers(evaluations, last, x)
    return cast("alt.LayerChart", alt.layer(*layers))


def _evaluation_layers(evaluations: pl.DataFrame, last: float, x: alt.X) -> list[alt.Chart]:
    import altair as alt

    places = [last if step is None else min(float(step), last) for step in evaluations["step"]]
    rows = [
        {"step": place, "label": plain_text(row["label"], 60)}
        | {name: row[name] for name in ("mean", "low", "high", "questions")}
        for place, row in zip(_spread_out(places, last / 60), evaluations.iter_rows(named=True), strict=True)
    ]
    base = alt.Chart(table(rows))
    tooltips = [
        alt.Tooltip("label:N", title="evaluation"),
        alt.Tooltip("mean:Q", title="exact match", format=".1%"),
        alt.Tooltip("low:Q", title="95 % from", format=".1%"),
        alt.Tooltip("high:Q", title="to", format=".1%"),
        alt.Tooltip("questions:Q", title="questions"),
    ]
    return [
        base.mark_rule(color=HELD_OUT, strokeWidth=1.5, opacity=0.8).encode(x=x, y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_point(shape="diamond", filled=True, size=75, color=HELD_OUT, opacity=1).encode(
            x=x, y=alt.Y("mean:Q"), tooltip=tooltips
        ),
    ]


def _spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Separate evaluations of the same step (untrained, after the warm-up), inwards from the chart's ends."""
    out: list[float] = []
    for index, place in enumerate(places):
        before, after = places[:index].count(place), places[index + 1 :].count(place)
        out.append(place - after * gap if place > max(places) / 2 else place + before * gap)
    return out


def _dot(count: int) -> int:
    """Area of a point in square pixels; smaller for many points, so that the trend stays visible."""
    return 26 if count < 60 else 16 if count < 400 else 8


def _rounded(frame: pl.DataFrame) -> pl.DataFrame:
    """Five significant digits, which halves the notebook's size."""
    return frame.with_columns(pl.col("value", "smooth", "low", "high").round_sig_figs(5))


def _legend_text(rows: Sequence[pl.DataFrame], evaluations: pl.DataFrame | None, smooth: bool) -> list[str]:
    words = []
    if any(frame.height for frame in rows):
        words.append("points: single steps" + ("; line and band: trend ± 1 standard deviation" if smooth else ""))
    if evaluations is not None and evaluations.height:
        words.append("diamonds: exact match of held-out questions, 95 % intervals")
    return words


def metric_named(name: str, columns: Sequence[str]) -> Metric:
    """The metric called ``name``: one of the table, even if its column is not there yet, or a present column.

    Raises:
        ConfigurationError: no such metric; suggests close matches.
    """
    if known := _named_in_table(name):
        return known
    for column in (name, OF_ALL + name):
        if column in columns and column != "step":
            template = metric_of(column) or METRICS[f"{OF_ALL}<reward part>"]
            return dataclasses.replace(template, column=column, label=column.removeprefix(OF_ALL), unit="")
    raise ConfigurationError(f"there is no metric {name!r}. {_near(name, columns)}")


def _named_in_table(name: str) -> Metric | None:
    """The table's metric of this name; None too for one that a pattern such as ``stop/<reason>`` stands for."""
    known = metric_of(name)
    return None if known is None or "<" in known.column else known


def _near(name: str, columns: Iterable[str]) -> str:
    names = [*_NAMES, *(column.removeprefix(OF_ALL) for column in columns if column != "step")]
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    near += [other for other in names if name.lower() in other.lower() and other not in near][: 4 - len(near)]
    known = f"Short names: {', '.join(_NAMES)}; or any column of run.metrics."
    return f"Close matches: {', '.join(near)}. {known}" if near else known


def metric_rows(metrics: pl.DataFrame, metric: Metric) -> pl.DataFrame:
    """Columns ``step``, ``value``, ``smooth`` (local mean), ``low`` and ``high`` (plus or minus one local standard deviation),
    where the metric is finite."""
    schema = pl.Schema({name: pl.Float64() for name in ("step", "value", "smooth", "low", "high")})
    if metric.column not in metrics.columns or "step" not in metrics.columns:
        return pl.DataFrame(schema=schema)
    frame = metrics.select(step=pl.col("step").cast(pl.Float64), value=pl.col(metric.column).cast(pl.Float64))
    frame = frame.filter(pl.col("value").is_finite()).sort("step")
    mean_n, spread_n = smoothed(frame["value"].to_numpy())
    low = -math.inf if metric.low is None else metric.low
    high = math.inf if metric.high is None else metric.high
    low_n, high_n = (mean_n - spread_n).clip(low, high), (mean_n + spread_n).clip(low, high)
    return frame.with_columns(
        smooth=pl.Series(mean_n, dtype=pl.Float64), low=pl.Series(low_n, dtype=pl.Float64),
        high=pl.Series(high_n, dtype=pl.Float64),
    )  # fmt: skip


def smoothed(values_n: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Local mean and standard deviation with Gaussian weights, about a twentieth of the series wide.

    Weights are normalised over existing points, so the ends are unbiased.

    Args:
        values_n: shape ``[steps]``, finite.

    Returns:
        mean and standard deviation, both of shape ``[steps]``.
    """
    count = len(values_n)
    if not count:
        return values_n, values_n
    width = max(1.0, count / 20)
    reach = math.ceil(4 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)

    def summed(series_n: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.convolve(series_n, kernel)[reach : reach + count]

    weight_n = summed(np.ones(count))
    mean_n = summed(values_n) / weight_n
    variance_n = summed(values_n**2) / weight_n - mean_n**2
    return mean_n, np.sqrt(np.maximum(variance_n, 0.0))
