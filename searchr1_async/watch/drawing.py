"""Draws for the live view in a subprocess: ``python drawing.py charts|vega|picture``, JSON in, bytes out.

Out-of-process because vl-convert holds the GIL throughout: a picture would block the event loop for 2 s even from a thread. This
file imports nothing from the package, so it starts fast; :mod:`searchr1_async.watch.view` runs it.

``charts`` takes ``window`` and ``from_zero`` and returns JSON: ``page``, a Vega-Lite chart per curve, and ``picture``, one chart
of all curves. ``vega`` returns Vega as a gzipped ES module that exports ``vegaEmbed``. ``picture`` takes the data, and optionally
an existing chart, and returns a PNG.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import sys
from typing import Any

BLUE, RED, GREY = "#4c86d6", "#e0684b", "#8a93a1"
"""Visible on white and on black, and distinguishable with the common forms of colour blindness."""

CURVES: dict[str, tuple[str, str, float | None, float | None]] = {
    "reward": ("Reward", ".2f", None, None),
    "exact_match": ("Exact match", ".0%", 0.0, 1.0),
    "turns": ("Turns per episode", ".1f", 1.0, None),
    "valid_calls": ("Valid calls", ".0%", 0.0, 1.0),
}
"""Heading, number format, minimum and maximum of the values."""

PICTURE_WIDTH = 380
"""Per column, of two; the picture is 900 wide with axes."""


def panel(name: str, window: int, *, from_zero: bool, x_title: str = "step") -> Any:
    """The chart of one curve, over the named data ``steps``, ``running`` and ``evaluations``.

    Args:
        window: half-width in steps of the moving mean (line) and standard deviation (band).
        from_zero: start the step axis at 0, where the untrained model's evaluation is.
    """
    import altair as alt

    heading, number_format, least, greatest = CURVES[name]
    x = (
        alt.X("step:Q")
        .axis(format="d", tickMinStep=1, tickCount=6, title=x_title, titleFontWeight="normal", grid=False)
        .scale(zero=from_zero, nice=False)
    )
    axis = alt.Axis(format=number_format, tickCount=5, title=None, minExtent=38)
    is_share = name == "valid_calls"
    limits: dict[str, Any] = {"domain": [0, 1.04]} if is_share else {}
    scale = alt.Scale(zero=name == "exact_match", nice=not is_share, **limits)
    tip = [alt.Tooltip("step:Q", format=".0f"), alt.Tooltip(f"{name}:Q", format=".3f", title=heading)]
    known = alt.Chart(alt.NamedData(name="steps")).transform_filter(f"isValid(datum.{name})")
    moving: list[Any] = [{"op": "mean", "field": name, "as": "mean"}, {"op": "stdev", "field": name, "as": "spread"}]
    smooth = known.transform_window(
        window=moving, frame=[-window, window], sort=[alt.SortField("step")]
    ).transform_calculate(
        low=_bound("datum.mean - datum.spread", least, max), high=_bound("datum.mean + datum.spread", greatest, min)
    )
    layers = [
        smooth.mark_area(opacity=0.2, color=BLUE).encode(x=x, y=alt.Y("low:Q", axis=axis, scale=scale), y2="high:Q"),
        known.mark_circle(opacity=0.5, size=14, color=BLUE).encode(x=x, y=alt.Y(f"{name}:Q", axis=axis, scale=scale), tooltip=tip),
        smooth.mark_line(color=BLUE, strokeWidth=2).encode(x=x, y=alt.Y("mean:Q", axis=axis, scale=scale)),
        alt.Chart(alt.NamedData(name="running"))
        .transform_filter(f"isValid(datum.{name})")
        .mark_point(color=BLUE, size=60, strokeWidth=1.5)
        .encode(x=x, y=alt.Y(f"{name}:Q", axis=axis, scale=scale), tooltip=tip),
    ]  # fmt: skip
    if name == "exact_match":
        layers += _evaluations(x, axis, scale)
    return alt.layer(*layers)


def _bound(expression: str, limit: float | None, choose: Any) -> str:
    return expression if limit is None else f"{choose.__name__}({expression}, {limit})"


def _evaluations(x: Any, axis: Any, scale: Any) -> list[Any]:
    import altair as alt

    held_out = alt.Chart(alt.NamedData(name="evaluations"))
    tip = ["label:N", *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("exact_match", "low", "high"))]
    return [
        held_out.mark_rule(color=RED, strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q", axis=axis, scale=scale), y2="high:Q"),
        held_out.mark_point(color=RED, fill=RED, shape="diamond", size=70, opacity=1).encode(
            x=x, y=alt.Y("exact_match:Q", axis=axis, scale=scale), tooltip=tip
        ),
    ]  # fmt: skip


def page_specs(window: int, from_zero: bool) -> dict[str, Any]:
    """A Vega-Lite chart per curve, as wide as its container."""
    specs = {
        name: panel(name, window, from_zero=from_zero).properties(width="container", height=150).to_dict()
        for name in CURVES
    }
    for spec in specs.values():
        spec.pop("config", None)
        spec["autosize"] = {"type": "fit", "contains": "padding"}
    return specs


def picture_spec(window: int, from_zero: bool) -> dict[str, Any]:
    """All curves as one picture; :func:`filled` adds title and data."""
    import altair as alt

    panels = [
        panel(name, window, from_zero=from_zero, x_title="optimiser step").properties(
            width=PICTURE_WIDTH, height=170, title=alt.TitleParams(heading, anchor="start", fontSize=13)
        )
        for name, (heading, *_) in CURVES.items()
    ]
    return _framed(alt.concat(*panels, columns=2, spacing=22))


def suites_spec() -> dict[str, Any]:
    """Bars of an evaluation's suites."""
    return _framed(_suites())


