"""Metrics by optimiser step: points per step, a trend line, and evaluations with intervals.

Charts of outcomes: by number of turns or searches, and by suite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import polars as pl

from searchr1_async.watch.charts.theme import (
    ALL_SUITES,
    CALLS,
    GREY,
    HEIGHT,
    HELD_OUT,
    MACRO_AVERAGE,
    MAX_ROWS,
    METRICS,
    NOTE_COLOUR,
    SEEN,
    SERIES,
    TRAINING,
    TURNS,
    WIDTH,
    Metric,
    axis,
    empty_chart,
    heading,
    legend,
    metric_named,
    metric_rows,
    overall,
    plain_text,
    reward_by,
    steps_axis,
    table,
    thinned,
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
        evaluations: as from :func:`searchr1_async.watch.charts.theme.evaluation_scores`; drawn with exact match. None omits them.
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


MAX_EVALUATIONS = 8
"""Maximum evaluations drawn per suite; of more, the first, the last and an even selection between them."""


def plot_reward_by_turns(
    episodes: pl.LazyFrame,
    *,
    by: Literal["turns", "searches"] = "turns",
    first_step: int | None = None,
    last_step: int | None = None,
    title: str | None = None,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> alt.VConcatChart | alt.Chart:
    """Mean reward and exact match of training episodes by number of turns, with 95 % intervals, above the episode counts.

    Args:
        episodes: as from ``run.episodes()``.
        by: ``searches`` counts executed searches instead of turns.
        first_step: omit earlier steps.
        last_step: omit later steps.
        title: None for a default title.
        width: in pixels.
        height: of the upper panel, in pixels.
    """
    import altair as alt

    if first_step is not None:
        episodes = episodes.filter(pl.col("step") >= first_step)
    if last_step is not None:
        episodes = episodes.filter(pl.col("step") <= last_step)
    frame = thinned(reward_by(episodes, by), 400)
    text = title if title is not None else f"reward and exact match by {by}"
    if not frame.height:
        return empty_chart("No finished step has episodes yet: nothing to draw.", title=text)
    rows = frame.to_dicts()
    shift = {"reward": -0.09, "exact match": 0.09}  # keeps the two intervals apart
    for row in rows:
        row["place"] = row["n"] + shift[row["what"]]
    low, high = int(frame["n"].min()), int(frame["n"].max())  # type: ignore[arg-type]
    scale = alt.Scale(domain=[low - 0.6, high + 0.6], nice=False)
    ticks = steps_axis(None, values=list(range(low, high + 1, max(1, (high - low) // 12))))
    colour = alt.Color(
        "what:N", scale=alt.Scale(domain=["reward", "exact match"], range=[SEEN, TRAINING]), legend=legend()
    )
    base = alt.Chart(table(rows)).encode(x=alt.X("place:Q", axis=ticks, scale=scale), color=colour)
    y = values_axis("mean", format="~g")
    upper = alt.layer(
        base.mark_line(strokeWidth=1.2, opacity=0.5).encode(y=alt.Y("mean:Q", axis=y)),
        base.mark_rule(strokeWidth=1.6).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_circle(size=70, opacity=1).encode(y=alt.Y("mean:Q"), tooltip=_tooltips(by)),
    ).properties(width=width, height=height, title=heading(text, _summary(frame, by)))
    counts = (
        alt.Chart(table([row for row in rows if row["what"] == "reward"]))
        .mark_bar(color=GREY, opacity=0.6, size=min(36, max(4, width // (2 * (high - low + 2)))))
        .encode(
            x=alt.X("n:Q", axis=steps_axis(f"{by} in the episode", values=ticks["values"]), scale=scale),
            y=alt.Y("episodes:Q", axis=values_axis("episodes", tickCount=3, format="~s")),
            tooltip=[alt.Tooltip("n:Q", title=by), alt.Tooltip("episodes:Q", format=",d")],
        )
        .properties(width=width, height=60)
    )
    return alt.vconcat(upper, counts, spacing=8).resolve_scale(color="independent")


def _tooltips(by: str) -> list[Any]:
    import altair as alt

    return [
        alt.Tooltip("what:N", title="what"),
        alt.Tooltip("n:Q", title=by),
        alt.Tooltip("mean:Q", title="mean", format=".3f"),
        alt.Tooltip("low:Q", title="95 % from", format=".3f"),
        alt.Tooltip("high:Q", title="to", format=".3f"),
        alt.Tooltip("episodes:Q", title="episodes", format=",d"),
    ]


def _summary(frame: pl.DataFrame, by: str) -> str:
    """The most common count, and the best exact match among counts with at least 5 % of the episodes."""
    right = frame.filter(pl.col("what") == "exact match")
    total = int(right["episodes"].sum())
    common = right.sort("episodes", descending=True).row(0, named=True)
    best = right.filter(pl.col("episodes") >= total / 20).sort("mean", descending=True).row(0, named=True)
    noun = by if common["n"] != 1 else by.removesuffix("es" if by == "searches" else "s")
    return (
        f"{total:,} episodes; most ({common['episodes'] / total:.0%}) take {common['n']} {noun}; "
        f"exact match is best at {best['n']} ({best['mean']:.0%})"
    )


def plot_suites(
    evaluations: pl.DataFrame,
    *,
    title: str | None = None,
    metric: str = "exact match",
    are_stages: bool = True,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> alt.LayerChart | alt.Chart:
    """Bars per suite, one for each evaluation in order, with 95 % intervals.

    Args:
        evaluations: as from :func:`searchr1_async.watch.charts.theme.evaluation_scores`.
        title: None for a default title.
        metric: name of the metric for labels.
        are_stages: the evaluations are of one run; the subtitle then compares the first with the last.
        width: in pixels.
        height: in pixels.
    """
    import altair as alt

    title = f"{metric} by suite" if title is None else title
    if not evaluations.height:
        return empty_chart(
            "No evaluation has been made yet: pass held_out questions, or wait for the first evaluation.", title=title
        )
    chosen = thinned(evaluations.select("order", "label").unique().sort("order"), MAX_EVALUATIONS)
    frame = evaluations.join(chosen.select("order"), on="order", how="semi").sort("order")
    labels = [f"{place}. {plain_text(label, 40)}" for place, label in enumerate(chosen["label"], start=1)]
    named = dict(zip(chosen["order"], labels, strict=True))
    rows = [
        {**row, "label": named[row["order"]], "suite": plain_text(row["suite"], 40)}
        for row in frame.iter_rows(named=True)
    ]
    names = list(dict.fromkeys(row["suite"] for row in rows))
    over = (ALL_SUITES, MACRO_AVERAGE)
    suites = [*(name for name in over if name in names), *sorted(name for name in names if name not in over)]
    colour = alt.Color("label:N", scale=alt.Scale(domain=labels, range=_shades(len(labels))), legend=legend(columns=3))
    angle = 0 if len(suites) < 6 else -30
    names_axis = axis(None, grid=False, labelOverlap=False, labelLimit=120, labelAngle=angle)
    base = alt.Chart(table(rows)).encode(
        x=alt.X("suite:N", sort=suites, axis=names_axis,
                scale=alt.Scale(paddingInner=0.25, paddingOuter=0.1)),
        xOffset=alt.XOffset("label:N", sort=labels, scale=alt.Scale(paddingInner=0.12)),
        color=colour,
    )  # fmt: skip
    y = alt.Y("mean:Q", axis=values_axis(metric, format=".0%"), scale=alt.Scale(zero=True, nice=True))
    tooltips = [
        alt.Tooltip("label:N", title="evaluation"),
        alt.Tooltip("suite:N", title="suite"),
        alt.Tooltip("mean:Q", title=metric, format=".1%"),
        alt.Tooltip("low:Q", title="95 % from", format=".1%"),
        alt.Tooltip("high:Q", title="to", format=".1%"),
        alt.Tooltip("questions:Q", title="questions", format=",d"),
    ]
    layers = (
        base.mark_bar(opacity=0.9).encode(y=y, tooltip=tooltips),
        # In the bar's colour, the lower half of the interval would be invisible.
        base.mark_rule(strokeWidth=1.4).encode(y=alt.Y("low:Q"), y2="high:Q", color=alt.value(NOTE_COLOUR)),
    )
    chart = cast("alt.LayerChart", alt.layer(*layers))
    words = _gain_text(frame) if are_stages or len(labels) == 1 else _means_text(frame)
    return chart.properties(width=width, height=height, title=heading(title, words))


def _gain_text(frame: pl.DataFrame) -> str:
    per_order = frame.group_by("order", maintain_order=True).first().sort("order")
    first, last = per_order.row(0, named=True), per_order.row(-1, named=True)
    if per_order.height == 1:
        return f"{plain_text(first['label'], 40)}: {first['mean']:.1%} of {first['questions']:,} questions; lines: 95 %"
    return (
        f"{plain_text(first['label'], 40)} {first['mean']:.1%} → {plain_text(last['label'], 40)} {last['mean']:.1%} "
        f"over {last['questions']:,} questions; lines: 95 % intervals"
    )


def _means_text(frame: pl.DataFrame) -> str:
    """Up to four means in order. For baselines, unlike stages, first to last is no progression."""
    per_order = frame.group_by("order", maintain_order=True).first().sort("order")
    counts = per_order["questions"].unique().to_list()
    asked = f" over {counts[0]:,} questions" if len(counts) == 1 else ""
    if per_order.height > 4:
        return f"{per_order.height} evaluations{asked}; lines: 95 % intervals"
    means = ", ".join(f"{plain_text(row['label'], 24)} {row['mean']:.1%}" for row in per_order.iter_rows(named=True))
    return f"{means}{asked}; lines: 95 % intervals"


def _shades(count: int) -> list[str]:
    """From pale to full blue, in the order of the evaluations; distinguishable in greyscale."""
    pale, full = (0xC6, 0xD6, 0xEA), tuple(int(TRAINING[place : place + 2], 16) for place in (1, 3, 5))
    share = [place / max(count - 1, 1) for place in range(count)] if count > 1 else [1.0]
    return [
        "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(pale, full, strict=True)) for part in share
    ]
