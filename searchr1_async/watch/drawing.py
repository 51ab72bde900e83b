"""What all charts share (colours, axes, titles, display in a notebook), and curves of metrics over steps: the panels of ``run.plot``,
of the live view and of its last picture are the same layers.

Charts have no ``config``: Vega-Lite allows it only at the top level, so configured charts cannot be concatenated
(``a.plot("reward") | b.plot("reward")``). Text and background colours are left to Vega-Lite and the notebook's theme.
"""

from __future__ import annotations

import base64
import dataclasses
import difflib
import io
import math
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any, cast

import polars as pl

from searchr1_async.errors import ConfigurationError
from searchr1_async.records.metrics import CURVES, EXACT_MATCH, METRICS, OF_ALL, Metric, metric_of
from searchr1_async.watch.markup import shown

if TYPE_CHECKING:
    import altair as alt

TRAINING, HELD_OUT, TURNS, CALLS, SEEN = "#3b6fb6", "#c4472f", "#2f8f6b", "#8a5fb0", "#c98a1b"
GREY = "#6b7280"
SERIES = (TRAINING, SEEN, TURNS, CALLS, GREY, HELD_OUT)
"""Line colours in order, distinguishable with the common forms of colour blindness."""
NOTE_COLOUR = "#808893"
"""Annotations: readable on white (3.6:1) and on the dark theme's #333 (3.5:1)."""
FAINT = "rgba(128, 136, 147, 0.4)"
"""Background elements, on light and dark."""
GRID_COLOUR = "#9aa1ab"
MAX_ROWS = 5000
"""Maximum data rows per chart, as notebooks save them."""
WIDTH, HEIGHT = 460, 240
"""Of one panel, in pixels."""
RENDERER = "searchr1_async"
VEGA_LITE_5 = "https://vega.github.io/schema/vega-lite/v5.json"
MIME_TYPE = "application/vnd.vegalite.v5+json"
"""Rendered offline by JupyterLab and VS Code; Altair's default loads scripts from a CDN."""
NO_STEP = "No step has finished yet: nothing to draw."
NAMES = ("reward", "exact_match", "turns", "valid_calls", "searches", "answer_in_passage", "staleness")
"""Metrics named in messages; every other one is accepted too."""
_COLOURS = dict(zip((curve.column for curve in CURVES), (SEEN, TRAINING, TURNS, CALLS), strict=True))


def axis(title: str | None = None, **options: Any) -> alt.Axis:
    """An axis in the common style."""
    import altair as alt

    style: dict[str, Any] = {"titleFontWeight": "normal", "gridColor": GRID_COLOUR, "gridOpacity": 0.3}
    style |= {"domainColor": GRID_COLOUR, "tickColor": GRID_COLOUR, "labelOverlap": True, "title": title}
    return alt.Axis(**(style | options))


def values_axis(title: str | None = None, **options: Any) -> alt.Axis:
    """A y axis of fixed width, so that stacked panels align."""
    return axis(title, **{"minExtent": 34, "tickCount": 6} | options)


def steps_axis() -> alt.Axis:
    """An axis of integers."""
    # A short axis gets ticks between them nevertheless, which would be labelled as the next integer.
    whole = "datum.value == floor(datum.value) ? datum.label : ''"
    return axis("optimizer step", grid=False, tickMinStep=1, tickCount=6, format=",d", labelExpr=whole)


def legend(**options: Any) -> alt.Legend:
    """A legend above the chart."""
    import altair as alt

    style: dict[str, Any] = {"title": None, "orient": "top", "labelLimit": 320, "symbolOpacity": 1}
    return alt.Legend(**(style | options))


def heading(text: str, subtitle: str | Sequence[str] = "") -> alt.TitleParams:
    """A left-aligned title with explanatory lines below."""
    import altair as alt

    lines = [shown(line, 200) for line in ([subtitle] if isinstance(subtitle, str) else subtitle) if line]
    below: dict[str, Any] = {"subtitle": lines, "subtitlePadding": 4} if lines else {}
    return alt.TitleParams(shown(text, 200), anchor="start", offset=8, **below)


def tooltips(*fields: str) -> list[alt.Tooltip]:
    """Each field as ``name|title|format``; title and format may be missing. Names without a type are quantities."""
    import altair as alt

    out = []
    for field in fields:
        name, title, form = (field + "||").split("|")[:3]
        options = {option: value for option, value in (("title", title), ("format", form)) if value}
        out.append(alt.Tooltip(name if ":" in name else f"{name}:Q", **cast("Any", options)))
    return out


