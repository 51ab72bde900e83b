"""Charts of outcomes: reward and exact match by number of turns or searches, and exact match by suite; and their tidy frames."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, cast

import polars as pl

from searchr1_async.records.statistics import Z_95, mean_interval, wilson_interval
from searchr1_async.watch.chart_parts import (
    GREY,
    HEIGHT,
    NOTE_COLOUR,
    SEEN,
    TRAINING,
    WIDTH,
    axis,
    empty_chart,
    heading,
    legend,
    plain_text,
    steps_axis,
    table,
    thinned,
    values_axis,
)

if TYPE_CHECKING:
    import altair as alt

ALL_SUITES = "all suites"
MACRO_AVERAGE = "macro average"
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
        evaluations: as from :func:`evaluation_scores`.
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
