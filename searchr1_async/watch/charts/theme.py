"""Chart style, and how notebooks display charts.

Charts have no ``config``: Vega-Lite allows it only at the top level, so configured charts cannot be concatenated
(``a.plot("reward") | b.plot("reward")``). Text and background colours are left to Vega-Lite: saved files are black on white,
JupyterLab's dark theme is light on dark.

Tidy data frames for charts. Pure.
"""

from __future__ import annotations

import base64
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from searchr1_async.errors import ConfigurationError
from searchr1_async.records.statistics import Z_95, mean_interval, wilson_interval
from searchr1_async.watch.charts.learning_curve import CALLS, GREY, HELD_OUT, SEEN, TRAINING, TURNS, smoothed

if TYPE_CHECKING:
    import altair as alt

SERIES = (TRAINING, SEEN, TURNS, CALLS, GREY, HELD_OUT)
"""Line colours in order: those of the learning curve, distinguishable with the common forms of colour blindness."""

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

PICTURE_BYTES = 150_000


def axis(title: str | None = None, **options: Any) -> alt.Axis:
    """An axis in the common style."""
    import altair as alt

    settings: dict[str, Any] = {
        "title": title,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "gridColor": GRID_COLOUR,
        "gridOpacity": 0.3,
        "domainColor": GRID_COLOUR,
        "tickColor": GRID_COLOUR,
        "labelOverlap": True,
    }
    return alt.Axis(**(settings | options))


def values_axis(title: str | None = None, **options: Any) -> alt.Axis:
    """A y axis of fixed width, so that stacked panels align."""
    return axis(title, **{"minExtent": 34, "tickCount": 6} | options)


def steps_axis(title: str | None = "optimiser step", **options: Any) -> alt.Axis:
    """An axis of integers."""
    return axis(title, **{"grid": False, "tickMinStep": 1, "format": ",d"} | options)


def legend(**options: Any) -> alt.Legend:
    """A legend above the chart."""
    import altair as alt

    settings: dict[str, Any] = {
        "title": None,
        "orient": "top",
        "labelFontSize": 11,
        "labelLimit": 320,
        "symbolOpacity": 1,
    }
    return alt.Legend(**(settings | options))


def heading(text: str, subtitle: str | list[str] = "") -> alt.TitleParams:
    """A left-aligned title with explanatory lines below."""
    import altair as alt

    lines = [subtitle] if isinstance(subtitle, str) else subtitle
    lines = [plain_text(line) for line in lines if line]
    settings: dict[str, Any] = {"anchor": "start", "fontSize": 13, "offset": 8}
    if lines:
        settings |= {"subtitle": lines, "subtitleFontSize": 11, "subtitlePadding": 4}
    return alt.TitleParams(plain_text(text), **settings)


