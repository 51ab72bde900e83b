"""A run's learning curve as one PNG: exact match, turns per episode, valid calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING, HELD_OUT, TURNS, CALLS, SEEN = "#3b6fb6", "#c4472f", "#2f8f6b", "#8a5fb0", "#c98a1b"
"""Distinguishable with the common forms of colour blindness; line styles differ where two share a panel."""
GREY = "#6b7280"


@dataclass(frozen=True, slots=True)
class EvaluationPoint:
    """One held-out evaluation on the curve."""

    label: str
    step: int | None
    """Optimiser steps done before it; None places it at the right end."""
    exact_match: float
    low: float
    """Bounds of the 95 % interval."""
    high: float


def learning_curve(
    metrics: pl.DataFrame, evaluations: Sequence[EvaluationPoint], path: Path, *, title: str = ""
) -> Path:
    """Draw the learning curve to ``path`` as PNG (1650 x 1350 pixels); returns ``path``.

    Args:
        metrics: one row per step, as from :meth:`searchr1_async.records.run_records.RunRecords.metrics`; may be empty, and any
            metric may be missing or null.
        evaluations: held-out evaluations, drawn with their intervals.
        title: heading of the picture.

    Raises:
        OSError: ``path`` is not writable.
    """
    # Imported lazily: matplotlib takes half a second. Its object interface has no global state, so this works in any thread and
    # leaves a notebook's own figures alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    answers, turns, calls = figure.subplots(3, 1, sharex=True, height_ratios=[2.2, 1, 1])
    _draw_exact_match(answers, metrics, evaluations)
    _draw_turns(turns, metrics)
    _draw_shares(calls, metrics)
    calls.set_xlabel("optimiser step")
    _limit_steps(calls, metrics, evaluations)
    figure.align_ylabels()
    if title:
        figure.suptitle(_plain(title), fontsize=14, fontweight="bold", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _draw_exact_match(axes: Axes, metrics: pl.DataFrame, evaluations: Sequence[EvaluationPoint]) -> None:
    _style(axes, "exact match", share=True)
    steps_n, values_n = _series(metrics, "env/all/correct")
    if len(steps_n):
        axes.plot(steps_n, values_n, "o", color=TRAINING, alpha=0.35, markersize=4, markeredgewidth=0)
        smooth_n, spread_n = smoothed(values_n)
        if len(steps_n) > 2:
            axes.fill_between(steps_n, smooth_n - spread_n, smooth_n + spread_n, color=TRAINING, alpha=0.12, lw=0)
        axes.plot(steps_n, smooth_n, color=TRAINING, lw=2.2, label="training episodes (points: single steps)")
    points = [point for point in evaluations if not math.isnan(point.exact_match)]
    last_step = _last_step(metrics, evaluations)
    places = [float(last_step if point.step is None else point.step) for point in points]
    places = _beside_each_other(places, max(last_step, 1) * 0.018, last_step / 2)
    if points:
        means = [point.exact_match for point in points]
        errors = [[p.exact_match - p.low for p in points], [p.high - p.exact_match for p in points]]
        axes.errorbar(
            places, means, yerr=errors, fmt="D", color=HELD_OUT, markersize=7, capsize=5, lw=1.6, zorder=5,
            label="held-out questions, 95 % interval",
        )  # fmt: skip
    highest = max([*values_n.tolist(), *(point.high for point in points)], default=1.0)
    top = min(1.02, max(0.1, highest * 1.15))
    axes.set_ylim(0, top)
    _label_points(axes, points, places, last_step, top)
    _legend(axes)


def _draw_turns(axes: Axes, metrics: pl.DataFrame) -> None:
    _style(axes, "turns per episode")
    steps_n, values_n = _series(metrics, "env/all/turns_per_episode")
    if len(steps_n):
        axes.plot(steps_n, values_n, "o", color=TURNS, alpha=0.35, markersize=4, markeredgewidth=0)
        axes.plot(steps_n, smoothed(values_n)[0], color=TURNS, lw=2.2)
        axes.set_ylim(min(1.0, values_n.min()) - 0.05, max(3.0, values_n.max() * 1.08))
    else:
        axes.set_ylim(0.95, 3)
    # Below two turns no search result is ever read.
    axes.axhline(2, color=GREY, lw=0.9, ls=(0, (4, 3)))
    axes.annotate("searches once, then answers", (0.995, 2), xycoords=("axes fraction", "data"), xytext=(0, 3),
                  textcoords="offset points", ha="right", va="bottom", color=GREY, fontsize=9)  # fmt: skip


def _draw_shares(axes: Axes, metrics: pl.DataFrame) -> None:
    _style(axes, "share", share=True)
    for name, label, colour, line in (
        ("env/all/valid_calls", "tool calls that are valid", CALLS, "-"),
        ("env/all/answer_in_passage", "episodes shown a passage with the answer", SEEN, (0, (5, 1.5))),
    ):
        steps_n, values_n = _series(metrics, name)
        if len(steps_n):
            axes.plot(steps_n, values_n, "o", color=colour, alpha=0.3, markersize=4, markeredgewidth=0)
            axes.plot(steps_n, smoothed(values_n)[0], color=colour, lw=2.2, ls=line, label=label)
    axes.set_ylim(-0.02, 1.04)
    _legend(axes, "best")


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


def _series(metrics: pl.DataFrame, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values where the metric is finite."""
    if name not in metrics.columns or "step" not in metrics.columns:
        return np.empty(0), np.empty(0)
    frame = metrics.select(step=pl.col("step").cast(pl.Float64), value=pl.col(name).cast(pl.Float64))
    frame = frame.filter(pl.col("value").is_finite()).sort("step")
    return frame["step"].to_numpy(), frame["value"].to_numpy()