def _framed(chart: Any) -> dict[str, Any]:
    import altair as alt

    title = alt.TitleParams(
        "",
        subtitle=[],
        anchor="start",
        fontSize=16,
        offset=14,
        subtitleFontSize=12,
        subtitleColor="#4b5563",
        subtitlePadding=4,
    )
    chart = chart.properties(title=title).configure(background="white", padding=12, font="sans-serif")
    chart = chart.configure_view(stroke=None).configure_axis(
        gridColor="#e5e7eb", domainColor=GREY, tickColor=GREY, labelFontSize=11
    )
    return chart.to_dict()


def filled(spec: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """``spec`` with the task's ``title``, ``subtitle`` (lines), ``steps``, ``evaluations`` and ``suites``."""
    title = spec["title"] | {"text": task["title"], "subtitle": task["subtitle"]}
    rows = {name: task[name] for name in ("steps", "evaluations", "suites")} | {"running": []}
    return spec | {"title": title, "datasets": rows}


def _suites() -> Any:
    import altair as alt

    rows = alt.Chart(alt.NamedData(name="suites"))
    y = alt.Y("suite:N", sort=None, title=None, axis=alt.Axis(labelLimit=260, ticks=False, domain=False))
    scale = alt.Scale(domain=[0, 1])
    share = alt.X("exact_match:Q", title="exact match", scale=scale, axis=alt.Axis(format=".0%"))
    bars = rows.mark_bar(color=BLUE, height=16).encode(y=y, x=share)
    intervals = rows.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2, color=RED)
    texts = rows.mark_text(align="left", dx=5, dy=-10, fontSize=11).encode(
        y=y, x=share, text=alt.Text("exact_match:Q", format=".1%")
    )
    return alt.layer(bars, intervals.encode(y=y, x=alt.X("low:Q", scale=scale), x2="high:Q"), texts).properties(
        width=620, height=alt.Step(34)
    )


def vega() -> bytes:
    """Vega, Vega-Lite and vega-embed as one gzipped ES module."""
    import vl_convert

    source = vl_convert.javascript_bundle("export { vegaEmbed };")
    return gzip.compress(source.encode(), 6)


def picture(task: dict[str, Any], scale: float = 2.0) -> bytes:
    """The picture as PNG with at most 256 colours, less than half the size of 24-bit."""
    import vl_convert

    spec = task.get("spec") or (picture_spec(task["window"], task["from_zero"]) if task["steps"] else suites_spec())
    return _fewer_colours(vl_convert.vegalite_to_png(filled(spec, task), scale=scale))


def _fewer_colours(png: bytes) -> bytes:
    """Quantize the PNG if Pillow is installed (matplotlib depends on it)."""
    with contextlib.suppress(ImportError):
        import io

        from PIL import Image

        out = io.BytesIO()
        Image.open(io.BytesIO(png)).convert("RGB").quantize(
            256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        ).save(out, "PNG", optimize=True)
        return out.getvalue()
    return png


def main() -> None:
    task = json.load(sys.stdin)
    if sys.argv[1] == "charts":
        window, from_zero = task["window"], task["from_zero"]
        out = json.dumps({"page": page_specs(window, from_zero), "picture": picture_spec(window, from_zero)}).encode()
    else:
        out = vega() if sys.argv[1] == "vega" else picture(task)
    sys.stdout.buffer.write(out)


if __name__ == "__main__":
    main()