def table(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Rows as a data frame: Altair validates plain values one by one, which takes seconds for 5,000 rows."""
    return pl.DataFrame(rows, infer_schema_length=None)


def plain_text(text: str, longest: int = 200) -> str:
    """Untrusted text on one line, control characters escaped, truncated."""
    cut = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return "".join(char if char.isprintable() else " " if char in "\n\r\t" else ascii(char)[1:-1] for char in cut)


def empty_chart(text: str, *, title: str = "") -> alt.Chart:
    """A chart with a text that says why it is empty."""
    import altair as alt

    lines = _wrapped(plain_text(text, 600))
    values = [{"line": number, "text": line} for number, line in enumerate(lines)]
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_text(fontSize=13, color=NOTE_COLOUR)
        .encode(
            y=alt.Y("line:Q", axis=None, scale=alt.Scale(domain=[len(lines) + 1.5, -2.5])),
            text=alt.Text("text:N"),
        )
    )
    return chart.properties(width=WIDTH, height=120, **({"title": heading(title)} if title else {}))


def _wrapped(text: str, width: int = 66) -> list[str]:
    from textwrap import wrap

    return wrap(text, width) or [""]


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
    """Notebook output of a chart: Vega-Lite, PNG, and its title as text."""
    bundle: dict[str, Any] = {MIME_TYPE: {**spec, "$schema": VEGA_LITE_5}, "text/plain": _words(spec)}
    if (picture := _picture(spec)) is not None:
        bundle["image/png"] = base64.b64encode(picture).decode()
    return bundle


def _picture(spec: dict[str, Any]) -> bytes | None:
    """PNG at 2x, or 1x if that exceeds 150 KB; None if it cannot be drawn."""
    import vl_convert

    try:
        picture = _in_few_colours(vl_convert.vegalite_to_png(spec, scale=2))
        return picture if len(picture) <= PICTURE_BYTES else _in_few_colours(vl_convert.vegalite_to_png(spec, scale=1))
    except ValueError:  # the user's edits are invalid Vega-Lite: the notebook shows the error
        return None


def _in_few_colours(picture: bytes) -> bytes:
    """The same PNG with 256 colours, a quarter of the size."""
    from io import BytesIO

    from PIL import Image

    out = BytesIO()
    with Image.open(BytesIO(picture)) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def _words(spec: dict[str, Any]) -> str:
    return "\n".join(dict.fromkeys(_titles(spec))) or "a chart"


def _titles(spec: dict[str, Any]) -> Iterator[str]:
    """The titles of a chart and its panels, in order."""
    title = spec.get("title")
    if isinstance(title, dict):
        subtitle = title.get("subtitle") or []
        yield from map(str, [title.get("text", ""), *([subtitle] if isinstance(subtitle, str) else subtitle)])
    elif title:
        yield str(title)
    for panels in ("vconcat", "hconcat", "concat", "layer"):
        for panel in spec.get(panels, ()):
            yield from _titles(panel)


ALL_SUITES = "all suites"
MACRO_AVERAGE = "macro average"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric with a short name."""

    column: str
    label: str
    is_share: bool = False
    part: str | None = None
    """The corresponding reward part in evaluations."""


METRICS = {
    "reward": Metric("env/all/reward/total", "reward"),
    "exact_match": Metric("env/all/correct", "exact match", is_share=True, part="correct"),
    "turns": Metric("env/all/turns_per_episode", "turns per episode"),
    "valid_calls": Metric("env/all/valid_calls", "tool calls that are valid", is_share=True),
    "searches": Metric("env/all/searches_per_episode", "searches per episode"),
    "answer_in_passage": Metric("env/all/answer_in_passage", "episodes shown the answer", is_share=True),
    "staleness": Metric("env/all/staleness", "staleness (optimiser steps)"),
}
"""By short name. Other columns go by their own name, with or without ``env/all/``."""


def metric_named(name: str, columns: Sequence[str]) -> Metric:
    """The metric called ``name``.

    Args:
        columns: present columns; a short name is valid even if its column is not there yet.

    Raises:
        ConfigurationError: no such metric; suggests close matches.
    """
    if (known := METRICS.get(name)) is not None:
        return known
    for column in (name, f"env/all/{name}"):
        if column in columns and column != "step":
            return Metric(column, column.removeprefix("env/all/"))
    raise ConfigurationError(f"there is no metric {name!r}. {_near(name, columns)}")


def _near(name: str, columns: Iterable[str]) -> str:
    names = [*METRICS, *(column.removeprefix("env/all/") for column in columns if column != "step")]
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    near += [other for other in names if name.lower() in other.lower() and other not in near][: 4 - len(near)]
    known = f"Short names: {', '.join(METRICS)}; or any column of run.metrics."
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
    low_n, high_n = mean_n - spread_n, mean_n + spread_n
    if metric.is_share:
        low_n, high_n = low_n.clip(0, 1), high_n.clip(0, 1)
    return frame.with_columns(
        smooth=pl.Series(mean_n, dtype=pl.Float64), low=pl.Series(low_n, dtype=pl.Float64),
        high=pl.Series(high_n, dtype=pl.Float64),
    )  # fmt: skip


def thinned(frame: pl.DataFrame, most: int = MAX_ROWS) -> pl.DataFrame:
    """At most ``most`` rows, evenly spaced, first and last included."""
    if frame.height <= most:
        return frame
    places = [round(place * (frame.height - 1) / (most - 1)) for place in range(most)]
    return frame[places]


def evaluation_scores(evaluations: pl.LazyFrame, part: str = "correct") -> pl.DataFrame:
    """One row per evaluation and suite, and one for all suites: ``order``, ``label``, ``step``, ``suite``, ``mean``, ``low``,
    ``high`` (95 %) and ``questions``.

    Computed as in :class:`searchr1_async.runs.evaluation.Evaluation`: mean over questions of each question's sample mean, with
    Wilson's interval on the effective number of questions.

    Args:
        evaluations: episodes, as from :meth:`searchr1_async.records.run_records.RunRecords.evaluations`.
        part: a reward part that has its own column.
    """
    finished = pl.col("stop_reason") != "failed"
    asked = (
        evaluations.with_row_index("row")
        .group_by("label", "data_source", "question_id", "question", maintain_order=True)
        .agg(
            pl.col("row").filter(finished).min(),
            pl.col("row").min().alias("asked"),
            pl.col("step").first(),
            pl.col(part).filter(finished).fill_null(0.0).mean().alias("score"),
        )
        .select("row", "asked", "label", "step", "data_source", "score")
        .collect()
    )
    rows = []
    for order, ((label,), own) in enumerate(asked.sort("asked").group_by("label", maintain_order=True)):
        suites = [str(suite) for suite in own["data_source"].unique().sort()]
        for suite in [ALL_SUITES, *suites] if len(suites) > 1 else suites:
            of_suite = own if suite == ALL_SUITES else own.filter(pl.col("data_source") == suite)
            scores = of_suite.drop_nulls("score").sort("row")["score"].to_list()
            if scores:
                low, high = mean_interval(scores)
                rows.append((order, label, own["step"][0], suite, sum(scores) / len(scores), low, high, len(scores)))
    names = ("order", "label", "step", "suite", "mean", "low", "high", "questions")
    types = (pl.Int64, pl.String, pl.Int64, pl.String, pl.Float64, pl.Float64, pl.Float64, pl.Int64)
    return pl.DataFrame(rows, schema=dict(zip(names, types, strict=True)), orient="row")


def overall(scores: pl.DataFrame) -> pl.DataFrame:
    """From :func:`evaluation_scores`, one row per evaluation: all suites, or the only one."""
    return scores.group_by("order", maintain_order=True).first().sort("order")


def reward_by(episodes: pl.LazyFrame, by: str) -> pl.DataFrame:
    """Training outcomes by number of ``turns`` or ``searches``.

    Columns ``n``, ``what`` (``reward``, ``exact match``), ``mean``, ``low``, ``high`` (95 %: Wilson's for exact match, 1.96
    standard errors for reward) and ``episodes``. Failed and cut episodes are excluded.
    """
    count = pl.col("turn_count") if by == "turns" else _searches()
    grouped = (
        episodes.filter(~pl.col("stop_reason").is_in(["failed", "time_limit"]))
        .select(n=count.cast(pl.Int64), reward="reward", correct=pl.col("correct").fill_null(0.0))
        .group_by("n")
        .agg(
            pl.len().alias("episodes"),
            pl.col("reward").mean().alias("mean"),
            pl.col("reward").std().fill_null(0.0).alias("deviation"),
            pl.col("correct").sum().alias("right"),
        )
        .sort("n")
        .collect()
    )
    rows = []
    for row in grouped.iter_rows(named=True):
        episodes_n = row["episodes"]
        margin = Z_95 * row["deviation"] / math.sqrt(episodes_n) if episodes_n > 1 else math.nan
        rows.append((row["n"], "reward", row["mean"], row["mean"] - margin, row["mean"] + margin, episodes_n))
        right = min(max(row["right"], 0.0), float(episodes_n))
        rows.append((row["n"], "exact match", right / episodes_n, *wilson_interval(right, episodes_n), episodes_n))
    schema = {"n": pl.Int64, "what": pl.String, "mean": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    return pl.DataFrame(rows, schema=schema | {"episodes": pl.Int64}, orient="row").fill_nan(None)


def _searches() -> pl.Expr:
    """Executed searches per episode: the result lists of all its calls."""
    return pl.col("turns").list.eval(pl.element().struct.field("passages").list.len().fill_null(0)).list.sum()