def _last_step(metrics: pl.DataFrame, evaluations: Sequence[EvaluationPoint]) -> int:
    steps = metrics["step"].to_list() if "step" in metrics.columns else []
    return max([*steps, *(point.step for point in evaluations if point.step is not None)], default=0)


def _limit_steps(axes: Axes, metrics: pl.DataFrame, evaluations: Sequence[EvaluationPoint]) -> None:
    from matplotlib.ticker import MaxNLocator

    last = max(_last_step(metrics, evaluations), 1)
    margin = 0.19 if evaluations else 0.03  # room for evaluation labels
    axes.set_xlim(-margin * last, last * (1 + margin))
    axes.set_xticks([tick for tick in MaxNLocator(integer=True).tick_values(0, last) if 0 <= tick <= last])


def _label_points(
    axes: Axes, points: Sequence[EvaluationPoint], places: Sequence[float], last_step: int, top: float
) -> None:
    """Label each marker; labels of neighbours are spread apart vertically, those at the ends go into the margin."""
    width = max(last_step, 1)
    near = 0.15 * width
    remaining = sorted(zip(places, points, strict=True), key=lambda pair: pair[0])
    while remaining:
        first = remaining[0][0]
        neighbours = [pair for pair in remaining if pair[0] - first <= near]
        remaining = remaining[len(neighbours) :]
        right = first > 0.1 * width
        edge = max(place for place, _ in neighbours) if right else first
        heights = spread_apart([point.exact_match for _, point in neighbours], 0.1 * top, 0.05 * top, 0.95 * top)
        for (place, point), height in zip(neighbours, heights, strict=True):
            side = edge + width * (0.012 if right else -0.012)
            axes.annotate(
                f"{fill(_plain(point.label), 14)}\n{point.exact_match:.1%}", (place, point.exact_match), xytext=(side, height),
                ha="left" if right else "right", va="center", color=HELD_OUT, fontsize=10, fontweight="bold", zorder=6,
                linespacing=1.1, bbox={"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.75},
                arrowprops={"arrowstyle": "-", "color": HELD_OUT, "lw": 0.7, "alpha": 0.6},
            )  # fmt: skip


def spread_apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Values moved at least ``gap`` apart, in order and within ``low`` to ``high`` if they fit."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    out = [0.0] * len(values)
    floor = low
    for index in order:
        out[index] = max(values[index], floor)
        floor = out[index] + gap
    ceiling = high
    for index in reversed(order):
        out[index] = min(out[index], ceiling)
        ceiling = out[index] - gap
    return out


def _beside_each_other(places: Sequence[float], gap: float, middle: float) -> list[float]:
    """Shift markers that share a step outwards from the middle, in order, so that none hides another."""
    out: list[float] = []
    for index, place in enumerate(places):
        before, after = places[:index].count(place), places[index + 1 :].count(place)
        out.append(place - after * gap if place <= middle else place + before * gap)
    return out


def _style(axes: Axes, label: str, *, share: bool = False) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_ylabel(label)
    axes.grid(axis="y", color="#e5e7eb", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(colors="#374151")
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def _legend(axes: Axes, place: Literal["best", "lower right"] = "lower right") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=place, frameon=True, facecolor="white", edgecolor="none", framealpha=0.85, fontsize=9.5)


def _plain(text: str) -> str:
    """Escape ``$``, which would start a formula, and blank control characters."""
    return "".join(char if char.isprintable() else " " for char in text).replace("$", r"\$")