def table(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Rows as a data frame: Altair validates plain values one by one, which takes seconds for 5,000 rows."""
    return pl.DataFrame(rows, infer_schema_length=None)


def thinned(frame: pl.DataFrame, most: int = MAX_ROWS) -> pl.DataFrame:
    """At most ``most`` rows, evenly spaced, first and last included."""
    if frame.height <= most:
        return frame
    return frame[[round(place * (frame.height - 1) / (most - 1)) for place in range(most)]]


def empty_chart(text: str, *, title: str = "") -> alt.Chart:
    """A chart with a text that says why it is empty."""
    import altair as alt

    lines = wrap(shown(text, 600), 66)
    chart = alt.Chart(alt.Data(values=[{}])).mark_text(fontSize=13, color=NOTE_COLOUR, text=lines)
    return chart.properties(width=WIDTH, height=120, **({"title": heading(title)} if title else {}))


def enable_renderer() -> bool:
    """Make notebooks display charts offline, and on GitHub; True if this renderer is now active.

    Each output has the interactive chart for JupyterLab and VS Code and a PNG for everything else. Only Altair's ``default``
    renderer is replaced; one chosen by the user is kept.
    """
    import altair as alt

    if RENDERER not in alt.renderers.names():
        alt.renderers.register(RENDERER, mime_bundle)
    if alt.renderers.active == "default":
        alt.renderers.enable(RENDERER)
    return alt.renderers.active == RENDERER


def mime_bundle(spec: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    """Notebook output of a chart: Vega-Lite and PNG."""
    bundle: dict[str, Any] = {MIME_TYPE: {**spec, "$schema": VEGA_LITE_5}, "text/plain": "a chart"}
    try:
        picture = small_png(spec)
    except ValueError:  # the user's edits are invalid Vega-Lite: the notebook shows the error
        return bundle
    return bundle | {"image/png": base64.b64encode(picture).decode()}


def small_png(spec: Mapping[str, Any]) -> bytes:
    """A chart as PNG at 2x, with at most 256 colours: less than half the size of 24-bit.

    Raises:
        ValueError: the chart is invalid.
    """
    import vl_convert
    from PIL import Image

    out = io.BytesIO()
    with Image.open(io.BytesIO(vl_convert.vegalite_to_png(dict(spec), scale=2))) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def plot_metric(
    metrics: pl.DataFrame, name: str, *, evaluations: pl.DataFrame | None = None
) -> alt.LayerChart | alt.Chart:
    """A metric by step.

    Args:
        metrics: one row per step, as from ``run.metrics``.
        name: ``reward``, ``exact_match``, ``turns``, ``valid_calls``, or any other metric of the table or column, with or
            without ``env/all/``.
        evaluations: as from :func:`~searchr1_async.watch.charts.evaluation_scores`; drawn with exact match.

    Raises:
        ConfigurationError: no such metric; suggests close matches.
    """
    metric = metric_named(name, metrics.columns)
    rows = curve_rows(metrics, [metric])
    points = _overall(evaluations, rows) if metric is EXACT_MATCH else None
    if not rows.height and points is None:
        reason = f"No finished step has this metric ({metric.column})."
        return empty_chart(reason if metrics.height else NO_STEP, title=metric.heading)
    words = ["points: single steps; line and band: trend ± 1 standard deviation"] * bool(rows.height)
    if points is not None:
        words.append("diamonds: exact match of held-out questions, 95 % intervals")
    chart = _panel(metric, {"steps": rows, "evaluations": points}, rows.height)
    return chart.properties(width=WIDTH, height=HEIGHT, title=heading(metric.heading, words))


def plot_learning(
    metrics: pl.DataFrame, *, evaluations: pl.DataFrame | None = None, title: str = "", subtitle: Sequence[str] = ()
) -> alt.ConcatChart | alt.Chart:
    """Reward, exact match, turns per episode and valid calls, one panel each; arguments as in :func:`plot_metric`."""
    rows = curve_rows(metrics, CURVES)
    points = _overall(evaluations, rows)
    if not rows.height and points is None:
        return empty_chart(NO_STEP, title=title)
    grid = _grid({"steps": rows, "evaluations": points}, rows.height)
    return grid.properties(title=heading(title, subtitle)) if title else grid


def live_chart(steps: int) -> dict[str, Any]:
    """:func:`plot_learning` as Vega-Lite without data, which come later under the names ``steps``, ``evaluations`` and ``running``.

    Args:
        steps: of the whole run.
    """
    import altair as alt

    spec = _grid({name: alt.NamedData(name=name) for name in ("steps", "evaluations", "running")}, steps).to_dict()
    spec.pop("config", None)  # colours are set by the page
    return spec


def curve_rows(metrics: pl.DataFrame, shown: Sequence[Metric]) -> pl.DataFrame:
    """``step`` and a column per metric, by its name, of the steps that have one of them; at most :data:`MAX_ROWS`."""
    # Five significant digits halve the notebook's size.
    values = [
        pl.col(metric.column)
        .cast(pl.Float64)
        .round_sig_figs(5)
        .replace([math.nan, math.inf, -math.inf], None)
        .alias(metric.name)
        for metric in shown
        if metric.column in metrics.columns
    ]
    if not values:
        return pl.DataFrame(schema={"step": pl.Float64})
    rows = metrics.select(pl.col("step").cast(pl.Float64), *values).sort("step")
    return thinned(rows.filter(pl.any_horizontal(pl.exclude("step").is_not_null())))


def _overall(scores: pl.DataFrame | None, rows: pl.DataFrame) -> pl.DataFrame | None:
    """One row per evaluation: all suites, or the only one; without a step, it is of the last one. None if there are none."""
    if scores is None or not scores.height:
        return None
    overall = scores.group_by("order", maintain_order=True).first().sort("order")
    label = pl.col("label").map_elements(lambda text: shown(text, 60), pl.String)
    step = pl.col("step").fill_null(rows["step"].max() if rows.height else 0)
    return overall.select(step, label, "mean", "low", "high")


def _grid(data: Mapping[str, Any], count: int) -> alt.ConcatChart:
    import altair as alt

    panels = [
        _panel(curve, data, count).properties(width=320, height=160, title=heading(curve.heading)) for curve in CURVES
    ]
    return alt.concat(*panels, columns=2, spacing={"row": 16, "column": 20})


def _panel(metric: Metric, data: Mapping[str, Any], count: int) -> alt.LayerChart:
    """Single steps as dots, their trend with a band of one standard deviation, the open batch as a ring, and held-out evaluations.

    Args:
        data: ``steps`` and ``running``, as from :func:`curve_rows`, and ``evaluations``; None or absent: without these.
        count: of the steps; the trend's window is about a twentieth of them.
    """
    import altair as alt

    x = alt.X("step:Q", axis=steps_axis(), scale=alt.Scale(nice=False, padding=6))
    y_scale = alt.Scale(zero=metric.is_share, nice=True)
    y_axis = values_axis(None, format=".0%" if metric.is_share else "~g")

    def y(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", axis=y_axis, scale=y_scale)

    # A fixed value, not a scale: concatenated charts would share a scale.
    colour = alt.value(_COLOURS.get(metric.column, TRAINING))
    tips = tooltips("step|step|,d", f"value|{metric.heading}|{metric.form}")
    layers: list[Any] = _trend(alt.Chart(data["steps"]), metric, max(1, round(count / 40)))
    area, circles, line = (layer.encode(x=x, color=colour) for layer in layers)
    layers = [
        area.encode(y=y("low"), y2="high:Q"),
        circles.encode(y=y("value"), tooltip=tips),
        line.encode(y=y("smooth")),
    ]
    if data.get("running") is not None:
        ring = _valued(alt.Chart(data["running"]), metric).mark_point(size=60, strokeWidth=1.5)
        layers.append(ring.encode(x=x, y=y("value"), color=colour, tooltip=tips))
    if metric is EXACT_MATCH and data.get("evaluations") is not None:
        points = alt.Chart(data["evaluations"])
        numbers = tooltips("label:N|evaluation", "mean|exact match|.1%", "low|95 % from|.1%", "high|to|.1%")
        rules = points.mark_rule(color=HELD_OUT, strokeWidth=1.5, opacity=0.8)
        diamonds = points.mark_point(shape="diamond", filled=True, size=75, color=HELD_OUT, opacity=1)
        layers += [rules.encode(x=x, y=y("low"), y2="high:Q"), diamonds.encode(x=x, y=y("mean"), tooltip=numbers)]
    return cast("alt.LayerChart", alt.layer(*layers))


def _valued(chart: alt.Chart, metric: Metric) -> alt.Chart:
    """The rows that have the metric, with its ``value``."""
    datum = f"datum[{metric.name!r}]"
    return chart.transform_filter(f"isValid({datum})").transform_calculate(value=datum)


def _trend(steps: alt.Chart, metric: Metric, window: int) -> list[alt.Chart]:
    """Area, circles and line of a metric with its moving mean."""
    import altair as alt

    moving: list[Any] = [
        {"op": "mean", "field": "value", "as": "smooth"}, {"op": "stdev", "field": "value", "as": "spread"}
    ]  # fmt: skip
    low, high = "datum.smooth - datum.spread", "datum.smooth + datum.spread"
    base = _valued(steps, metric).transform_window(moving, frame=[-window, window], sort=[alt.SortField("step")])
    base = base.transform_calculate(
        low=low if metric.low is None else f"max({low}, {metric.low})",
        high=high if metric.high is None else f"min({high}, {metric.high})",
    )
    return [base.mark_area(opacity=0.15), base.mark_circle(size=16, opacity=0.45), base.mark_line(strokeWidth=2.2)]


def metric_named(name: str, columns: Sequence[str]) -> Metric:
    """The metric called ``name``: one of the table, even if its column is not there yet, or a present column.

    Raises:
        ConfigurationError: no such metric; suggests close matches.
    """
    known = metric_of(name)
    if known is not None and "<" not in known.column:  # not one that stands for a pattern such as ``stop/<reason>``
        return known
    for column in (name, OF_ALL + name):
        if column in columns and column != "step":
            template = known or METRICS[f"{OF_ALL}<reward part>"]
            return dataclasses.replace(template, column=column, label=column.removeprefix(OF_ALL), unit="")
    names = [*NAMES, *(column.removeprefix(OF_ALL) for column in columns)]
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    raise ConfigurationError(
        f"there is no metric {name!r}. Close matches: {', '.join(near) or 'none'}. Metrics: {', '.join(NAMES)}, and, after the first "
        "step, every column of run.metrics"
    )
