"""Metrics by optimiser step: points per step, a trend line, and evaluations with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import polars as pl

from searchr1_async.watch.plots.data import METRICS, Metric, metric_named, metric_rows, overall, thinned
from searchr1_async.watch.plots.theme import (
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
    heading,
    legend,
    plain_text,
    steps_axis,
    table,
    values_axis,
)

if TYPE_CHECKING:
    import altair as alt

LEARNING = ("reward", "exact_match", "turns", "valid_calls")
"""The metrics of the ``learning`` chart."""

_COLOURS = {"reward": SEEN, "exact_match": TRAINING, "turns": TURNS, "valid_calls": CALLS}
_NO_STEP = "No step has finished yet: nothing to draw."


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
        names: ``reward``, ``exact_match``, ``turns``, ``valid_calls``, ``searches``, ``answer_in_passage``, ``staleness``, or
            any column, with or without ``env/all/``. Several share one panel.
        evaluations: as from :func:`searchr1_async.watch.plots.data.evaluation_scores`; drawn with exact match. None omits them.
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
    shown = overall(evaluations) if evaluations is not None and any(metric.part for metric in found) else None
    text = title if title is not None else ", ".join(metric.label for metric in found)
    rows = [metric_rows(metrics, metric) for metric in found]
    if not any(frame.height for frame in rows) and (shown is None or not shown.height):
        reason = f"No finished step has this metric ({', '.join(metric.column for metric in found)})."
        return empty_chart(reason if metrics.height else _NO_STEP, title=text)
    colours = _colours(wanted)
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
    for name in LEARNING:
        metric = METRICS[name]
        shown = overall(evaluations) if evaluations is not None and metric.part else None
        rows = metric_rows(metrics, metric)
        if rows.height or (shown is not None and shown.height):
            panel = _panel([metric], [rows], [_COLOURS[name]], shown, smooth, most=MAX_ROWS // 4, has_title=False)
            panels.append(panel.properties(width=width, height=height, title=heading(metric.label)))
        else:
            panels.append(empty_chart("No value yet.", title=metric.label).properties(width=width, height=height))
    grid = alt.concat(*panels, columns=2, spacing={"row": 16, "column": 20})
    return grid.properties(title=heading(title)) if title else grid


def _colours(names: Sequence[str]) -> list[str]:
    """Each metric's own colour, else the next unused one."""
    own = [_COLOURS.get(name) for name in names]
    free = [colour for colour in SERIES if colour not in own] or list(SERIES)
    taken = iter(free * len(names))
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

    labels = [plain_text(metric.label, 60) for metric in found]
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
