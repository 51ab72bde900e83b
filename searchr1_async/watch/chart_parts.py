"""Parts of charts: colours, axes, titles, thinned tables, and how notebooks display a chart.

Charts have no ``config``: Vega-Lite allows it only at the top level, so configured charts cannot be concatenated
(``a.plot("reward") | b.plot("reward")``). Text and background colours are left to Vega-Lite: saved files are black on white,
JupyterLab's dark theme is light on dark.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import polars as pl

from searchr1_async.watch.console import one_line
from searchr1_async.watch.drawing import fewer_colours

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
    return one_line(text if len(text) <= longest else f"{text[: longest - 1]}…")


def empty_chart(text: str, *, title: str = "") -> alt.Chart:
    """A chart with a text that says why it is empty."""
    import altair as alt

    lines = wrap(plain_text(text, 600), 66) or [""]
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
        picture = fewer_colours(vl_convert.vegalite_to_png(spec, scale=2))
        return picture if len(picture) <= PICTURE_BYTES else fewer_colours(vl_convert.vegalite_to_png(spec, scale=1))
    except ValueError:  # the user's edits are invalid Vega-Lite: the notebook shows the error
        return None


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


def thinned(frame: pl.DataFrame, most: int = MAX_ROWS) -> pl.DataFrame:
    """At most ``most`` rows, evenly spaced, first and last included."""
    if frame.height <= most:
        return frame
    places = [round(place * (frame.height - 1) / (most - 1)) for place in range(most)]
    return frame[places]
